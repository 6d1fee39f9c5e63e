package main

import (
	"cmp"
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
		Short:   "Show what is attached, in run order",
		Long: `Show what is attached to network hooks, in run order, whichever tool attached
it: on the whole machine, in all network namespaces (-n chooses one), on one
HOOK, or on one device or cgroup.

FAMILY is several hooks at once: xdp, tcx, tc, cgroup or netkit. Some hooks can
only be shown: tc/qdisc, netkit/primary, netkit/peer, netfilter, flow_dissector,
sk_lookup and lsm_cgroup.

The column STATE says of a member
  running    packets go through its program
  sealed     running, as a part of the dispatcher; see "seal"
  empty      its owner is gone; the column MISSING says what happens to packets
  displaced  another process put its own program into the chain's link
  bypassed   freplace put another program in its place; the last lines say which
  defunct    its device or cgroup is gone, or its link was detached; "recover" cleans up
and of other entries
  overridden with --effective: the program of a cgroup above, which does not run here,
             since the cgroup has programs of its own
  legacy     it has no link: anyone may replace it, and "adopt" makes it a member
  foreign    a link of another tool holds it
  libxdp     it is in a chain that xdp-loader and others that use libxdp share, and
             that anyone may replace; attach, set, replace and detach work on it, and
             "convert" moves it to an owned chain

While a member on tcx moves, two stand-ins run its program: ld_first and
ld_second.

--effective shows what runs for a cgroup: its own programs and those of the
cgroups above it, which are named in the column FROM, and then the same for each
cgroup below that has programs of its own.`,
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
			var held [][]hook.Held
			if holders || a.format == formatWide {
				var heldErr error
				held, heldErr = dispatcher.HoldersIn(cmd.Context(), chains, dispatcher.HoldersOptions{})
				err = join(err, heldErr)
			}
			// Chains that could be read are shown, even if others could not be
			// read.
			return join(a.printChains(chains, held, false), err)
		},
	}
	flags := cmd.Flags()
	flags.BoolVar(&effective, "effective", false, "show all programs that run for the cgroup TARGET, those of the cgroups above it too, and the same for the cgroups below")
	flags.BoolVar(&holders, "holders", false, "also show the holders of each entry, as \"holders\" does; so does -o wide")
	flags.BoolVar(&kinds.ours, "ours", false, "only members")
	flags.BoolVar(&kinds.foreign, "foreign", false, "show only programs that links of other tools attach; several of these flags can be combined")
	flags.BoolVar(&kinds.legacy, "legacy", false, "show only programs without a link")
	flags.BoolVar(&kinds.libxdp, "libxdp", false, "show only members of libxdp chains")
	return cmd
}

// kindFlags choose entries by their kind. Without a flag all entries are shown.
type kindFlags struct{ ours, foreign, legacy, libxdp bool }

// filter leaves out the entries that were not chosen, and chains without any.
func (k kindFlags) filter(chains []hook.Chain) []hook.Chain {
	if k == (kindFlags{}) {
		return chains
	}
	chosen := map[hook.Kind]bool{hook.KindMember: k.ours, hook.KindForeign: k.foreign, hook.KindLegacy: k.legacy, hook.KindLibxdp: k.libxdp}
	var left []hook.Chain
	for _, c := range chains {
		c.Others = nil
		c.Members = slices.DeleteFunc(c.Members, func(m hook.Member) bool { return !chosen[m.Kind] })
		if len(c.Members) > 0 || c.Err != nil {
			left = append(left, c)
		}
	}
	return left
}

// listed returns the hooks that can be listed.
func listed() []hook.Hook { return append(hook.Hooks(), hook.Shown()...) }

func isShown(h hook.Hook) bool { return slices.Contains(hook.Shown(), h) }

// listedWords returns the names of these hooks and of their families.
func listedWords() []string {
	words := wordsOf(listed())
	for _, h := range listed() {
		if f := h.Family(); !slices.Contains(words, f) {
			words = append(words, f)
		}
	}
	return words
}

// parseHooks parses the name of a hook or of a family.
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

// parseHooks is the function parseHooks, and refuses --netns for hooks of cgroups.
func (a *app) parseHooks(name string) ([]hook.Hook, error) {
	hooks, err := parseHooks(name)
	if err == nil && hooks[0].OnCgroup() && a.netns != "" {
		err = usage("leave -n out", "a cgroup is in no network namespace")
	}
	return hooks, err
}

// chains reads the hooks that args name.
func (a *app) chains(ctx context.Context, args []string, effective bool) ([]hook.Chain, error) {
	var hooks []hook.Hook // nil: all
	if len(args) > 0 {
		var err error
		if hooks, err = a.parseHooks(args[0]); err != nil {
			return nil, err
		}
	}
	switch {
	case effective && (len(args) < 2 || !hooks[0].OnCgroup()):
		return nil, usage("", `--effective needs a cgroup, as in "dispatcher list cgroup /system.slice --effective"`)
	case len(args) < 2:
		return dispatcher.List(ctx, dispatcher.ListOptions{NetNS: a.netns, Hooks: hooks, BPFFS: a.bpffs})
	case effective:
		if hooks = slices.DeleteFunc(hooks, isShown); len(hooks) == 0 {
			return nil, usage("", "%s is shown for the cgroups that it is attached to, not for the cgroups below them", args[0])
		}
		return a.effective(ctx, hooks, args[1])
	case len(hooks) > 1 || isShown(hooks[0]):
		return a.listOn(ctx, hooks, args[1])
	}
	c, err := dispatcher.Read(ctx, dispatcher.On(hooks[0], args[1]).In(a.netns), a.readOptions())
	if err != nil {
		return nil, err
	}
	return []hook.Chain{*c}, nil
}

// effective reads what runs for a cgroup. Of more than one hook it leaves out hooks
// without programs, and hooks that this kernel does not have.
func (a *app) effective(ctx context.Context, hooks []hook.Hook, cgroup string) (chains []hook.Chain, err error) {
	several := len(hooks) > 1
	for _, h := range hooks {
		found, err := dispatcher.Effective(ctx, dispatcher.On(h, cgroup), a.readOptions())
		switch {
		case several && errors.Is(err, ebpf.ErrNotSupported):
			continue
		case err != nil:
			return nil, err
		case several:
			found = slices.DeleteFunc(found, func(c hook.Chain) bool { return len(c.Members) == 0 })
		}
		chains = append(chains, found...)
	}
	return chains, nil
}

// ownNetNS names the namespace of this process where no name means all namespaces.
const ownNetNS = "/proc/self/ns/net"

// listOn lists what is attached to several hooks of one target, or to one that the
// library can only list.
func (a *app) listOn(ctx context.Context, hooks []hook.Hook, target string) ([]hook.Chain, error) {
	at, err := a.onTarget(ctx, hooks[0], target)
	if err != nil {
		return nil, err
	}
	o := dispatcher.ListOptions{NetNS: a.netns, Hooks: hooks, BPFFS: a.bpffs}
	if !hooks[0].OnCgroup() {
		o.NetNS = cmp.Or(o.NetNS, ownNetNS)
	}
	chains, err := dispatcher.List(ctx, o)
	return slices.DeleteFunc(chains, func(c hook.Chain) bool { return !at.is(c.At()) }), err
}
