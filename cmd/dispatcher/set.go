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
		Short: "Change a member's priority or position, and on xdp its settings",
		Long: `Change a member's priority or position, and on xdp its continue set and what
happens while its slot is empty. Settings that are not given stay.

On xdp the chain is replaced as a whole: each packet meets the old one or the
new one. The other hooks have only the priority and the position: --before,
--after, --first and --last. The kernel cannot move a program, so a member that
has to move is attached again at its new position, and then detached at the old
one. Meanwhile, on a cgroup and on tc, its program runs at both.`,
		Example: `  dispatcher set xdp eth0 filter --priority 10
  dispatcher set xdp eth0 filter --continue-on pass,redirect --on-missing drop
  dispatcher set tcx/ingress eth0 filter --before link:12
  dispatcher set cgroup_skb/egress /sys/fs/cgroup/web.slice count --first`,
		Args:              words(1, "HOOK", "TARGET", "MEMBER"),
		ValidArgsFunction: completeArgs(1, offerHooks, a.offerTargets, a.offerMembers),
		RunE: a.withTarget(func(cmd *cobra.Command, t dispatcher.Target, args []string) error {
			switch {
			case settings.Settings == (hook.Settings{}) && place.IsZero():
				return usage(seeHelp(cmd), "nothing to set; give --priority or a position, --continue-on or --on-missing")
			case settings.Priority != 0 && !place.IsZero():
				return usage("", "give --priority or a position, not both: a position brings a priority that fits")
			}
			link, err := dispatcher.Open(cmd.Context(), t, hook.Ref(args[0]), a.readOptions())
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
		}),
	}
	settings.add(cmd)
	place.add(a, cmd)
	return cmd
}

// tellSet tells the member's new settings. It ignores a failure to read them
// back.
func (a *app) tellSet(ctx context.Context, t dispatcher.Target, link *dispatcher.Link) {
	info, err := link.Info(ctx)
	if err != nil {
		return
	}
	if a.verbose && t.Hook == hook.XDP {
		a.note("%q on %s %s: priority %d, continues on %v, when missing %v", info.Name, t.Hook, t.Name(), info.Priority, info.ContinueOn, info.OnMissing)
	} else if a.verbose {
		a.note("%q on %s %s: priority %d", info.Name, t.Hook, t.Name(), info.Priority)
	}
	if t.Hook == hook.XDP {
		return
	}
	if chain, err := link.Chain(ctx); err == nil {
		a.tellPosition(chain, info)
	}
}
