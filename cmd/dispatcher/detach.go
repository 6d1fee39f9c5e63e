package main

import (
	"strconv"

	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
)

func (a *app) detachCommand() *cobra.Command {
	var (
		all, force bool
		linkID     uint32
	)
	cmd := &cobra.Command{
		Use:   "detach {HOOK TARGET {MEMBER | link:ID | id:PROG | --all} | --link ID}",
		Short: "Detach a member, or all members, from a hook",
		Long: `Detach a member, or all members, from a hook, and remove their pins. A member
of another owner can be detached too. When the last member of an xdp chain
leaves, the device becomes free.

Programs of other tools stay. On hooks other than xdp, --force detaches them
too: link:ID names an entry by its link, id:PROG by its program, as "list" shows
them.

--link ID detaches a link of any hook, wherever its target is: the link of a
whole xdp chain, of one member, or with --force of another tool. No process is
killed: a process that holds the link keeps a link that does nothing.
"dispatcher holders --link ID" shows such processes.`,
		Example: `  dispatcher detach xdp eth0 filter
  dispatcher detach xdp eth0 --all
  dispatcher detach tcx/ingress eth0 link:12 --force
  dispatcher detach --link 12 --force`,
		Args: func(cmd *cobra.Command, args []string) error {
			if linkID != 0 {
				return alone(cmd, args, all)
			}
			if err := words(1, "HOOK", "TARGET", "[MEMBER]")(cmd, args); err != nil {
				return err
			}
			switch n := len(withoutDev(args, 1)); {
			case n == 3 && all:
				return usage(seeHelp(cmd), "one MEMBER or --all, not both")
			case n == 2 && !all:
				return usage(seeHelp(cmd), "which member? Give a MEMBER or --all")
			case all && force:
				return usage("name an entry that is not a member by link:ID or id:PROG", "--all detaches members only, and they need no --force")
			}
			return nil
		},
		ValidArgsFunction: completeArgs(1, offerHooks, a.offerTargets, a.offerMembers),
		RunE: func(cmd *cobra.Command, args []string) error {
			o := dispatcher.DetachOptions{BPFFS: a.bpffs, Force: force}
			if linkID != 0 {
				err := dispatcher.DetachLink(cmd.Context(), linkID, o)
				if err == nil && a.verbose {
					a.note("detached link %d", linkID)
				}
				return err
			}
			args = withoutDev(args, 1)
			t, err := a.target(args[0], args[1])
			if err != nil {
				return err
			}
			what := "all members"
			if all {
				err = dispatcher.DetachAll(cmd.Context(), t, o)
			} else {
				what = strconv.Quote(args[2])
				err = dispatcher.Detach(cmd.Context(), t, hook.Ref(args[2]), o)
			}
			if err == nil && a.verbose {
				a.note("detached %s from %s %s", what, t.Hook, t.Name())
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "detach all members; an xdp device becomes free")
	cmd.Flags().BoolVar(&force, "force", false, "detach it even if another tool attached it (on xdp with --link only)")
	linkFlag(cmd, &linkID, "detach the link with this `ID`, on any hook")
	return cmd
}

// linkFlag adds --link, which replaces hook and target.
func linkFlag(cmd *cobra.Command, id *uint32, text string) {
	cmd.Flags().Func("link", text, func(s string) (err error) {
		*id, err = parseID(s)
		return err
	})
	completeFlag(cmd, "link", offerLinks)
}

// alone checks a verb's arguments for --link.
func alone(cmd *cobra.Command, args []string, others bool) error {
	if len(args) > 0 || others {
		return usage(seeHelp(cmd), "a hook and a target, or --link, not both")
	}
	return nil
}
