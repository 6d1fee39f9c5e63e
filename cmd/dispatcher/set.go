package main

import (
	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
)

func (a *app) setCommand() *cobra.Command {
	var settings settingsFlags
	cmd := &cobra.Command{
		Use:   "set HOOK DEVICE MEMBER",
		Short: "Change a member's priority, continue set or what an empty slot does",
		Long: `Change a member's priority, continue set or what an empty slot does. What is not
given stays. The chain is exchanged as a whole: each packet sees the old one or
the new one.`,
		Example: `  dispatcher set xdp eth0 filter --priority 10
  dispatcher set xdp eth0 filter --continue-on pass,redirect --on-missing drop`,
		Args:              words(1, "HOOK", "DEVICE", "MEMBER"),
		ValidArgsFunction: completeArgs(1, offerHooks, a.offerDevices, a.offerMembers),
		RunE: func(cmd *cobra.Command, args []string) error {
			args = withoutDev(args, 1)
			t, err := a.target(args[0], args[1])
			if err != nil {
				return err
			}
			if settings.Settings == (hook.Settings{}) {
				return usage(seeHelp(cmd), "what shall be set? Give --priority, --continue-on or --on-missing")
			}
			link, err := dispatcher.Open(cmd.Context(), t, args[2], a.readOptions())
			if err != nil {
				return err
			}
			defer link.Close()
			if err := link.Set(cmd.Context(), settings.Settings); err != nil {
				return err
			}
			if info, err := link.Info(cmd.Context()); err == nil && a.verbose {
				a.note("%q on %s %s: priority %d, continues on %v, when missing %v", info.Name, t.Hook, t.Device, info.Priority, info.ContinueOn, info.OnMissing)
			}
			return nil
		},
	}
	settings.add(cmd)
	return cmd
}
