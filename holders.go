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

// Holders is what keeps a link, a program or a map alive: processes that have it
// open, pins, and objects in the kernel that refer to it. It says how complete it
// is: Found of the Counted references of the kernel.
type Holders = holders.Holders

// The parts of [Holders].
type (
	// HolderKind is what a [HolderRef] names.
	HolderKind = holders.Kind
	// HolderRef names a link, a program or a map.
	HolderRef = holders.Ref
	// HolderProcess has the object open.
	HolderProcess = holders.Process
	// HolderPin is a file in a bpffs, wherever that is mounted.
	HolderPin = holders.Pin
	// HolderObject is in the kernel and refers to the object.
	HolderObject = holders.Object
)

// HolderKinds of [HolderRef].
const (
	HolderLink    = holders.Link
	HolderProgram = holders.Program
	HolderMap     = holders.Map
)

// A Held is something that keeps a member, or a hook, as it is.
type Held struct {
	// What: "link" attaches the entry, or carries an XDP chain; "slot" owns a
	// member of an XDP chain; "program" runs without a link.
	What   string
	Member string // "" for the link of a chain
	Kind   hook.Kind
	Holders
}

// HoldersOptions say how to look. The zero value is useful.
type HoldersOptions struct {
	// BPFFS is as in ReadOptions.
	BPFFS string
	// NoIterators looks in /proc only. BPF iterators are faster, and only with
	// them it is known whether the answer is complete; where the kernel has none
	// /proc is used anyway.
	NoIterators bool
}

func (o HoldersOptions) finder() *holders.Finder {
	return holders.Open(holders.Options{NoIterators: o.NoIterators})
}

// HoldersOf tells what keeps an object alive, this process not counted: all
// processes of the machine, in whatever pid, mount and network namespace, and all
// pins in any bpffs.
//
// Errors: fs.ErrNotExist when there is no such object.
func HoldersOf(ctx context.Context, ref HolderRef, o HoldersOptions) (*Holders, error) {
	f := o.finder()
	defer f.Close()
	view, err := f.Look(ref.Kind)
	if err != nil {
		return nil, wrap("holders", Target{}, err)
	}
	h, err := view.Of(ref)
	return h, wrap("holders", Target{Device: ref.String()}, err)
}

// HoldersOn tells what keeps the entries of a hook as they are: of one entry, by
// its name or as in [Detach], or of all for an empty member. On XDP it begins
// with the link that carries the chain.
//
// Errors: as for [Read], and fs.ErrNotExist when there is no such entry.
func HoldersOn(ctx context.Context, t Target, member string, o HoldersOptions) ([]Held, error) {
	c, err := Read(ctx, t, ReadOptions{BPFFS: o.BPFFS})
	if err != nil {
		return nil, err
	}
	ref := hook.Ref(member)
	if member != "" {
		c.Members = slices.DeleteFunc(c.Members, func(m hook.Member) bool { return !ref.Names(&m) })
		if len(c.Members) == 0 {
			return nil, wrap("holders", t, hook.Because(fs.ErrNotExist, "there is no %q", member))
		}
	}
	held, err := HoldersIn(ctx, []hook.Chain{*c}, o)
	if err != nil {
		return nil, wrap("holders", t, err)
	}
	if member != "" && c.Hook == hook.XDP && c.Ours() {
		return held[0][1:], nil // of the member, not of the chain
	}
	return held[0], nil
}

// HoldersIn is HoldersOn for all that is in a list, with one look: an element for
// each chain.
func HoldersIn(ctx context.Context, chains []hook.Chain, o HoldersOptions) ([][]Held, error) {
	f := o.finder()
	defer f.Close()
	view, err := f.Look()
	if err != nil {
		return nil, err
	}
	all := make([][]Held, len(chains))
	for i := range chains {
		for _, held := range toHold(&chains[i]) {
			if held.Kind == hook.KindLegacy {
				view.Add(held.Ref, HolderObject{How: fmt.Sprintf("on %s %s without a link", chains[i].Hook, chains[i].Target), References: 1})
			}
			h, err := view.Of(held.Ref)
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

// toHold lists what there is to hold on a hook.
func toHold(c *hook.Chain) []Held {
	var list []Held
	add := func(what, member string, kind hook.Kind, of holders.Kind, id uint32) {
		if id != 0 { // of an empty slot, or what could not be read
			list = append(list, Held{What: what, Member: member, Kind: kind, Holders: Holders{Ref: HolderRef{Kind: of, ID: id}}})
		}
	}
	if c.Hook == hook.XDP && len(c.Members) > 0 {
		add("link", "", c.Members[0].Kind, holders.Link, c.LinkID)
	}
	for _, m := range c.Members {
		switch {
		case m.SlotID != 0:
			add("slot", m.Name, m.Kind, holders.Map, m.SlotID)
		case m.LinkID != 0:
			add("link", m.Name, m.Kind, holders.Link, m.LinkID)
		case c.LinkID == 0:
			add("program", m.Name, m.Kind, holders.Program, m.Program.ID)
		}
	}
	return list
}

// nameHolders adds who holds it to what is said of an occupant.
func nameHolders(o *hook.Occupant) {
	ref := HolderRef{Kind: holders.Link, ID: o.LinkID}
	if o.LinkID == 0 {
		return // netlink and tc hold it, and they are nobody
	}
	h, err := HoldersOf(context.Background(), ref, HoldersOptions{})
	if err != nil {
		return
	}
	for _, p := range h.Processes {
		o.HeldBy = append(o.HeldBy, fmt.Sprintf("pid %d %s", p.PID, p.Comm))
	}
	for _, p := range h.Pins {
		o.HeldBy = append(o.HeldBy, "pinned at "+p.Path)
	}
}
