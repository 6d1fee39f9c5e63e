package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
)

func (a *app) pinCommand() *cobra.Command {
	return a.pinVerb("pin", "Pin a member, so that it stays without its owner",
		`Pin a member in the bpffs, so that it stays when its owner closes it or dies. A
member whose pins are gone, or are in a bpffs that cannot be reached, is pinned
again in the bpffs of --bpffs. A member on tcx or a cgroup whose name was lost with
its registry needs a name first: "adopt --link" gives it one, and pins it.`,
		func(ctx context.Context, link *dispatcher.Link) error {
			if err := a.needBPFFS(true); err != nil {
				return err
			}
			_, err := link.Pin(ctx)
			return err
		})
}

func (a *app) unpinCommand() *cobra.Command {
	return a.pinVerb("unpin", "Unpin a member, so that it leaves with its owner",
		`Unpin a member: its pins in the bpffs are removed, and it stays as long as a process
holds it. A member that no process holds leaves at once; "holders" shows processes.`,
		func(ctx context.Context, link *dispatcher.Link) error { return link.Unpin(ctx) })
}

func (a *app) pinVerb(verb, short, long string, do func(context.Context, *dispatcher.Link) error) *cobra.Command {
	return &cobra.Command{
		Use:               verb + " HOOK TARGET MEMBER",
		Short:             short,
		Long:              long,
		Example:           "  dispatcher " + verb + " xdp eth0 filter",
		Args:              words(1, "HOOK", "TARGET", "MEMBER"),
		ValidArgsFunction: completeArgs(1, offerHooks, a.offerTargets, a.offerMembers),
		RunE: a.withTarget(func(cmd *cobra.Command, t dispatcher.Target, args []string) error {
			link, err := dispatcher.Open(cmd.Context(), t, hook.Ref(args[0]), a.readOptions())
			if err != nil {
				return err
			}
			defer link.Close()
			return do(cmd.Context(), link)
		}),
	}
}
