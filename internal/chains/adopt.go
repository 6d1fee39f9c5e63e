package chains

import (
	"context"
	"fmt"
	"io/fs"
	"math/rand/v2"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// Adopt makes the program that netlink attached the first member of a chain. With
// NoGap the chain takes the program's place in one step, and netlink carries the
// chain. Otherwise the chain gets a root link; for that the kernel wants the device to
// be empty first. For a chain that netlink carries, Adopt without NoGap makes the root
// link. The caller closes the handle. The error is fs.ErrNotExist when there is no such
// program, ErrBusy for a link or a chain of libxdp, and fs.ErrExist for a chain that
// has its root link already.
func (Family) Adopt(ctx context.Context, o *target.Opened, req target.AdoptRequest) (target.Handle, error) {
	d := Device{o}
	var h *handle
	err := kernel.Retry(ctx, func() error {
		return d.Locked(ctx, func(l *state.Locked) (err error) {
			h, err = d.adopt(l, req)
			return err
		})
	})
	if err != nil {
		return nil, err
	}
	h.releaseNetNS()
	return h, nil
}

func (d Device) adopt(l *state.Locked, req target.AdoptRequest) (*handle, error) {
	snap, err := d.Read()
	if err != nil {
		return nil, err
	}
	defer snap.Close()
	switch {
	case snap.Free():
		return nil, hook.Because(fs.ErrNotExist, "nothing is attached that could be adopted")
	case req.Entry != "" && (snap.Chain != nil || req.Entry.Program() != kernel.ProgramID(snap.Prog)):
		return nil, hook.Because(fs.ErrNotExist, "there is no %q without a link", req.Entry)
	case snap.Chain == nil && len(snap.links) > 0:
		return nil, d.Occupied(snap)
	case snap.Libxdp:
		return nil, d.Occupied(snap)
	case snap.Chain == nil:
		return d.adoptLegacy(l, snap, req)
	case snap.Chain.Closed:
		return nil, d.finishClosing(snap)
	case snap.Root.LinkID() == 0 && !req.NoGap:
		return d.protect(l, snap, req.Persistent)
	}
	return nil, hook.Because(fs.ErrExist, "a chain of libdispatcher is there already").
		Hint("attach adds members to it")
}

func (d Device) adoptLegacy(l *state.Locked, snap *Snapshot, req target.AdoptRequest) (*handle, error) {
	prog, err := load.Program{Program: snap.Prog}.Load(load.Want{Hook: hook.XDP})
	if err != nil {
		return nil, err
	}
	slot, err := NewSlot(prog)
	if err != nil {
		return nil, err
	}
	h := &handle{Base: target.Base{Opened: d.Opened}, slot: slot, chainID: rand.Uint64()}
	member, err := newMember(req.Request, slot, prog)
	if err != nil {
		h.drop()
		return nil, err
	}
	h.slotID = member.MapID
	chain := &state.Chain{ID: h.chainID, LastSeen: d.Seen(snap.Device, snap.Mode), Plan: dispatch.Plan{Shape: prog.Shape, Slots: []dispatch.Slot{member}}}
	dispatcher, err := state.Build(chain, []*ebpf.Map{slot}, nil)
	if err != nil {
		h.drop()
		return nil, err
	}
	defer dispatcher.Close()

	h.root = snap.OnNetlink(d.Opened)
	if req.NoGap {
		err = h.root.Swap(dispatcher, snap.Prog)
	} else {
		h.root, err = d.Exchange(snap, dispatcher)
	}
	if err != nil {
		h.drop()
		return nil, err
	}
	kernel.Step("adopt: attached")
	if req.Persistent {
		if err := l.Add(h.folder(), h.root.Pinner(), state.MemberPins{Name: member.Name, Slot: slot}); err != nil {
			undo := d.Restore(h.root, dispatcher, snap)
			h.drop()
			return nil, kernel.Undo(err, undo)
		}
	}
	return h, nil
}

// Exchange takes the program of the snapshot off the device, and puts the dispatcher
// there with a root link; the caller closes it. Between the two system calls nothing
// is attached. If the second call fails, Exchange puts the program back. The error is
// kernel.ErrAgain when the device carries another program now.
func (d Device) Exchange(snap *Snapshot, dispatcher *ebpf.Program) (root, error) {
	var l link.Link
	err := rtnl.In(d.NS, func(conn *rtnl.Conn) (err error) {
		opts := link.XDPOptions{
			Program: dispatcher, Interface: snap.Device.Index, Flags: link.XDPAttachFlags(rtnl.Flags(snap.Mode)),
		}
		kernel.Step("adopt: before the gap")
		if err := raced(conn.ReplaceXDP(snap.Device.Index, -1, snap.Prog.FD(), snap.Mode)); err != nil {
			return fmt.Errorf("take the program off: %w", err)
		}
		kernel.Step("adopt: in the gap")
		if l, err = link.AttachXDP(opts); err != nil {
			back := conn.ReplaceXDP(snap.Device.Index, snap.Prog.FD(), -1, snap.Mode)
			if back != nil {
				back = fmt.Errorf("program %d could not be put back: %w", kernel.ProgramID(snap.Prog), back)
			}
			return kernel.Undo(fmt.Errorf("create the root link: %w", err), back)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return newLinkRoot(l)
}

// Restore undoes an adoption: it puts the program of the snapshot back.
func (d Device) Restore(r root, dispatcher *ebpf.Program, snap *Snapshot) error {
	if r.LinkID() == 0 {
		return r.Swap(snap.Prog, dispatcher)
	}
	if err := r.Release(dispatcher); err != nil {
		return err
	}
	n := snap.OnNetlink(d.Opened)
	return n.Rtnl(func(c *rtnl.Conn) error { return c.ReplaceXDP(n.Index, snap.Prog.FD(), -1, n.Mode) })
}

// protect gives a root link to a chain that netlink carries.
func (d Device) protect(l *state.Locked, snap *Snapshot, persistent bool) (*handle, error) {
	first := -1
	var slots state.Slots
	defer slots.Close()
	for i := range snap.Chain.Slots {
		slot, err := slots.Open(snap.Chain.Slots[i].MapID, false)
		if err != nil {
			return nil, kernel.Again(err)
		}
		id, err := state.Occupant(slot)
		if err != nil {
			return nil, err
		}
		if id != 0 {
			first = i
			break
		}
	}
	if first < 0 {
		return nil, hook.Because(fs.ErrNotExist, "the chain has no member to protect: all owners are gone").
			Hint("detach the chain with --all")
	}
	if persistent {
		members, err := l.Members(state.ChainFolder(0, snap.Chain.ID))
		if err != nil {
			return nil, err
		}
		if len(members) == 0 {
			return nil, hook.Because(hook.ErrUsage, "all members are owned by processes, so nothing would hold the link once it is made").
				Hint("hold it (--hold) until the owners have done something with their members, which makes them hold it as well")
		}
	}
	r, err := d.Exchange(snap, snap.Prog)
	if err != nil {
		return nil, err
	}
	h, err := d.open(r, snap.Chain, first)
	if err == nil && l != nil {
		err = l.Move(state.ChainFolder(0, snap.Chain.ID), h.folder(), r.Pinner())
	}
	if err != nil {
		undo := d.Restore(r, snap.Prog, snap)
		if h == nil {
			r.Close()
		} else {
			h.drop() // closes the root too
		}
		return nil, kernel.Undo(err, undo)
	}
	return h, nil
}
