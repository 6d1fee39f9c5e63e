package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/mapdata"
)

// attached ends a verb that has attached a member. It tells the user what
// matters about the member, and holds the member until ctx ends if that was
// asked for. name is the name that was asked for, for a member that cannot be read back.
func (a *app) attached(ctx context.Context, t dispatcher.Target, link *dispatcher.Link, name string, hold bool) error {
	defer link.Close()
	chain, err := link.Chain(ctx)
	var member *hook.Member
	if err == nil {
		member, err = link.Info(ctx)
	}
	switch {
	case err == nil:
	case hold && ctx.Err() != nil:
		return nil // Ctrl-C came early
	case hold && !errors.Is(err, dispatcher.ErrPermission):
		return err
	default:
		a.warn("the member is attached, but it cannot be read back: %v", err)
		if hold {
			return a.hold(ctx, t, link, &hook.Member{Name: name})
		}
		return nil
	}
	if chain.Hook != t.Hook { // a filter of tc was adopted
		t.Hook = chain.Hook
		a.note("%q is now a member of %s %s: it has a link, and runs before all filters", member.Name, t.Hook, t.Name())
	}
	if t.Hook == hook.XDP {
		a.tellChained(t, chain, member)
	} else {
		a.tellAttached(t, chain, member)
	}
	a.tellMaps(t, member)
	if hold {
		return a.hold(ctx, t, link, member)
	}
	return nil
}

func (a *app) tellChained(t dispatcher.Target, chain *hook.Chain, member *hook.Member) {
	if a.verbose {
		a.note("attached %q to %s %s: priority %d, number %d of %d, %v mode", member.Name, t.Hook, t.Name(),
			member.Priority, 1+position(chain, member), len(chain.Members), chain.Mode)
	}
	if chain.NativeRefused != "" {
		a.note("in generic mode, which is slower: %s", chain.NativeRefused)
	}
	a.warnTailCalls(t, member)
	if chain.Style == hook.StyleLibxdp {
		a.tellLibxdp(t, chain, member)
	} else {
		a.warnUnprotected(t, chain)
	}
}

// tellMaps tells where the member's maps are, and how to see what is in them.
func (a *app) tellMaps(t dispatcher.Target, member *hook.Member) {
	if !a.verbose || member.Program.ID == 0 {
		return
	}
	maps, err := mapdata.Of(member.Program.ID)
	if err != nil || len(maps) == 0 {
		return
	}
	defer mapdata.Close(maps)
	for _, m := range maps {
		where := "not pinned"
		h, err := dispatcher.HoldersOf(context.Background(), hook.HolderRef{Kind: hook.HolderMap, ID: m.ID}, dispatcher.HoldersOptions{})
		if err == nil && len(h.Pins) > 0 {
			where = "pinned at " + h.Pins[0].String()
		}
		a.note("map %s (id %d): %s", m.Name, m.ID, where)
	}
	a.note("\"%s\" shows what is in them", kernel.Command(t.NetNS, a.bpffs, nil, "map", string(t.Hook), t.Name(), string(member.Ref())))
}

// warnUnprotected warns of an owned chain that no link holds.
func (a *app) warnUnprotected(t dispatcher.Target, chain *hook.Chain) {
	if !chain.Protected() {
		a.warn("the chain on %s %s is not protected: anyone may replace it; \"%s\" protects it", t.Hook, t.Name(),
			kernel.Command(t.NetNS, a.bpffs, nil, "adopt", string(t.Hook), t.Name()))
	}
}

// tellLibxdp tells what membership in a libxdp chain means.
func (a *app) tellLibxdp(t dispatcher.Target, chain *hook.Chain, member *hook.Member) {
	with := "alone so far"
	var others []string
	for i := range chain.Members {
		if m := &chain.Members[i]; m.Program.ID != member.Program.ID {
			others = append(others, m.Name)
		}
	}
	if len(others) > 0 {
		with = "with " + strings.Join(others, ", ")
	}
	a.note("%q is in a libxdp chain on %s (config version %d), %s: the chain is shared with all programs that use libxdp, and not protected: anyone may replace it",
		member.Name, t.Name(), chain.ConfigVersion, with)
}

func (a *app) tellAttached(t dispatcher.Target, chain *hook.Chain, member *hook.Member) {
	if a.verbose {
		a.note("attached %q to %s %s: priority %d", member.Name, t.Hook, t.Name(), member.Priority)
	}
	a.tellPosition(chain, member)
	if member.Filter != nil {
		a.note("the filter is not protected: \"tc filter del\" and others can remove it; on tcx/%s (Linux 6.6) a link owns a member",
			strings.TrimPrefix(string(t.Hook), "tc/"))
	}
}

// tellPosition tells where a member runs among programs that are not members
// and have no priority to compare. XDP has only members.
func (a *app) tellPosition(chain *hook.Chain, member *hook.Member) {
	i := position(chain, member)
	alone := !slices.ContainsFunc(chain.Members, func(m hook.Member) bool { return m.Kind != hook.KindMember })
	if i < 0 || chain.Hook == hook.XDP || alone && !a.verbose {
		return
	}
	var beside []string
	if i > 0 {
		beside = append(beside, "after "+neighbour(&chain.Members[i-1]))
	}
	if i+1 < len(chain.Members) {
		beside = append(beside, "before "+neighbour(&chain.Members[i+1]))
	}
	text := fmt.Sprintf("%q runs as number %d of %d", member.Name, i+1, len(chain.Members))
	if len(beside) > 0 {
		text += ": " + strings.Join(beside, ", ")
	}
	a.note("%s", text)
}

// neighbour names an entry as --before and --after accept it.
func neighbour(m *hook.Member) string {
	if m.Kind == hook.KindMember {
		return strconv.Quote(m.Name)
	}
	text := fmt.Sprintf("%s (%s", m.Ref(), m.Kind)
	if m.Program.Name != "" {
		text += ", program " + m.Program.Name
	}
	return text + ")"
}

// position returns a member's index in run order, or -1.
func position(chain *hook.Chain, member *hook.Member) int {
	return slices.IndexFunc(chain.Members, func(m hook.Member) bool {
		return m.SlotID == member.SlotID && m.LinkID == member.LinkID && m.Kind == member.Kind && m.Name == member.Name
	})
}

// warnHeader warns where packets have no Ethernet header. Built-in programs know that.
func (a *app) warnHeader(chain *hook.Chain, from programSource) {
	if chain.Begins != "" && from.name == "" {
		a.warn("%s has no Ethernet header: packets there begin with %v, and a program that expects an Ethernet header misreads them", chain.Target, chain.Begins)
	}
}

// warnTailCalls warns on XDP, where the chain itself makes tail calls.
func (a *app) warnTailCalls(t dispatcher.Target, member *hook.Member) {
	if !member.TailCalls || t.Hook != hook.XDP {
		return
	}
	a.warn("the program of %q makes tail calls of its own, which count towards the kernel's limit of 33 for a packet", member.Name)
	if a.verbose {
		a.note("the chain needs one tail call for each member; beyond the limit the kernel skips a call, and the caller continues")
	}
}
