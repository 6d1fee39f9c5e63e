package main

import (
	"context"
	"errors"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
)

func (a *app) listCommand() *cobra.Command {
	var (
		effective bool
		holders   bool
		kinds     kindFlags
	)
	cmd := &cobra.Command{
		Use:     "list [HOOK|FAMILY [TARGET]]",
		Aliases: []string{"ls", "show", "status"},
		Short:   "Show what is attached, in the order in which it runs",
		Long: `Show what is attached to the hooks of the network, in the order in which it
runs, whoever attached it: on the whole machine, in all network namespaces (-n
chooses one), or on one HOOK, or on one device or cgroup.

FAMILY is several hooks at once: xdp, tcx, tc, cgroup or netkit. Hooks that
nothing can be attached to here are shown too: tc/qdisc, netkit/primary,
netkit/peer, netfilter, flow_dissector, sk_lookup and lsm_cgroup.

Programs that others attached are "legacy", without a link, so that anyone may
replace them and "adopt" makes them members; "foreign", held by a link of another
tool; or "libxdp", in a chain that xdp-loader and others that use libxdp share,
which anyone may replace: attach, set, replace and detach work on it, and
"convert" moves it over to an owned one. A member of an xdp chain is "empty" when its owner is gone; what
happens to packets then is in the column MISSING.

With --effective it shows what runs for a cgroup: its own programs and those of
the cgroups that it is in, which are in the column FROM; and then the same for
the cgroups below that have programs of their own.`,
		Example: `  dispatcher list
  dispatcher list xdp eth0 -o wide
  dispatcher list tcx --foreign
  dispatcher list cgroup /sys/fs/cgroup/web.slice --effective
  dispatcher -n blue list -j`,
		Args:              words(1, "[HOOK]", "[TARGET]"),
		ValidArgsFunction: completeArgs(1, offerListed, a.offerTargets),
		RunE: func(cmd *cobra.Command, args []string) error {
			chains, err := a.chains(cmd.Context(), withoutDev(args, 1), effective)
			if err != nil && len(chains) == 0 {
				return err
			}
			chains = kinds.filter(chains)
			var held [][]dispatcher.Held
			if holders || a.format == formatWide {
				var heldErr error
				held, heldErr = dispatcher.HoldersIn(cmd.Context(), chains, dispatcher.HoldersOptions{BPFFS: a.bpffs})
				err = errors.Join(err, heldErr)
			}
			// What could be read is shown, whatever is wrong with the rest.
			return errors.Join(a.printList(chains, held), err)
		},
	}
	flags := cmd.Flags()
	flags.BoolVar(&effective, "effective", false, "what runs for the cgroup TARGET, with what it has from those above, and for those below")
	flags.BoolVar(&holders, "holders", false, "show who holds each entry too, as \"holders\" does; so does -o wide")
	flags.BoolVar(&kinds.ours, "ours", false, "only members")
	flags.BoolVar(&kinds.foreign, "foreign", false, "only what links of other tools attach; several of these flags show either")
	flags.BoolVar(&kinds.legacy, "legacy", false, "only what was attached without a link")
	flags.BoolVar(&kinds.libxdp, "libxdp", false, "only what is in chains of libxdp")
	return cmd
}

// kindFlags choose entries by their kind; none of them means all.
type kindFlags struct{ ours, foreign, legacy, libxdp bool }

// filter leaves out the entries that were not chosen, and chains without any.
func (k kindFlags) filter(chains []hook.Chain) []hook.Chain {
	if k == (kindFlags{}) {
		return chains
	}
	chosen := map[hook.Kind]bool{hook.KindMember: k.ours, hook.KindForeign: k.foreign, hook.KindLegacy: k.legacy, hook.KindLibxdp: k.libxdp}
	var left []hook.Chain
	for _, c := range chains {
		c.Members = slices.DeleteFunc(c.Members, func(m hook.Member) bool { return !chosen[m.Kind] })
		if len(c.Members) > 0 || c.Err != nil {
			left = append(left, c)
		}
	}
	return left
}

// listed are the hooks that can be listed.
func listed() []hook.Hook { return append(hook.Hooks(), hook.Shown()...) }

func isShown(h hook.Hook) bool { return slices.Contains(hook.Shown(), h) }

// listedWords are their names and those of their families.
func listedWords() []string {
	words := wordsOf(listed())
	for _, h := range listed() {
		if f := h.Family(); !slices.Contains(words, f) {
			words = append(words, f)
		}
	}
	return words
}

// parseHooks reads the name of a hook or of a family.
func parseHooks(name string) ([]hook.Hook, error) {
	if slices.Contains(listed(), hook.Hook(name)) {
		return []hook.Hook{hook.Hook(name)}, nil
	}
	family := slices.DeleteFunc(listed(), func(h hook.Hook) bool { return h.Family() != name })
	if len(family) == 0 {
		return nil, usage(didYouMean(name, listedWords(), "", hookFirst), "unknown hook %q", name)
	}
	return family, nil
}

// chains reads what is on the hooks that args name.
func (a *app) chains(ctx context.Context, args []string, effective bool) ([]hook.Chain, error) {
	var hooks []hook.Hook // all
	if len(args) > 0 {
		var err error
		if hooks, err = parseHooks(args[0]); err != nil {
			return nil, err
		}
	}
	onCgroup := len(hooks) > 0 && hooks[0].OnCgroup()
	switch {
	case effective && (len(args) < 2 || !onCgroup):
		return nil, usage("", `--effective is about one cgroup, as in "dispatcher list cgroup /system.slice --effective"`)
	case onCgroup && a.netns != "":
		return nil, usage("leave -n out", "a cgroup is in no network namespace")
	case len(args) < 2:
		return dispatcher.List(ctx, dispatcher.ListOptions{NetNS: a.netns, Hooks: hooks, BPFFS: a.bpffs})
	}
	read := readOne
	if effective {
		read = dispatcher.Effective
		if hooks = slices.DeleteFunc(hooks, isShown); len(hooks) == 0 {
			return nil, usage("", "%s is shown for the cgroups that it is attached to, and not for those below", args[0])
		}
	}
	return a.chainsOn(ctx, hooks, args[1], read)
}

func readOne(ctx context.Context, t dispatcher.Target, o dispatcher.ReadOptions) ([]hook.Chain, error) {
	c, err := dispatcher.Read(ctx, t, o)
	if err != nil {
		return nil, err
	}
	return []hook.Chain{*c}, nil
}

// chainsOn reads hooks of one target. Of several, those with nothing attached
// are left out, and those that this kernel does not have.
func (a *app) chainsOn(ctx context.Context, hooks []hook.Hook, target string, read func(context.Context, dispatcher.Target, dispatcher.ReadOptions) ([]hook.Chain, error)) ([]hook.Chain, error) {
	var (
		chains []hook.Chain
		shown  []hook.Hook
	)
	for _, h := range hooks {
		if isShown(h) {
			shown = append(shown, h)
			continue
		}
		found, err := read(ctx, dispatcher.On(h, target).In(a.netns), a.readOptions())
		switch {
		case errors.Is(err, ebpf.ErrNotSupported) && len(hooks) > 1:
			continue
		case err != nil:
			return nil, err
		}
		if len(hooks) > 1 {
			found = slices.DeleteFunc(found, func(c hook.Chain) bool { return len(c.Members) == 0 })
		}
		chains = append(chains, found...)
	}
	if len(shown) == 0 {
		return chains, nil
	}
	more, err := a.shownOn(ctx, shown, target)
	return append(chains, more...), err
}

// shownOn reads hooks of one target that the library only lists.
func (a *app) shownOn(ctx context.Context, hooks []hook.Hook, target string) ([]hook.Chain, error) {
	o := dispatcher.ListOptions{NetNS: a.netns, Hooks: hooks, BPFFS: a.bpffs}
	known := hook.XDP
	switch h := hooks[0]; {
	case h.OnNetNS():
		return nil, usage("-n chooses one", "%s is on a whole network namespace, and has no other target", h)
	case h.OnCgroup():
		known = hook.CgroupSKBIngress
	case o.NetNS == "":
		o.NetNS = "/proc/self/ns/net" // empty would be all
	}
	// A hook that every device, or cgroup, has tells which one is meant.
	at, err := dispatcher.Read(ctx, dispatcher.On(known, target).In(a.netns), a.readOptions())
	if err != nil {
		return nil, err
	}
	chains, err := dispatcher.List(ctx, o)
	return slices.DeleteFunc(chains, func(c hook.Chain) bool {
		return c.Ifindex != at.Ifindex || c.CgroupID != at.CgroupID
	}), err
}
