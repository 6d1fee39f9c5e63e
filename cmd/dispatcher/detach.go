package main

import (
	"strconv"

	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher"
)

func (a *app) detachCommand() *cobra.Command {
	var (
		all, force bool
		linkID     uint32
	)
	cmd := &cobra.Command{
		Use:   "detach {HOOK TARGET {MEMBER | link:ID | id:PROG | --all} | --link ID}",
		Short: "Take a member, or all of them, off a hook",
		Long: `Take a member, or all of them, off a hook, whoever owns them, and remove their
pins. With the last member of an xdp chain the device becomes free.

What is not a member is left alone. On other hooks than xdp, --force takes out
what other tools have attached too: link:ID is an entry by its link, id:PROG by
its program, as "list" shows them.

--link ID is a link of any hook, wherever its target is: that of a whole xdp chain,
of one member, or with --force of another tool. Nobody is killed: whoever holds it
keeps a link that does nothing. "dispatcher holders --link ID" tells who that is.`,
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
				return usage(seeHelp(cmd), "which one? Give a MEMBER or --all")
			case all && force:
				return usage("name what is not a member by link:ID or id:PROG", "--all takes out members only, and they need no --force")
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
				err = dispatcher.Detach(cmd.Context(), t, args[2], o)
			}
			if err == nil && a.verbose {
				a.note("detached %s from %s %s", what, t.Hook, t.Name())
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "all members; an xdp device becomes free")
	cmd.Flags().BoolVar(&force, "force", false, "take it out even if another tool has attached it (on xdp with --link only)")
	linkFlag(cmd, &linkID, "detach the link with this `ID`, on whatever hook")
	return cmd
}

// linkFlag adds --link, which stands for hook and target.
func linkFlag(cmd *cobra.Command, id *uint32, text string) {
	cmd.Flags().Func("link", text, func(s string) (err error) {
		*id, err = parseID(s)
		return err
	})
}

// alone is the check of a verb's arguments beside --link.
func alone(cmd *cobra.Command, args []string, others bool) error {
	if len(args) > 0 || others {
		return usage(seeHelp(cmd), "a hook and a target, or --link, not both")
	}
	return nil
}
