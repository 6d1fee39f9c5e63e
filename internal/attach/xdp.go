package attach

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/state"
)

// xdp is the family of the XDP hook: chains behind a dispatcher.
type xdp struct{}

func (xdp) attach(ctx context.Context, s *site, src load.Source, req Request) (h Handle, err error) {
	err = s.inStyle(ctx, req.Style, func() error {
		h, err = s.attachOwned(ctx, src, req)
		return err
	}, func() error {
		h, err = s.attachLibxdp(ctx, src, req)
		return err
	})
	return h, err
}

func (s *site) attachOwned(ctx context.Context, src load.Source, req Request) (Handle, error) {
	var h *slotHandle
	patience := untilLeft()
	loaded, err := s.withProgram(ctx, src, func(prog *load.Loaded) error {
		return s.locked(ctx, func(l *state.Locked) (err error) {
			h, err = s.join(l, prog, req)
			return patience(err)
		})
	})
	if err != nil {
		return nil, err
	}
	h.loaded = loaded
	h.releaseNetNS()
	return h, nil
}

func (xdp) plan(ctx context.Context, s *site, src load.Source, req Request) (c *hook.Chain, err error) {
	err = s.inStyle(ctx, req.Style, func() error {
		c, err = s.planOwned(ctx, src, req)
		return err
	}, func() error {
		c, err = s.planLibxdp(ctx, src, req)
		return err
	})
	return c, err
}

func (s *site) planOwned(ctx context.Context, src load.Source, req Request) (*hook.Chain, error) {
	var c *hook.Chain
	loaded, err := s.withProgram(ctx, src, func(prog *load.Loaded) (err error) {
		c, err = s.plan(prog, req)
		return err
	})
	if err != nil {
		return nil, err
	}
	loaded.Discard()
	return c, nil
}

// withProgram loads the program so that it fits the chain that is there, and
// runs fn with it; all of it again while others change the chain. The loading
// is done without the lock, since a verifier may take its time.
func (s *site) withProgram(ctx context.Context, src load.Source, fn func(*load.Loaded) error) (*load.Loaded, error) {
	src = load.PinningIn(src, s.BPFFS)
	var prog *load.Loaded
	err := kernel.Retry(ctx, func() error {
		want, err := s.shape()
		if err != nil {
			return err
		}
		if prog != nil && want != nil && prog.Shape != *want {
			prog.Discard()
			prog = nil
		}
		if prog == nil {
			if prog, err = src.Load(load.Want{Hook: hook.XDP, Shape: want}); err != nil {
				return withoutFrags(src, err)
			}
		}
		return fn(prog)
	})
	if err != nil {
		if prog != nil {
			prog.Discard()
		}
		return nil, err
	}
	return prog, nil
}

// shape returns what a program must be like to join, nil when it is free to
// start a chain, and an error when the hook is not to be had.
func (s *site) shape() (*dispatch.Shape, error) {
	snap, err := s.read()
	if err != nil {
		return nil, err
	}
	defer snap.close()
	switch {
	case snap.free(), snap.chain != nil && snap.chain.Closed:
		return nil, nil
	case snap.chain == nil:
		return nil, s.taken(snap)
	}
	return &snap.chain.Shape, nil
}

// open to join: kernel.ErrAgain when the program was loaded for another chain than
// the one that is there by now.
func (s *site) readToJoin(prog *load.Loaded, req Request) (*snapshot, error) {
	snap, err := s.read()
	if err != nil {
		return nil, err
	}
	switch {
	case snap.free():
		return snap, nil
	case snap.chain == nil:
		err = s.taken(snap)
	case snap.chain.Closed:
		// Whoever closed it has died before the end: finish it.
		if err = snap.root.release(snap.prog); err == nil {
			err = kernel.ErrAgain
		}
	case snap.chain.Shape != prog.Shape:
		err = kernel.ErrAgain
	case req.Mode != hook.ModeAuto && req.Mode != snap.mode:
		err = hook.Because(hook.ErrIncompatible, "the chain is in %v mode, and all its members are", snap.mode).
			Hint("ask for %v or auto", snap.mode)
	default:
		return snap, nil
	}
	snap.close()
	return nil, err
}

// member is the slot that a request asks for.
func (req Request) member(slot *ebpf.Map, prog *load.Loaded) (dispatch.Slot, error) {
	name := req.Name
	if name == "" {
		name = prog.Name
		if err := hook.CheckName(name); err != nil {
			return dispatch.Slot{}, hook.Because(hook.ErrUsage, "the program's name will not do for the member: %w; choose one", err)
		}
	}
	id, err := kernel.MapID(slot)
	return dispatch.Slot{
		MapID: id, Name: name, Owner: req.Owner, Persistent: req.Persistent,
		Settings: req.Settings.Or(prog.Defaults).WithDefaults(),
	}, err
}

// errTaken: the name is taken by a member that may be leaving. The kernel empties
// a slot some 10 ms after its owner is gone (see state.Slots), and a program that
// is started anew at once shall not be refused for that.
var errTaken = errors.New("the name is taken")

// leaveWait is how long to wait for a member to leave: on a busy machine, with others who
// look at the slot meanwhile and so keep it, 250 ms were seen not to do; on an emulated one, a second.
const leaveWait = 3 * time.Second

// untilLeft returns what marks errTaken as an error to try again after, for
// leaveWait from now.
func untilLeft() func(error) error {
	deadline := time.Now().Add(leaveWait)
	return func(err error) error {
		if errors.Is(err, errTaken) && time.Now().Before(deadline) {
			return fmt.Errorf("%w: %w", kernel.ErrAgain, err)
		}
		return err
	}
}

// insert is an edit that adds a member. It takes the place of a closed door of
// the same name, which then was closed until now.
func insert(member dispatch.Slot, req Request) func(*state.Chain, map[uint32]bool) error {
	return func(c *state.Chain, empty map[uint32]bool) error {
		if i := c.Named(member.Name); i >= 0 {
			if !empty[c.Slots[i].MapID] {
				err := hook.Because(fs.ErrExist, "there is a member %q already", member.Name)
				if !c.Slots[i].Persistent {
					err = hook.Because(errTaken, "%w", err)
				}
				return err.Hint("choose another name, or replace its program")
			}
			c.Remove(i)
		}
		return noMember(c.Insert(member, req.Position, req.Priority))
	}
}

// newSlot makes a slot with the program in it.
func newSlot(prog *load.Loaded) (*ebpf.Map, error) {
	slot, err := state.NewSlot(prog.Name)
	if err != nil {
		return nil, err
	}
	if err := state.Fill(slot, prog.Program); err != nil {
		slot.Close()
		return nil, err
	}
	return slot, nil
}

// join adds the program to the chain, or starts one.
func (s *site) join(l *state.Locked, prog *load.Loaded, req Request) (*slotHandle, error) {
	snap, err := s.readToJoin(prog, req)
	if err != nil {
		return nil, err
	}
	defer snap.close()
	slot, err := newSlot(prog)
	if err != nil {
		return nil, err
	}
	h := &slotHandle{site: s, slot: slot}
	member, err := req.member(slot, prog)
	if err != nil {
		h.drop()
		return nil, err
	}
	h.slotID = member.MapID

	kernel.Step("attach: slot made")
	if snap.free() {
		h.chainID = rand.Uint64()
		h.root, err = s.start(snap.device, req.Mode, h.chainID, prog.Shape, slot, member)
	} else {
		h.chainID = snap.chain.ID
		h.root, snap.root = snap.root, nil
		join := insert(member, req)
		_, err = change(h.root, h.chainID, map[uint32]*ebpf.Map{h.slotID: slot}, func(c *state.Chain, empty map[uint32]bool) error {
			c.LastSeen = s.home(snap.device, snap.mode)
			return join(c, empty)
		})
	}
	if err != nil {
		h.drop()
		return nil, joinError(err)
	}
	kernel.Step("attach: attached")
	if req.Persistent {
		if err := l.Add(h.folder(), h.root.pinner(), state.MemberPins{Name: member.Name, Slot: slot, Maps: prog.Maps}); err != nil {
			// Half attached is not attached.
			_, undo := change(h.root, h.chainID, nil, without(h.slotID))
			h.drop()
			return nil, kernel.Undo(err, undo)
		}
	}
	return h, nil
}

// joinError turns what a chain that vanished meanwhile gives into another try.
func joinError(err error) error {
	if errors.Is(err, hook.ErrDefunct) || errors.Is(err, errDetached) {
		return fmt.Errorf("%w: %w", kernel.ErrAgain, err)
	}
	return err
}

// start makes a chain with one member and a link that carries it.
func (s *site) start(dev rtnl.Device, mode hook.Mode, id uint64, shape dispatch.Shape, slot *ebpf.Map, member dispatch.Slot) (root, error) {
	chain := &state.Chain{ID: id, LastSeen: s.home(dev, mode), Plan: dispatch.Plan{Shape: shape, Slots: []dispatch.Slot{member}}}
	prog, err := state.Build(chain, []*ebpf.Map{slot}, nil)
	if err != nil {
		return nil, err
	}
	defer prog.Close()
	return s.create(dev.Index, mode, prog)
}

// home is where a chain on the device is.
func (s *site) home(dev rtnl.Device, mode hook.Mode) state.LastSeen {
	return state.LastSeen{Target: dev.Name, NetNS: s.ns.ID(), Mode: mode}
}

// create puts a dispatcher on a free device with a link of its own.
func (s *site) create(index int, mode hook.Mode, prog *ebpf.Program) (root, error) {
	var l link.Link
	kernel.Step("create: before")
	err := s.ns.Do(func() (err error) {
		l, err = link.AttachXDP(link.XDPOptions{Program: prog, Interface: index, Flags: link.XDPAttachFlags(rtnl.Flags(mode))})
		return err
	})
	kernel.Step("create: after")
	switch {
	case err == nil:
		return newLinkRoot(l)
	case errors.Is(err, unix.EBUSY), errors.Is(err, unix.EEXIST):
		// Somebody was quicker. Or a link was closed just now, and the kernel
		// is still at it.
		return nil, fmt.Errorf("%w: %w", kernel.ErrAgain, err)
	}
	return nil, kernel.RefusedXDP(s.Target, mode, err)
}

// plan computes what join would do, up to the point where others would see it.
func (s *site) plan(prog *load.Loaded, req Request) (*hook.Chain, error) {
	snap, err := s.readToJoin(prog, req)
	if err != nil {
		return nil, err
	}
	defer snap.close()
	slot, err := newSlot(prog)
	if err != nil {
		return nil, err
	}
	defer slot.Close()
	member, err := req.member(slot, prog)
	if err != nil {
		return nil, err
	}
	c := &hook.Chain{
		Hook: s.Hook, Target: snap.device.Name, Ifindex: snap.device.Index, NetNS: s.ns.ID(),
		Mode: snap.mode, Pins: []string{}, Members: []hook.Member{},
	}
	old := &state.Chain{Plan: dispatch.Plan{Shape: prog.Shape}}
	var linkID uint32
	if snap.free() {
		c.Mode = req.Mode
	} else {
		old, linkID = snap.chain, snap.root.linkID()
	}
	rev, err := revise(old, linkID, map[uint32]*ebpf.Map{member.MapID: slot}, insert(member, req))
	if err != nil {
		return nil, err
	}
	defer rev.close()
	if err := viewChain(c, rev.prog, rev.chain, linkID, s.pins); err != nil {
		return nil, err
	}
	c.DispatcherID = 0 // it is gone when this returns
	for i := range c.Members {
		if c.Members[i].SlotID == member.MapID {
			c.Members[i].SlotID = 0
		}
	}
	return c, nil
}

func (xdp) read(ctx context.Context, s *site) (c *hook.Chain, err error) {
	err = kernel.Retry(ctx, func() error {
		snap, err := s.read()
		if err != nil {
			return err
		}
		defer snap.close()
		c, err = s.view(snap)
		return err
	})
	return c, err
}

func (xdp) detach(ctx context.Context, s *site, ref hook.Ref, _ bool) error {
	return s.inStyle(ctx, "", func() error { return s.detachOwned(ctx, ref) }, func() error { return s.detachLibxdp(ctx, ref) })
}

// detachOwned takes out one member, or all of them for an empty ref, and their pins.
func (s *site) detachOwned(ctx context.Context, ref hook.Ref) error {
	return kernel.Retry(ctx, func() error {
		return s.locked(ctx, func(l *state.Locked) error {
			snap, err := s.read()
			if err != nil {
				return err
			}
			defer snap.close()
			switch {
			case snap.free():
				return hook.Because(fs.ErrNotExist, "nothing is attached")
			case snap.chain == nil:
				return s.taken(snap)
			case snap.chain.Closed:
				// Whoever detached its last member died before the end.
				return snap.root.release(snap.prog)
			}
			leaving := snap.chain.Slots
			if ref != "" {
				i := snap.chain.Named(string(ref))
				if i < 0 {
					return noMember(snap.chain.NoMember(ref))
				}
				leaving = leaving[i : i+1]
			}
			var names []string
			var slots []uint32
			for _, s := range leaving {
				names, slots = append(names, s.Name), append(slots, s.MapID)
			}
			return takeOut(l, snap.root, snap.chain.ID, names, slots)
		})
	})
}

// takeOut removes members from a chain, and their pins after them.
func takeOut(l *state.Locked, r root, chainID uint64, names []string, slots []uint32) error {
	left, err := change(r, chainID, nil, without(slots...))
	if err != nil || l == nil {
		return err
	}
	folder := state.ChainFolder(r.linkID(), chainID)
	if left.Closed {
		return l.RemoveChain(folder)
	}
	for _, name := range names {
		if err := l.Remove(folder, name); err != nil {
			return err
		}
	}
	return nil
}

// noMember marks the error of a name that no member has as fs.ErrNotExist.
func noMember(err error) error {
	if errors.Is(err, dispatch.ErrNoEntry) {
		return hook.Because(fs.ErrNotExist, "%w", err)
	}
	return err
}
