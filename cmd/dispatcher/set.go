package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
)

func (a *app) setCommand() *cobra.Command {
	var (
		settings settingsFlags
		place    positionFlags
	)
	cmd := &cobra.Command{
		Use:   "set HOOK TARGET MEMBER",
		Short: "Change a member's priority or place, and on xdp its settings",
		Long: `Change a member's priority or place, and on xdp its continue set and what an
empty slot does. What is not given stays.

On xdp the chain is exchanged as a whole: each packet sees the old one or the
new one. Elsewhere there is only the priority, and the place: --before, --after,
--first and --last. The kernel moves nothing, so a member that has to move is
attached anew at the other place. On a cgroup and on tc both places have it for
a moment.`,
		Example: `  dispatcher set xdp eth0 filter --priority 10
  dispatcher set xdp eth0 filter --continue-on pass,redirect --on-missing drop
  dispatcher set tcx/ingress eth0 filter --before link:12
  dispatcher set cgroup_skb/egress /sys/fs/cgroup/web.slice count --first`,
		Args:              words(1, "HOOK", "TARGET", "MEMBER"),
		ValidArgsFunction: completeArgs(1, offerHooks, a.offerTargets, a.offerMembers),
		RunE: func(cmd *cobra.Command, args []string) error {
			args = withoutDev(args, 1)
			t, err := a.target(args[0], args[1])
			if err != nil {
				return err
			}
			switch {
			case settings.Settings == (hook.Settings{}) && place.IsZero():
				return usage(seeHelp(cmd), "what shall be set? Give --priority or a place, --continue-on or --on-missing")
			case settings.Priority != 0 && !place.IsZero():
				return usage("", "--priority or a place, not both: a place brings a priority that fits")
			}
			link, err := dispatcher.Open(cmd.Context(), t, args[2], a.readOptions())
			if err != nil {
				return err
			}
			defer link.Close()
			if !place.IsZero() {
				if err := link.Move(cmd.Context(), place.Position); err != nil {
					return err
				}
			}
			if settings.Settings != (hook.Settings{}) {
				if err := link.Set(cmd.Context(), settings.Settings); err != nil {
					return err
				}
			}
			a.tellSet(cmd.Context(), t, link)
			return nil
		},
	}
	settings.add(cmd)
	place.add(a, cmd)
	return cmd
}

// tellSet says what became of the member. It is not worth an error if it cannot
// be read back.
func (a *app) tellSet(ctx context.Context, t dispatcher.Target, link *dispatcher.Link) {
	info, err := link.Info(ctx)
	if err != nil {
		return
	}
	if t.Hook == hook.XDP {
		if a.verbose {
			a.note("%q on %s %s: priority %d, continues on %v, when missing %v", info.Name, t.Hook, t.Name(), info.Priority, info.ContinueOn, info.OnMissing)
		}
		return
	}
	if a.verbose {
		a.note("%q on %s %s: priority %d", info.Name, t.Hook, t.Name(), info.Priority)
	}
	if chain, err := link.Chain(ctx); err == nil {
		a.tellPlace(chain, info)
	}
}
