package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

func (a *app) pinCommand() *cobra.Command {
	return a.pinVerb("pin", "Pin a member, so that it stays without its owner",
		`Pin a member in the bpffs, so that it stays when its owner closes it or dies. A
member whose pins are gone, or are in a bpffs that cannot be reached, is pinned
again in the bpffs of --bpffs.`,
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
holds it; "holders" shows processes. A member that no process holds would leave: it
is not unpinned but refused, and "detach" takes it off.`,
		func(ctx context.Context, link *dispatcher.Link) error { return link.Unpin(ctx) })
}

// held returns the refusal to unpin a member that nothing holds but its own pins.
func (a *app) held(ctx context.Context, t dispatcher.Target, ref hook.Ref) error {
	all, err := dispatcher.HoldersOn(ctx, t, ref, dispatcher.HoldersOnOptions{BPFFS: a.bpffs})
	if err != nil {
		return err
	}
	for _, h := range all {
		if h.What == "program" || len(h.Processes) > 0 || len(h.Pins) > 1 || h.Counted > h.Found {
			return nil
		}
	}
	if len(all) == 0 {
		return nil // a member of libxdp's chain, or of tc: Unpin says what it thinks of that
	}
	return hook.Wrap("unpin", t.Hook, t.Name(), hook.Because(dispatcher.ErrUsage, "no process holds %q, so it would leave with its pins", string(ref)).
		Hint("\"%s\" takes it off", kernel.Command(t.NetNS, a.bpffs, nil, "detach", string(t.Hook), t.Name(), string(ref))))
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
			if verb == "unpin" { // before this command holds it too
				if err := a.held(cmd.Context(), t, hook.Ref(args[0])); err != nil {
					return err
				}
			}
			link, err := dispatcher.Open(cmd.Context(), t, hook.Ref(args[0]), a.readOptions())
			if err != nil {
				return err
			}
			defer link.Close()
			return do(cmd.Context(), link)
		}),
	}
}
