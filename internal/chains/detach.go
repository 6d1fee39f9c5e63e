package chains

import (
	"context"
	"errors"
	"io/fs"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// Detach takes out the member that ref names, or all members for an empty ref, and
// removes their pins. The error is fs.ErrNotExist when there is no such member,
// ErrStyle for a chain of libxdp, and ErrBusy when the device carries something else.
func (Family) Detach(ctx context.Context, o *target.Opened, ref hook.Ref, _ bool) error {
	d := Device{o}
	return d.Locked(ctx, func(l *state.Locked) error {
		snap, err := d.Read()
		if err != nil {
			return err
		}
		defer snap.Close()
		switch {
		case snap.Free():
			return hook.Because(fs.ErrNotExist, "nothing is attached")
		case snap.Chain == nil:
			return d.taken(snap)
		case snap.Chain.Closed:
			// The process that detached the last member died before the end.
			return snap.Root.Release(snap.Prog)
		}
		leaving := snap.Chain.Slots
		if ref != "" {
			i := snap.Chain.Named(string(ref))
			if i < 0 {
				return noMember(snap.Chain.NoMember(ref))
			}
			leaving = leaving[i : i+1]
		}
		return takeOut(l, snap.Root, snap.Chain.ID, nil, leaving)
	})
}

// takeOut removes members from a chain, and then their pins. own are slots that this process
// has open.
func takeOut(l *state.Locked, r root, chainID uint64, own map[uint32]*ebpf.Map, leaving []dispatch.Slot) error {
	left, err := change(r, chainID, own, l, without(leaving...))
	if errors.Is(err, rtnl.ErrUpper) {
		left, err = new(state.Chain), emptySlots(r, leaving, err)
	}
	if err != nil || l == nil {
		return err
	}
	folder := state.ChainFolder(r.LinkID(), chainID)
	if left.Closed {
		err = l.DropChain(folder)
	} else {
		for _, s := range leaving {
			err = kernel.Join(err, l.Remove(folder, s.Name))
		}
	}
	if err != nil {
		return hook.Because(hook.ErrPins, "the member is detached, but its pins are left: %w", err).
			Hint("make the bpffs writable: the next change of a chain there removes them")
	}
	return nil
}

// emptySlots takes members out of a chain that cannot be changed for the given reason. The
// dispatcher stays, and skips their slots. It returns the reason where that is not so.
func emptySlots(r root, leaving []dispatch.Slot, reason error) error {
	for _, s := range leaving {
		if s.OnMissing != hook.MissingContinue || s.Sealed.Program != 0 {
			return reason
		}
	}
	opened := slotsOf(r, &state.Chain{Plan: dispatch.Plan{Slots: leaving}})
	defer opened.Close()
	for _, s := range leaving {
		slot, err := opened.Open(s.MapID, false)
		if err != nil {
			return kernel.Again(err)
		}
		if err := slot.Delete(uint32(0)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return kernel.Errno("empty the slot", err)
		}
	}
	return nil
}
