package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
)

func (a *app) adoptCommand() *cobra.Command {
	var (
		member memberFlags
		noGap  bool
		linkID uint32
	)
	cmd := &cobra.Command{
		Use:   "adopt {HOOK TARGET [id:PROG] | --link ID}",
		Short: "Turn a program of another tool into a member",
		Long: `Turn a program that another tool attached without a link into a member, at the
same position. It stays the same program with the same maps. If there are
several such programs, id:PROG chooses one.

On xdp ("ip link set xdp", older programs) the program becomes the first member
of a chain, which other programs can then join. The kernel accepts a link only
on an empty device, so packets pass unfiltered for a short moment. With --no-gap
no packet does, but the chain then has no link: it is not protected, and anyone
may replace it. A second "adopt", without --no-gap, protects it later.

On tcx and cgroups the program gets a link. There is no gap, unless the program
was attached to a cgroup without "multi" (bpftool cgroup attach).

On tc/ingress and tc/egress the first filter becomes a member of tcx/ingress or
tcx/egress, without a gap. Before Linux 6.6 it stays a filter and gets a name.

--link ID adopts the program of a link that another tool made, on xdp, tcx or a
cgroup, or a member whose name is lost. The program continues to run, without a
gap. On xdp the link gets a chain with the program as its first member. A
process that holds the link can put another program into it again.`,
		Example: `  dispatcher adopt xdp eth0 --name filter
  dispatcher adopt xdp eth0 --no-gap
  dispatcher adopt tc/ingress eth0 --name filter
  dispatcher adopt cgroup/connect4 /sys/fs/cgroup/web.slice id:41 --name proxy
  dispatcher adopt --link 12 --name filter`,
		Args: func(cmd *cobra.Command, args []string) error {
			if linkID != 0 {
				return alone(cmd, args, noGap)
			}
			return words(1, "HOOK", "TARGET", "[id:PROG]")(cmd, args)
		},
		ValidArgsFunction: completeArgs(1, offerHooks, a.offerTargets, a.offerLegacy),
		RunE: func(cmd *cobra.Command, args []string) error {
			m, err := member.options(a, cmd.Flags())
			if err != nil {
				return err
			}
			if linkID != 0 {
				return a.adoptLink(cmd.Context(), linkID, m)
			}
			args = withoutDev(args, 1)
			t, err := a.target(args[0], args[1])
			if err != nil {
				return err
			}
			o := dispatcher.AdoptOptions{
				Name: m.Name, Priority: m.Priority, ContinueOn: m.ContinueOn, OnMissing: m.OnMissing,
				Persistent: m.Persistent, Owner: m.Owner, BPFFS: m.BPFFS, NoGap: noGap,
			}
			if len(args) > 2 {
				o.Entry = hook.Ref(args[2])
			}
			if err := a.needBPFFS(o.Persistent); err != nil {
				return err
			}
			if !noGap {
				a.warnOfGap(cmd.Context(), t, o.Entry)
			}
			link, err := dispatcher.Adopt(cmd.Context(), t, o)
			if err != nil {
				return err
			}
			return a.attached(cmd.Context(), t, link, member.hold)
		},
	}
	member.add(cmd, "the program's")
	cmd.Flags().BoolVar(&noGap, "no-gap", false, "let no packet pass unfiltered; an xdp chain is then not protected")
	linkFlag(cmd, &linkID, "turn the program of the link with this `ID` into a member")
	return cmd
}

func (a *app) adoptLink(ctx context.Context, id uint32, o dispatcher.Options) error {
	if err := a.needBPFFS(o.Persistent); err != nil {
		return err
	}
	link, err := dispatcher.AdoptLink(ctx, id, dispatcher.AdoptOptions{
		Name: o.Name, Priority: o.Priority, ContinueOn: o.ContinueOn, OnMissing: o.OnMissing,
		Persistent: o.Persistent, Owner: o.Owner, BPFFS: o.BPFFS,
	})
	if err != nil {
		return err
	}
	a.warn("a process that holds link %d can put another program into it again; \"dispatcher holders --link %d\" shows such processes", id, id)
	t := dispatcher.Target{}
	if c, err := link.Chain(ctx); err == nil {
		t = dispatcher.On(c.Hook, c.Target).In(c.NetNS.Name)
	}
	return a.attached(ctx, t, link, !o.Persistent)
}

// warnOfGap says what the adoption costs before it is done. When there is
// nothing to adopt it says nothing, because the adoption will fail.
func (a *app) warnOfGap(ctx context.Context, t dispatcher.Target, entry hook.Ref) {
	chain, err := dispatcher.Read(ctx, t, a.readOptions())
	if err != nil || len(chain.Members) == 0 {
		return
	}
	if t.Hook == hook.XDP {
		if !chain.Protected() {
			a.warn("packets on %s pass unfiltered for a short moment, before a link holds the device; --no-gap avoids that, but does not protect the chain", t.Name())
		}
		return
	}
	// Such a program is alone on the cgroup.
	m := &chain.Members[0]
	if t.Hook.OnCgroup() && (m.Detail == "exclusive" || m.Detail == "allow-override") && (entry == "" || entry.Names(m)) {
		a.warn("no program runs on %s %s for the short moment in which a link replaces %s, which was attached without \"multi\" (%s)",
			t.Hook, t.Name(), hook.ProgramRef(m.Program.ID), m.Detail)
	}
}
