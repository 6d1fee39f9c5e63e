package main

import (
	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher/internal/demo"
)

func (a *app) demoCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show what dispatcher does, on packets, in its own network namespaces",
		Long: `Show what dispatcher does: attach, protect, replace, reorder and adopt programs
on XDP, TC and a cgroup, kill owners, and see what happens to packets that
really travel.

The demo makes two network namespaces with a veth pair, a cgroup and a bpffs,
and touches nothing else. It prints each command as you would type it, the
kernel's answer, and whether the answer is right. At the end, and on Ctrl-C, it
removes all of it and checks that nothing is left. If this machine lacks TCX or
cgroup v2, the demo says so. It takes some seconds and needs root and iproute2.`,
		Args: words(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if a.format == formatJSON {
				return usage("", "the demo is for human readers: it has no JSON")
			}
			return demo.Run(cmd.Context(), raw(a.stdout), a.colored(a.stdout))
		},
	}
	cmd.AddCommand(&cobra.Command{
		Use:    "connect ADDRESS:PORT",
		Short:  "Act as the client of the demo",
		Hidden: true,
		Args:   words(0, "ADDRESS:PORT"),
		RunE:   func(_ *cobra.Command, args []string) error { return demo.Connect(a.netns, args[0], a.stdout) },
	})
	return cmd
}
