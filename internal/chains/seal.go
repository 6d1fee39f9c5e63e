package chains

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// Seal links the code of the chain's members into the dispatcher, and reports on each
// member. A member that cannot be sealed stays in its slot. With dry Seal only reports.
// The error is ErrUsage for another hook than XDP, fs.ErrNotExist for a free device,
// ErrIncompatible for a chain of libxdp, and ErrBusy when the device carries something
// else.
func Seal(ctx context.Context, o *target.Opened, dry bool) (report []hook.Sealing, err error) {
	d := Device{o}
	err = d.onChain(ctx, func(l *state.Locked, snap *Snapshot) (err error) {
		report, err = d.seal(l, snap, dry)
		return err
	})
	return report, err
}

// Unseal undoes Seal: the dispatcher calls all members through their slots again. The
// errors are Seal's.
func Unseal(ctx context.Context, o *target.Opened) error {
	return Device{o}.onChain(ctx, func(_ *state.Locked, snap *Snapshot) error {
		_, err := change(snap.Root, snap.Chain.ID, nil, nil, func(c *state.Chain, _ map[uint32]bool) error {
			for i := range c.Slots {
				c.Slots[i].Sealed = dispatch.Sealed{}
			}
			return nil
		})
		return err
	})
}

// onChain runs fn with the owned chain on the device and the lock held. It tries again
// while fn returns kernel.ErrAgain.
func (d Device) onChain(ctx context.Context, fn func(*state.Locked, *Snapshot) error) error {
	if d.Hook != hook.XDP {
		return hook.Because(hook.ErrUsage, "%s has no dispatcher: the kernel runs its members one after the other; only chains of xdp can be sealed", d.Hook)
	}
	return d.Change(ctx, func(l *state.Locked) error {
		snap, err := d.Read()
		if err != nil {
			return err
		}
		defer snap.Close()
		switch {
		case snap.Free(), snap.Chain != nil && snap.Chain.Closed:
			return hook.Because(fs.ErrNotExist, "nothing is attached")
		case snap.Libxdp:
			return hook.Because(hook.ErrIncompatible, "the chain is one of libxdp's, and cannot be sealed").
				Hint("\"%s\" makes it an owned one", d.Command(kernel.Flags{"--style", "owned"}, "convert", "xdp", d.Name))
		case snap.Chain == nil:
			return d.Occupied(snap)
		}
		return fn(l, snap)
	})
}

func (d Device) seal(l *state.Locked, snap *Snapshot, dry bool) ([]hook.Sealing, error) {
	trial, report, err := d.candidates(l, snap)
	if err != nil {
		return nil, err
	}
	defer trial.opened.Close()
	if err := trial.settle(report); err != nil || dry {
		return report, err
	}
	left, err := change(snap.Root, snap.Chain.ID, nil, nil, func(c *state.Chain, _ map[uint32]bool) error {
		for i := range c.Slots {
			c.Slots[i].Sealed = trial.sealed(c.Slots[i].MapID)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	// If another process replaced a program while the dispatcher was built, the new
	// dispatcher runs the old program.
	for _, s := range left.Slots {
		if want := trial.sealed(s.MapID); want.Program != 0 && (s.Sealed != want || !trial.holds(s.MapID, want.Program)) {
			return nil, kernel.ErrAgain
		}
	}
	return report, nil
}

// A trial finds out which members can be linked together.
type trial struct {
	chain  *state.Chain
	opened state.Slots
	slots  []*ebpf.Map
	codes  []*dispatch.Code
	seals  []dispatch.Sealed
}

// sealed returns the seal for the member with the slot; the zero value for a member
// that cannot be sealed.
func (t *trial) sealed(mapID uint32) dispatch.Sealed {
	if i := t.chain.Index(mapID); i >= 0 && t.codes[i] != nil {
		return t.seals[i]
	}
	return dispatch.Sealed{}
}

// holds reports whether the slot holds the program.
func (t *trial) holds(mapID, prog uint32) bool {
	id, err := state.Occupant(t.slots[t.chain.Index(mapID)])
	return err == nil && id == prog
}

// candidates checks each member by itself. The caller closes the opened slots.
func (d Device) candidates(l *state.Locked, snap *Snapshot) (*trial, []hook.Sealing, error) {
	t := &trial{opened: slotsOf(snap.Root, snap.Chain), chain: snap.Chain, codes: make([]*dispatch.Code, len(snap.Chain.Slots)), seals: make([]dispatch.Sealed, len(snap.Chain.Slots))}
	folder := state.ChainFolder(snap.Root.LinkID(), snap.Chain.ID)
	var report []hook.Sealing
	for i, slot := range snap.Chain.Slots {
		pinned := l != nil && l.Has(folder, slot.Name)
		m, err := t.opened.Open(slot.MapID, pinned)
		if err != nil {
			t.opened.Close()
			return nil, nil, kernel.Again(err)
		}
		t.slots = append(t.slots, m)
		result := hook.Sealing{Member: slot.Name}
		if id, err := state.Occupant(m); err == nil && id == 0 {
			result.Reason = "its slot is empty: its owner is gone"
		} else if !pinned && slot.Persistent {
			result.Reason = fmt.Sprintf("it is not pinned in %s: its pin is in another bpffs, or was removed", d.BPFFS)
		} else if !pinned {
			result.Reason = "it is not pinned: it belongs to a process, and leaves with that"
		} else if t.codes[i], t.seals[i], err = code(m, snap.Chain.Shape); err != nil {
			result.Reason = err.Error()
		}
		result.Sealed = t.codes[i] != nil
		report = append(report, result)
	}
	return t, report, nil
}

// code returns the code of the program in a slot, after a check that the code is the
// program's.
func code(slot *ebpf.Map, shape dispatch.Shape) (*dispatch.Code, dispatch.Sealed, error) {
	var none dispatch.Sealed
	id, err := state.Occupant(slot)
	if err != nil {
		return nil, none, err
	}
	if id == 0 {
		return nil, none, errors.New("its slot is empty")
	}
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
	if err != nil {
		return nil, none, kernel.Errno(fmt.Sprintf("program id %d", id), err)
	}
	defer prog.Close()
	c, hash, err := state.CodeOf(prog)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, none, errors.New("its object code is not at hand: it was loaded elsewhere; replace it with its file")
	case err != nil:
		return nil, none, err
	case c.Refused != "":
		return nil, none, errors.New(c.Refused)
	}
	if err := state.Verify(prog, c, shape); err != nil {
		return nil, none, err
	}
	return c, dispatch.Sealed{Program: id, Frame: uint32(c.Frame), Code: hash}, nil
}

// settle leaves out the members that the verifier refuses together with the others.
func (t *trial) settle(report []hook.Sealing) error {
	settings := make([]hook.Settings, len(t.chain.Slots))
	for i, s := range t.chain.Slots {
		settings[i] = s.Settings
	}
	tryout := func() error { return state.Loads(t.chain.Shape, settings, t.slots, t.codes) }
	if tryout() == nil {
		return nil
	}
	// Add one after the other, to find the refused ones.
	all := t.codes
	t.codes = make([]*dispatch.Code, len(all))
	for i, c := range all {
		if c == nil {
			continue
		}
		t.codes[i] = c
		if err := tryout(); err != nil {
			if errors.Is(err, unix.EPERM) {
				return err
			}
			t.codes[i] = nil
			report[i].Sealed = false
			report[i].Reason = "together with the others: " + load.Refused("libdispatcher", err).Error()
		}
	}
	return nil
}

// sealedCodes returns the codes of the sealed members, nil when there are none. slots
// are the chain's open slots. If a slot has another program now, or the code is no
// longer available, sealedCodes removes the member's seal.
func sealedCodes(c *state.Chain, slots []*ebpf.Map) []*dispatch.Code {
	var codes []*dispatch.Code
	for i := range c.Slots {
		s := &c.Slots[i]
		if s.Sealed.Program == 0 {
			continue
		}
		code := sealedCode(s.Sealed, slots[i])
		if code == nil {
			s.Sealed = dispatch.Sealed{}
			continue
		}
		if codes == nil {
			codes = make([]*dispatch.Code, len(c.Slots))
		}
		codes[i] = code
	}
	return codes
}

func sealedCode(s dispatch.Sealed, slot *ebpf.Map) *dispatch.Code {
	if id, err := state.Occupant(slot); err != nil || id != s.Program {
		return nil
	}
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(s.Program))
	if err != nil {
		return nil
	}
	defer prog.Close()
	code, hash, err := state.CodeOf(prog)
	if err != nil || hash != s.Code || code.Refused != "" {
		return nil
	}
	code.Frame = int(s.Frame)
	return code
}

// sealAgain seals the member with the program that is in the slot now. If that program
// cannot be linked, the member stays unsealed. If was is false, the member was not
// sealed before: sealAgain then only makes sure that no other program is linked, since
// another process may have sealed the chain just before the slot was filled.
func (h *handle) sealAgain(was bool) error {
	for {
		c, i, err := h.find()
		if err != nil {
			return err
		}
		id, err := state.Occupant(h.slot)
		if err != nil {
			return err
		}
		if now := c.Slots[i].Sealed.Program; now == id || now == 0 && !was {
			return nil
		}
		_, seal, err := code(h.slot, c.Shape)
		if err != nil {
			seal = dispatch.Sealed{}
		}
		if err := h.edit(func(c *state.Chain, i int) error { c.Slots[i].Sealed = seal; return nil }); err != nil {
			return err
		}
		// A process that filled the slot while this dispatcher was built may have read
		// the chain before the swap: check again.
		was = false
	}
}
