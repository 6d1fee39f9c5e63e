package chains

import (
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
func (Family) Adopt(o *target.Opened, l *state.Locked, req target.AdoptRequest) (target.Handle, error) {
	d := Device{o}
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

func (d Device) adoptLegacy(l *state.Locked, snap *Snapshot, req target.AdoptRequest) (target.Handle, error) {
	prog, err := load.Program{Program: snap.Prog}.Load(load.Want{Hook: hook.XDP, Adopt: true})
	if err != nil {
		return nil, err
	}
	slot, member, err := newMember(req.Request, prog)
	if err != nil {
		return nil, err
	}
	h := &handle{Base: target.Base{Opened: d.Opened}, slot: slot, slotID: member.MapID, chainID: rand.Uint64()}
	chain := &state.Chain{ID: h.chainID, LastSeen: d.Seen(snap.Device, snap.Mode), Plan: dispatch.Plan{Shape: prog.Shape, Slots: []dispatch.Slot{member}}}
	dispatcher, err := state.Build(chain, []*ebpf.Map{slot}, nil)
	if err != nil {
		h.drop()
		return nil, err
	}
	defer dispatcher.Close()

	h.root = snap.OnNetlink(d.Opened)
	if req.NoGap {
		err = h.root.Swap(dispatcher.Program, snap.Prog)
	} else {
		h.root, err = d.Exchange(snap, dispatcher.Program)
	}
	if err != nil {
		h.drop()
		return nil, err
	}
	kernel.Step("adopt: attached")
	if req.Persistent {
		if err := l.Add(h.folder(), h.root.Pinner(), state.MemberPins{Name: member.Name, Slot: slot}); err != nil {
			undo := d.Restore(h.root, dispatcher.Program, snap)
			h.drop()
			return nil, kernel.Undo(err, undo)
		}
		PinDispatcher(h.root)
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
			if upper := conn.CheckXDP(snap.Device.Index, snap.Mode); upper != nil {
				err = upper
			}
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
	return newLinkRoot(l, d.Pins)
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
	return n.Attach(snap.Prog)
}

// protect gives a root link to a chain that netlink carries.
func (d Device) protect(l *state.Locked, snap *Snapshot, persistent bool) (_ target.Handle, err error) {
	folder := state.ChainFolder(0, snap.Chain.ID)
	var h *handle // to the first member that is not empty
	for i := range snap.Chain.Slots {
		if h, err = d.open(nil, snap.Chain, i); err == nil {
			break
		}
		if !target.Gone(err) {
			return nil, err
		}
	}
	if h == nil {
		return nil, hook.Because(fs.ErrNotExist, "the chain has no member to protect: all owners are gone").
			Hint("detach the chain with --all")
	}
	defer func() {
		if err != nil {
			h.drop()
		}
	}()
	if persistent {
		members, err := l.Members(folder)
		if err != nil {
			return nil, err
		}
		if len(members) == 0 {
			return nil, hook.Because(hook.ErrUsage, "all members are owned by processes, so nothing would hold the link once it is made").
				Hint("hold it (--hold) until the owners have done something with their members, which makes them hold it as well")
		}
	}
	if h.root, err = d.Exchange(snap, snap.Prog); err != nil {
		return nil, err
	}
	if l != nil {
		if err := l.Move(folder, h.folder(), h.root.Pinner()); err != nil {
			return nil, kernel.Undo(err, d.Restore(h.root, snap.Prog, snap))
		}
		PinDispatcher(h.root)
	}
	return h, nil
}
