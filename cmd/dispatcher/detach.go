package main

import (
	"strconv"

	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher"
)

func (a *app) detachCommand() *cobra.Command {
	all := false
	cmd := &cobra.Command{
		Use:   "detach HOOK DEVICE {MEMBER | --all}",
		Short: "Take a member, or all of them, off a device",
		Long: `Take a member, or all of them, off a device, whoever owns them, and remove their
pins. With the last member the device becomes free. Programs that are not
members of a chain are left alone.`,
		Example: `  dispatcher detach xdp eth0 filter
  dispatcher detach xdp eth0 --all`,
		Args: func(cmd *cobra.Command, args []string) error {
			if err := words(1, "HOOK", "DEVICE", "[MEMBER]")(cmd, args); err != nil {
				return err
			}
			switch n := len(withoutDev(args, 1)); {
			case n == 3 && all:
				return usage(seeHelp(cmd), "one MEMBER or --all, not both")
			case n == 2 && !all:
				return usage(seeHelp(cmd), "which one? Give a MEMBER or --all")
			}
			return nil
		},
		ValidArgsFunction: completeArgs(1, offerHooks, a.offerDevices, a.offerMembers),
		RunE: func(cmd *cobra.Command, args []string) error {
			args = withoutDev(args, 1)
			t, err := a.target(args[0], args[1])
			if err != nil {
				return err
			}
			what := "all members"
			if all {
				err = dispatcher.DetachAll(cmd.Context(), t, dispatcher.DetachOptions{BPFFS: a.bpffs})
			} else {
				what = strconv.Quote(args[2])
				err = dispatcher.Detach(cmd.Context(), t, args[2], dispatcher.DetachOptions{BPFFS: a.bpffs})
			}
			if err == nil && a.verbose {
				a.note("detached %s from %s %s", what, t.Hook, t.Device)
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "all members; the device becomes free")
	return cmd
}
