package attach

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
)

// adopt makes the program that netlink attached the first member of a chain.
// With NoGap the chain takes its place in one step and is attached through
// netlink too; otherwise it gets a link, for which the kernel wants the device
// to be empty first.
func (xdp) adopt(ctx context.Context, s *site, req AdoptRequest) (Handle, error) {
	var h *slotHandle
	err := kernel.Retry(ctx, func() error {
		return s.locked(ctx, func(l *state.Locked) (err error) {
			h, err = s.adopt(l, req)
			return err
		})
	})
	if err != nil {
		return nil, err
	}
	h.releaseNetNS()
	return h, nil
}

func (s *site) adopt(l *state.Locked, req AdoptRequest) (*slotHandle, error) {
	snap, err := s.read()
	if err != nil {
		return nil, err
	}
	defer snap.close()
	switch {
	case snap.free():
		return nil, hook.Because(fs.ErrNotExist, "nothing is attached that could be adopted")
	case req.Entry != "" && (snap.chain != nil || req.Entry.Program() != kernel.ProgramID(snap.prog)):
		return nil, hook.Because(fs.ErrNotExist, "there is no %q without a link", req.Entry)
	case snap.chain == nil && len(snap.links) > 0:
		return nil, s.occupied(snap)
	case snap.libxdp:
		return nil, s.occupied(snap)
	case snap.chain == nil:
		return s.adoptLegacy(l, snap, req)
	case snap.chain.Closed:
		if err := snap.root.release(snap.prog); err != nil {
			return nil, err
		}
		return nil, kernel.ErrAgain
	case snap.root.linkID() == 0 && !req.NoGap:
		return s.protect(l, snap, req.Persistent)
	}
	return nil, hook.Because(fs.ErrExist, "a chain of libdispatcher is there already").
		Hint("attach adds members to it")
}

func (s *site) adoptLegacy(l *state.Locked, snap *snapshot, req AdoptRequest) (*slotHandle, error) {
	prog, err := load.Program{Program: snap.prog}.Load(load.Want{Hook: hook.XDP})
	if err != nil {
		return nil, err
	}
	slot, err := newSlot(prog)
	if err != nil {
		return nil, err
	}
	h := &slotHandle{site: s, slot: slot, chainID: rand.Uint64()}
	member, err := req.member(slot, prog)
	if err != nil {
		h.drop()
		return nil, err
	}
	h.slotID = member.MapID
	chain := &state.Chain{ID: h.chainID, LastSeen: s.home(snap.device, snap.mode), Plan: dispatch.Plan{Shape: prog.Shape, Slots: []dispatch.Slot{member}}}
	dispatcher, err := state.Build(chain, []*ebpf.Map{slot}, nil)
	if err != nil {
		h.drop()
		return nil, err
	}
	defer dispatcher.Close()

	h.root = &netlinkRoot{s.ns, snap.device.Index, snap.mode}
	if req.NoGap {
		err = h.root.swap(dispatcher, snap.prog)
	} else {
		h.root, err = s.exchange(snap, dispatcher)
	}
	if err != nil {
		h.drop()
		return nil, err
	}
	kernel.Step("adopt: attached")
	if req.Persistent {
		if err := l.Add(h.folder(), h.root.pinner(), state.MemberPins{Name: member.Name, Slot: slot}); err != nil {
			undo := s.restore(h.root, dispatcher, snap)
			h.drop()
			return nil, kernel.Undo(err, undo)
		}
	}
	return h, nil
}

// exchange takes the program of the snapshot off the device and puts the
// dispatcher there with a link. Between the two system calls nothing is
// attached; all else has been done before. When the second fails the first is
// undone.
func (s *site) exchange(snap *snapshot, dispatcher *ebpf.Program) (root, error) {
	var l link.Link
	err := rtnl.In(s.ns, func(conn *rtnl.Conn) (err error) {
		opts := link.XDPOptions{
			Program: dispatcher, Interface: snap.device.Index, Flags: link.XDPAttachFlags(rtnl.Flags(snap.mode)),
		}
		kernel.Step("adopt: before the gap")
		if err := raced(conn.ReplaceXDP(snap.device.Index, -1, snap.prog.FD(), snap.mode)); err != nil {
			return fmt.Errorf("take the program off: %w", err)
		}
		kernel.Step("adopt: in the gap")
		if l, err = link.AttachXDP(opts); err != nil {
			back := conn.ReplaceXDP(snap.device.Index, snap.prog.FD(), -1, snap.mode)
			if back != nil {
				back = fmt.Errorf("program %d could not be put back: %w", kernel.ProgramID(snap.prog), back)
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

// restore puts the adopted program back.
func (s *site) restore(r root, dispatcher *ebpf.Program, snap *snapshot) error {
	if r.linkID() == 0 {
		return r.swap(snap.prog, dispatcher)
	}
	if err := r.release(dispatcher); err != nil {
		return err
	}
	n := &netlinkRoot{s.ns, snap.device.Index, snap.mode}
	return n.rtnl(func(c *rtnl.Conn) error { return c.ReplaceXDP(n.index, snap.prog.FD(), -1, n.mode) })
}

// protect gives a chain that is attached through netlink a link.
func (s *site) protect(l *state.Locked, snap *snapshot, persistent bool) (*slotHandle, error) {
	first := -1
	var slots state.Slots
	defer slots.Close()
	for i := range snap.chain.Slots {
		slot, err := slots.Open(snap.chain.Slots[i].MapID, false)
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
		members, err := l.Members(state.ChainFolder(0, snap.chain.ID))
		if err != nil {
			return nil, err
		}
		if len(members) == 0 {
			return nil, hook.Because(hook.ErrUsage, "all members are owned by processes, so nothing would hold the link once it is made").
				Hint("hold it (--hold) until the owners have done something with their members, which makes them hold it as well")
		}
	}
	r, err := s.exchange(snap, snap.prog)
	if err != nil {
		return nil, err
	}
	h, err := s.open(r, snap.chain, first)
	if err == nil && l != nil {
		err = l.Move(state.ChainFolder(0, snap.chain.ID), h.folder(), r.pinner())
	}
	if err != nil {
		undo := s.restore(r, snap.prog, snap)
		r.close()
		return nil, kernel.Undo(err, undo)
	}
	return h, nil
}
