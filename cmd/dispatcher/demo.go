package main

import (
	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher/internal/demo"
)

func (a *app) demoCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show what it does, on packets, in network namespaces of its own",
		Long: `Show what it does: attach, protect, replace, reorder and adopt programs on XDP, TC
and a cgroup, kill owners, and see what becomes of packets that really travel.

It makes two network namespaces with a veth pair, a cgroup and a bpffs of its
own, and touches nothing else. It prints each command as you would type it, what
the kernel answers, and whether that is what it should be. In the end, and on
Ctrl-C, it removes all of it and checks that nothing is left. What this machine
has not, TCX or cgroup v2, it names. It takes some seconds and needs root and
iproute2.`,
		Args: words(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if a.format == formatJSON {
				return usage("", "the demo is for people: it has no JSON")
			}
			return demo.Run(cmd.Context(), a.stdout, a.colored(a.stdout))
		},
	}
	cmd.AddCommand(&cobra.Command{
		Use:    "connect ADDRESS:PORT",
		Short:  "Be the client of the demo",
		Hidden: true,
		Args:   words(0, "ADDRESS:PORT"),
		RunE:   func(_ *cobra.Command, args []string) error { return demo.Connect(a.netns, args[0], a.stdout) },
	})
	return cmd
}
