package main

import (
	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher/internal/demo"
)

func (a *app) demoCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "demo",
		Short: "Show what it does, on packets, in network namespaces of its own",
		Long: `Show what it does: attach, protect, replace and reorder programs, kill an owner,
and see what becomes of packets that really travel.

It makes two network namespaces with a veth pair and a bpffs of its own, and
touches nothing else. It prints each command as you would type it, what the
kernel answers, and whether that is what it should be. In the end, and on
Ctrl-C, it removes all of it and checks that nothing is left. It takes some
seconds and needs root and iproute2.`,
		Args: words(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if a.format == formatJSON {
				return usage("", "the demo is for people: it has no JSON")
			}
			return demo.Run(cmd.Context(), a.stdout, a.colored(a.stdout))
		},
	}
}
