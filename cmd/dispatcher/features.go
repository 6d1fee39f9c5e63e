package main

import (
	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
)

func (a *app) featuresCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "features [DEVICE]",
		Short: "Show what this kernel, and a device, can do",
		Long: `Show what this kernel can do and, with DEVICE, what that device can do.
dispatcher tries each feature instead of guessing from the version. It leaves
nothing behind.`,
		Example: `  dispatcher features
  dispatcher features eth0 -j`,
		Args:              words(0, "[DEVICE]"),
		ValidArgsFunction: completeArgs(0, a.offerDevices),
		RunE: func(cmd *cobra.Command, args []string) error {
			t := dispatcher.Target{Hook: hook.XDP, NetNS: a.netns}
			if args = withoutDev(args, 0); len(args) > 0 {
				t.Device = args[0]
			}
			features, err := dispatcher.Features(cmd.Context(), t, a.readOptions())
			if err != nil {
				return err
			}
			return a.printFeatures(features)
		},
	}
}

func (a *app) printFeatures(features []hook.Feature) error {
	if a.format == formatJSON {
		return a.printJSON(struct {
			Version  int            `json:"version"`
			Features []hook.Feature `json:"features"`
		}{schema, append([]hook.Feature{}, features...)})
	}
	rows := [][]cell{heads("FEATURE", "SUPPORTED", "NEEDS", "DETAIL")}
	for _, f := range features {
		supported := cell{"yes", green}
		switch {
		case f.Unknown:
			supported = cell{"unknown", yellow}
		case !f.Supported:
			supported = cell{"no", yellow}
		}
		rows = append(rows, []cell{{f.Name, ""}, supported, {orDash(f.Needs), ""}, {orDash(f.Detail), ""}})
	}
	return a.printTable(rows)
}
