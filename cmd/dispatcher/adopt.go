package main

import (
	"context"
	"fmt"

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
		Short: "Make a program that others attached a member",
		Long: `Make a program that others attached without a link a member at the same place.
It is the same program with the same maps. Where there are several, id:PROG says
which one.

On xdp ("ip link set xdp", older programs) it becomes the first member of a
chain, which others can then join. The kernel wants the device to be empty
before a link takes it: the packets of that moment pass unfiltered. With
--no-gap none does, but the chain is then not protected: it has no link, and
anyone may replace it. A second "adopt", without --no-gap, protects it later.

On tcx and cgroups it gets a link, without a gap, but for a program that was
attached to a cgroup for itself alone (bpftool cgroup attach without "multi").

On tc/ingress and tc/egress the first filter becomes a member of tcx/ingress or
tcx/egress, without a gap. Before Linux 6.6 it stays a filter and gets a name.

--link ID is a link of another tool, on xdp, tcx or a cgroup, or a member whose name
is lost: it goes on running, without a gap. On xdp the link gets a chain with its
program as the first member. Whoever made that link and holds it can put a
program back into it.`,
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
			if linkID != 0 {
				return a.adoptLink(cmd, linkID, &member)
			}
			args = withoutDev(args, 1)
			t, err := a.target(args[0], args[1])
			if err != nil {
				return err
			}
			m, err := member.options(a, cmd.Flags())
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
			if o.Persistent {
				if err := a.needBPFFS(); err != nil {
					return err
				}
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
	linkFlag(cmd, &linkID, "make what the link with this `ID` attaches a member")
	return cmd
}

func (a *app) adoptLink(cmd *cobra.Command, id uint32, member *memberFlags) error {
	o, err := member.options(a, cmd.Flags())
	if err != nil {
		return err
	}
	if o.Persistent {
		if err := a.needBPFFS(); err != nil {
			return err
		}
	}
	link, err := dispatcher.AdoptLink(cmd.Context(), id, dispatcher.AdoptLinkOptions{
		Name: o.Name, Priority: o.Priority, ContinueOn: o.ContinueOn, OnMissing: o.OnMissing,
		Persistent: o.Persistent, Owner: o.Owner, BPFFS: o.BPFFS,
	})
	if err != nil {
		return err
	}
	a.warn("whoever made link %d and holds it can put a program back into it; \"dispatcher holders --link %d\" tells who that is", id, id)
	t := dispatcher.Target{}
	if c, err := link.Chain(cmd.Context()); err == nil {
		t = dispatcher.On(c.Hook, c.Target).In(c.NetNS.Name)
	}
	return a.attached(cmd.Context(), t, link, member.hold)
}

// adoptLine is the command to adopt what is on the target.
func adoptLine(t dispatcher.Target) string {
	line := fmt.Sprintf("adopt %s %s", t.Hook, t.Name())
	if t.NetNS != "" {
		line = fmt.Sprintf("-n %s %s", t.NetNS, line)
	}
	return "dispatcher " + line
}

// warnOfGap says what the adoption costs before it is done. When there is
// nothing to adopt, the error to come says so.
func (a *app) warnOfGap(ctx context.Context, t dispatcher.Target, entry hook.Ref) {
	chain, err := dispatcher.Read(ctx, t, a.readOptions())
	if err != nil || len(chain.Members) == 0 {
		return
	}
	if t.Hook == hook.XDP {
		if !chain.Protected() {
			a.warn("packets on %s pass unfiltered for the short moment in which a link takes the device; --no-gap avoids that, and does not protect the chain", t.Name())
		}
		return
	}
	// Such a program has the cgroup for itself.
	m := &chain.Members[0]
	if t.Hook.OnCgroup() && (m.Detail == "exclusive" || m.Detail == "allow-override") && (entry == "" || entry.Names(m)) {
		a.warn("no program runs on %s %s for the short moment in which a link takes its place: %s was attached for itself alone (%s)",
			t.Hook, t.Name(), hook.ProgramRef(m.Program.ID), m.Detail)
	}
}
