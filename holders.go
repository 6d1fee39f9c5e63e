package dispatcher

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/holders"
)

// HoldersOptions say how to look. The zero value is useful.
type HoldersOptions struct {
	// NoIterators looks in /proc only. BPF iterators are faster, and only they can
	// tell whether the answer is complete. A kernel without them is read through
	// /proc anyway.
	NoIterators bool
}

// HoldersOnOptions say how to look at one hook. The zero value is useful.
type HoldersOnOptions struct {
	// NoIterators is as in [HoldersOptions], and BPFFS as in [ReadOptions].
	NoIterators bool
	BPFFS       string
}

// HoldersOf tells what keeps an object alive: all other processes of the machine, in any
// pid, mount and network namespace, and all pins in any bpffs.
//
// Errors: fs.ErrNotExist when there is no such object.
func HoldersOf(ctx context.Context, ref hook.HolderRef, o HoldersOptions) (*hook.Holders, error) {
	h, err := holdersOf(ctx, ref, o)
	return h, wrap("holders", Target{Device: ref.String()}, err)
}

func holdersOf(ctx context.Context, ref hook.HolderRef, o HoldersOptions) (*hook.Holders, error) {
	f := holders.Open(holders.Options{NoIterators: o.NoIterators})
	defer f.Close()
	view, err := f.Look(ref.Kind)
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return view.Of(ref)
}

// HoldersOn tells what keeps the entries of a hook as they are: the entry that ref
// names as in [Detach], or all of them for an empty ref. On XDP it begins with the
// link that carries the chain, and on tc it ends with the programs in the actions of
// filters.
//
// Errors: as for [Read], and fs.ErrNotExist when there is no such entry.
func HoldersOn(ctx context.Context, t Target, ref hook.Ref, o HoldersOnOptions) ([]hook.Held, error) {
	c, err := Read(ctx, t, ReadOptions{BPFFS: o.BPFFS})
	if err != nil {
		return nil, err
	}
	if ref != "" {
		c.Members = slices.DeleteFunc(c.Members, func(m hook.Member) bool { return !ref.Names(&m) })
		c.Others = nil
		if len(c.Members) == 0 {
			return nil, wrap("holders", t, hook.Because(fs.ErrNotExist, "there is no %q", string(ref)))
		}
	}
	all, err := heldIn(ctx, []hook.Chain{*c}, HoldersOptions{NoIterators: o.NoIterators})
	if err != nil {
		return nil, wrap("holders", t, err)
	}
	held := all[0]
	if ref != "" && c.Hook == hook.XDP && c.Ours() {
		held = slices.DeleteFunc(held, func(h hook.Held) bool { return h.Member == "" }) // the chain's own
	}
	return held, nil
}

// HoldersIn does what [HoldersOn] does for each chain of a list, with one look. The
// result has one element for each chain.
func HoldersIn(ctx context.Context, chains []hook.Chain, o HoldersOptions) ([][]hook.Held, error) {
	held, err := heldIn(ctx, chains, o)
	return held, wrap("holders", Target{}, err)
}

func heldIn(ctx context.Context, chains []hook.Chain, o HoldersOptions) ([][]hook.Held, error) {
	f := holders.Open(holders.Options{NoIterators: o.NoIterators})
	defer f.Close()
	view, err := f.Look()
	if err != nil {
		return nil, err
	}
	all := make([][]hook.Held, len(chains))
	for i := range chains {
		entries := toHold(&chains[i])
		for j, held := range append(entries, inActions(&chains[i])...) {
			if held.Kind == hook.KindLegacy && j < len(entries) { // the view has the actions
				view.Add(held.HolderRef, hook.HolderObject{How: fmt.Sprintf("on %s %s without a link", chains[i].Hook, chains[i].Target), References: 1})
			}
			h, err := view.Of(held.HolderRef)
			if errors.Is(err, fs.ErrNotExist) {
				continue // gone meanwhile
			}
			if err != nil {
				return nil, err
			}
			held.Holders = *h
			all[i] = append(all[i], held)
		}
	}
	return all, ctx.Err()
}

// toHold lists the objects on a hook that can have holders.
func toHold(c *hook.Chain) []hook.Held {
	var list []hook.Held
	add := func(what, member string, kind hook.Kind, of hook.HolderKind, id uint32) {
		if id != 0 { // of an empty slot, or what could not be read
			list = append(list, hook.Held{What: what, Member: member, Kind: kind, Holders: hook.Holders{HolderRef: hook.HolderRef{Kind: of, ID: id}}})
		}
	}
	if c.Hook == hook.XDP && len(c.Members) > 0 {
		add("link", "", c.Members[0].Kind, hook.HolderLink, c.LinkID)
	}
	for _, m := range c.Members {
		switch {
		case m.SlotID != 0:
			add("slot", m.Name, m.Kind, hook.HolderMap, m.SlotID)
		case m.LinkID != 0:
			add("link", m.Name, m.Kind, hook.HolderLink, m.LinkID)
		case c.LinkID == 0:
			add("program", m.Name, m.Kind, hook.HolderProgram, m.Program.ID)
		}
	}
	return list
}

// inActions lists the programs in the actions of a hook's filters, each once.
func inActions(c *hook.Chain) []hook.Held {
	var list []hook.Held
	add := func(actions []hook.Action) {
		for _, a := range actions {
			ref := hook.HolderRef{Kind: hook.HolderProgram, ID: a.Program.ID}
			if ref.ID != 0 && !slices.ContainsFunc(list, func(h hook.Held) bool { return h.HolderRef == ref }) {
				list = append(list, hook.Held{What: "program", Member: a.Program.Name, Kind: hook.KindLegacy, Holders: hook.Holders{HolderRef: ref}})
			}
		}
	}
	for _, m := range c.Members {
		add(m.Actions)
	}
	for _, f := range c.Others {
		add(f.Actions)
	}
	return list
}

// nameHolders adds the holders to an occupant.
func nameHolders(o *hook.Occupant) {
	ref := hook.HolderRef{Kind: hook.HolderLink, ID: o.LinkID}
	if o.LinkID == 0 {
		return // attached by netlink or tc, so no process holds it
	}
	h, err := holdersOf(context.Background(), ref, HoldersOptions{})
	if err != nil {
		return
	}
	for _, p := range h.Processes {
		o.HeldBy = append(o.HeldBy, fmt.Sprintf("pid %d %s", p.PID, p.Comm))
	}
	for _, p := range h.Pins {
		o.HeldBy = append(o.HeldBy, "pinned at "+p.String())
	}
}
