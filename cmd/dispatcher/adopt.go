package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

func (a *app) adoptCommand() *cobra.Command {
	var (
		member memberFlags
		noGap  bool
		dryRun bool
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

Whoever attached the program can then neither take it off nor replace it, or
attaches a second copy. What changes is said before it is done, with the way
back; --dry-run says it only.

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
				return alone(cmd, args, noGap || dryRun)
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
			if err := a.needBPFFS(o.Persistent && !dryRun); err != nil {
				return err
			}
			if dryRun {
				plan, err := dispatcher.PlanAdopt(cmd.Context(), t, o)
				if err != nil {
					return err
				}
				return a.printAdoption(plan)
			}
			a.warnOfEffects(cmd.Context(), t, o)
			link, err := dispatcher.Adopt(cmd.Context(), t, o)
			if err != nil {
				return err
			}
			return a.attached(cmd.Context(), t, link, o.Name, member.hold)
		},
	}
	member.add(cmd, "the program's")
	cmd.Flags().BoolVar(&noGap, "no-gap", false, "let no packet pass unfiltered; an xdp chain is then not protected")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "tell what would change for others, and change nothing")
	linkFlag(cmd, &linkID, "turn the program of the link with this `ID` into a member")
	return cmd
}

func (a *app) adoptLink(ctx context.Context, id uint32, o dispatcher.Options) error {
	if err := a.needBPFFS(o.Persistent); err != nil {
		return err
	}
	a.warnOfHolders(ctx, id)
	link, err := dispatcher.AdoptLink(ctx, id, dispatcher.AdoptOptions{
		Name: o.Name, Priority: o.Priority, ContinueOn: o.ContinueOn, OnMissing: o.OnMissing,
		Persistent: o.Persistent, Owner: o.Owner, BPFFS: o.BPFFS,
	})
	if err != nil {
		return err
	}
	t := dispatcher.Target{}
	if c, err := link.Chain(ctx); err == nil {
		t = dispatcher.On(c.Hook, c.Target).In(c.NetNS.Name)
	}
	return a.attached(ctx, t, link, o.Name, !o.Persistent)
}

// warnOfHolders says which processes can undo the adoption of a link before it is done.
func (a *app) warnOfHolders(ctx context.Context, id uint32) {
	h, err := dispatcher.HoldersOf(ctx, hook.HolderRef{Kind: hook.HolderLink, ID: id}, dispatcher.HoldersOptions{})
	if err != nil {
		return
	}
	for _, p := range h.Processes {
		a.warn("pid %d %s (%s) holds link %d: it can put another program into it again, and the member ends only when it lets the link go too", p.PID, p.Comm, p.Exe, id)
	}
	if !h.Verified {
		a.warn("a process that holds link %d can put another program into it again; \"%s\" shows such processes", id,
			kernel.Command("", a.bpffs, kernel.Flags{"--link", fmt.Sprint(id)}, "holders"))
	}
}

// warnOfEffects says what the adoption changes for others before it is done. When it will
// fail it says nothing.
func (a *app) warnOfEffects(ctx context.Context, t dispatcher.Target, o dispatcher.AdoptOptions) {
	plan, err := dispatcher.PlanAdopt(ctx, t, o)
	if err != nil {
		return
	}
	for _, text := range plan.Effects {
		a.warn("%s", text)
	}
	if len(plan.Back) > 0 {
		a.note("the way back: %s", strings.Join(plan.Back, "; "))
	}
}

// printAdoption prints what an adoption would change.
func (a *app) printAdoption(plan *hook.Adoption) error {
	if a.format == formatJSON {
		return a.printJSON(struct {
			Version  int            `json:"version"`
			DryRun   bool           `json:"dry_run"`
			Adoption *hook.Adoption `json:"adoption"`
		}{schema, true, plan})
	}
	var text strings.Builder
	fmt.Fprintf(&text, "program %s (id %d)\n", plan.Program.Name, plan.Program.ID)
	for _, effect := range plan.Effects {
		fmt.Fprintf(&text, "  - %s\n", effect)
	}
	if len(plan.Back) > 0 {
		text.WriteString("the way back:\n")
	}
	for _, line := range plan.Back {
		fmt.Fprintf(&text, "  %s\n", line)
	}
	return a.print(text.String())
}
