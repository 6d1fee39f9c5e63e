package chains

import (
	"errors"
	"io/fs"
	"maps"
	"reflect"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// A revision is a chain as it shall be. The caller swaps in the dispatcher, which is nil when
// nothing changed, and closes it.
type revision struct {
	chain      *state.Chain
	dispatcher *state.Dispatcher
	granted    []*state.Ask
}

// revise applies edit to a copy of the chain old, then grants the asks, and builds the new
// dispatcher. revise leaves out members that have lost their owners, except closed doors;
// edit gets the closed doors that are empty, and may add the slots in own, which this process
// has open. A chain that has lost its last member is closed.
//
// revise closes the slots before it returns. While they are open no member leaves when
// its owner dies, and many processes that change one chain could keep it open in turn.
func revise(r root, old *state.Chain, own map[uint32]*ebpf.Map, asks []*state.Ask, edit func(c *state.Chain, empty map[uint32]bool) error) (*revision, error) {
	opened := slotsOf(r, old)
	defer opened.Close()
	next := *old
	next.RootLink, next.Slots = 0, nil
	if r != nil {
		next.RootLink = r.LinkID()
	}
	open := map[uint32]*ebpf.Map{}
	maps.Copy(open, own)
	empty := map[uint32]bool{}
	for _, s := range old.Slots {
		m := open[s.MapID]
		if m == nil {
			var err error
			if m, err = opened.Open(s.MapID, false); err != nil {
				return nil, kernel.Again(err)
			}
			open[s.MapID] = m
		}
		prog, err := state.Occupant(m)
		if err != nil {
			return nil, err
		}
		if prog == 0 {
			if s.OnMissing == hook.MissingContinue {
				continue
			}
			empty[s.MapID] = true
		}
		next.Slots = append(next.Slots, s)
	}
	if err := edit(&next, empty); err != nil {
		return nil, err
	}
	granted := grant(&next, asks, open, &opened, empty)
	next.Closed = len(next.Slots) == 0
	slots := inOrder(&next, open)
	codes := sealedCodes(&next, slots)
	if reflect.DeepEqual(old.Slots, next.Slots) && !next.Closed {
		return &revision{chain: &next}, nil
	}

	prog, err := state.Build(&next, slots, codes)
	if err != nil && codes != nil {
		// Sealed members must not keep another one from joining.
		for i := range next.Slots {
			next.Slots[i].Sealed = dispatch.Sealed{}
		}
		prog, err = state.Build(&next, slots, nil)
	}
	if err != nil && len(asks) > 0 { // it may be for what others ask
		return revise(r, old, own, nil, edit)
	}
	return &revision{&next, prog, granted}, err
}

// inOrder returns the open slots, which are given by their ids, in the order of the chain.
func inOrder(c *state.Chain, open map[uint32]*ebpf.Map) []*ebpf.Map {
	slots := make([]*ebpf.Map, len(c.Slots))
	for i, s := range c.Slots {
		slots[i] = open[s.MapID]
	}
	return slots
}

// change revises the chain that the root carries, swaps the result in, and returns the
// new chain. If the new chain is closed, change has taken it off the device. With l, which
// may be nil, it also grants what others ask who wait for the lock.
func change(r root, chainID uint64, own map[uint32]*ebpf.Map, l *state.Locked, edit func(c *state.Chain, empty map[uint32]bool) error) (*state.Chain, error) {
	old, chain, err := carried(r, chainID)
	if err != nil {
		return nil, err
	}
	defer old.Close()
	return changeFrom(r, old, chain, own, l, edit)
}

// changeFrom is change for a chain that was read before; old is its dispatcher.
func changeFrom(r root, old *ebpf.Program, chain *state.Chain, own map[uint32]*ebpf.Map, l *state.Locked, edit func(c *state.Chain, empty map[uint32]bool) error) (*state.Chain, error) {
	rev, err := revise(r, chain, own, l.Asks(chain.ID), edit)
	if err != nil {
		return nil, err
	}
	next, d := rev.chain, rev.dispatcher
	if d == nil {
		return next, nil
	}
	defer d.Close()
	if err := swapIn(r, "swap", d, old); err != nil {
		return nil, err
	}
	know(r, d, next)
	for _, a := range rev.granted {
		l.Granted(a)
	}
	if next.Closed {
		// No member can join a closed chain, so this throws none out.
		if err := r.Release(d.Program); err != nil {
			return nil, err
		}
		kernel.Step("release: after")
	}
	return next, nil
}

// carried returns the dispatcher and the chain that a root carries; the caller closes
// the dispatcher. The chain must have the id: where netlink carries the chain, any
// process may have put another program in its place. The error is fs.ErrNotExist then,
// and target.ErrDetached for a closed chain.
func carried(r root, chainID uint64) (*ebpf.Program, *state.Chain, error) {
	prog, err := r.Program()
	if err != nil {
		return nil, nil, err
	}
	chain, err := find(r, prog)
	switch {
	case errors.Is(err, state.ErrNotOurs), err == nil && chain.ID != chainID:
		err = hook.Because(fs.ErrNotExist, "the chain is gone: another program was put in its place")
	case errors.Is(err, fs.ErrNotExist):
		err = kernel.Again(err)
	case err == nil && chain.Closed:
		err = target.ErrDetached
	}
	if err != nil {
		prog.Close()
		return nil, nil, err
	}
	return prog, chain, nil
}

func openPinnedRoot(p *state.Pins, folder string) (*linkRoot, error) {
	l, err := kernel.LoadPinnedLink(p.RootPath(folder))
	if err != nil {
		return nil, err
	}
	return newLinkRoot(l, p)
}

// indexOf returns the index of the member with the slot. The error is
// target.ErrDetached when the member is gone.
func indexOf(c *state.Chain, mapID uint32) (int, error) {
	i := c.Index(mapID)
	if i < 0 {
		return i, target.ErrDetached
	}
	return i, nil
}

// without returns an edit that takes the members out.
func without(leaving ...dispatch.Slot) func(*state.Chain, map[uint32]bool) error {
	return func(c *state.Chain, _ map[uint32]bool) error {
		c.Slots = slices.DeleteFunc(c.Slots, func(s dispatch.Slot) bool {
			return slices.ContainsFunc(leaving, func(l dispatch.Slot) bool { return l.MapID == s.MapID })
		})
		return nil
	}
}
