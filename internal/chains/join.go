package chains

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// Family is the family of the XDP hook: chains behind a dispatcher.
type Family struct{}

// Attach loads the program and joins it to the chain, or starts a chain on a free
// device. The caller closes the handle. The error is ErrStyle for the other family,
// ErrBusy when the device carries something else, ErrIncompatible for another style or
// mode, and fs.ErrExist when a member has the name.
func (Family) Attach(ctx context.Context, o *target.Opened, src load.Source, req target.Request) (target.Handle, error) {
	d := Device{o}
	var h *handle
	patience := target.UntilLeft()
	loaded, err := d.withProgram(ctx, src, req, func(snap *Snapshot, prog *load.Loaded) error {
		return d.Locked(ctx, func(l *state.Locked) (err error) {
			h, err = d.join(l, snap, prog, req)
			return patience(err)
		})
	})
	if err != nil {
		return nil, err
	}
	h.Loaded = loaded
	return h, nil
}

// Plan loads the program, describes the chain as Attach would leave it, and changes
// nothing. The errors are Attach's.
func (Family) Plan(ctx context.Context, o *target.Opened, src load.Source, req target.Request) (*hook.Chain, error) {
	d := Device{o}
	var c *hook.Chain
	loaded, err := d.withProgram(ctx, src, req, func(snap *Snapshot, prog *load.Loaded) (err error) {
		c, err = d.plan(snap, prog, req)
		return err
	})
	if err != nil {
		return nil, err
	}
	loaded.Discard()
	return c, nil
}

// withProgram reads the device, loads the program so that it fits the chain there, and
// runs fn with both. It does all of this again while other processes change the chain.
// The program is loaded without the lock, since the verifier may take its time. The
// caller closes the program.
func (d Device) withProgram(ctx context.Context, src load.Source, req target.Request, fn func(*Snapshot, *load.Loaded) error) (*load.Loaded, error) {
	src = load.PinningIn(src, d.BPFFS)
	var prog *load.Loaded
	frags := false // in a chain that the program starts
	err := kernel.Retry(ctx, func() error {
		snap, err := d.readToJoin(req)
		if err != nil {
			return err
		}
		defer snap.Close()
		if prog != nil && !snap.takes(prog) {
			prog.Discard()
			prog = nil
		}
		if prog == nil {
			want := load.Want{Hook: hook.XDP, Begins: snap.Begins, Frags: frags}
			if snap.Chain != nil {
				want.Shape = &snap.Chain.Shape
			}
			if prog, err = src.Load(want); err != nil {
				return err
			}
		}
		err = fn(snap, prog)
		if snap.Free() && mayHaveFrags(prog) && errors.Is(err, ebpf.ErrNotSupported) {
			// The driver may take long packets in several buffers only.
			frags = true
			prog.Discard()
			prog = nil
			return fmt.Errorf("%w: %w", kernel.ErrAgain, err)
		}
		if snap.Free() && prog.Frags && !prog.Shape.Frags && errors.Is(err, ebpf.ErrNotSupported) && FragsSupported() != nil {
			return hook.Because(ebpf.ErrNotSupported, "%w; the program can take packets in several buffers (frags), which needs Linux 5.18", err)
		}
		return err
	})
	if err != nil {
		if prog != nil {
			prog.Discard()
		}
		return nil, err
	}
	return prog, nil
}

// readToJoin reads the device and checks that the request can join what is there.
func (d Device) readToJoin(req target.Request) (*Snapshot, error) {
	kernel.Step("attach: reads")
	snap, err := d.Read()
	if err != nil {
		return nil, err
	}
	if err := d.admit(snap, req); err != nil {
		snap.Close()
		return nil, err
	}
	return snap, nil
}

func (d Device) admit(snap *Snapshot, req target.Request) error {
	if err := runsXDP(&snap.Device); err != nil {
		return err
	}
	switch {
	case snap.Chain != nil && snap.Chain.Closed:
		return d.finishClosing(snap)
	case snap.Free() && req.Style == hook.StyleLibxdp:
		return ErrStyle
	case snap.Free():
		return nil
	case snap.Libxdp && req.Style != hook.StyleOwned:
		return ErrStyle
	case snap.Chain == nil:
		return d.Occupied(snap)
	case req.Style == hook.StyleLibxdp:
		return hook.Because(hook.ErrIncompatible, "the chain on %s is an owned one, and a device has one chain", snap.Device.Name).
			Hint("join it (leave the style out), or move it over with \"%s\"", d.Command(kernel.Flags{"--style", "libxdp"}, "convert", "xdp", snap.Device.Name))
	case req.Mode != hook.ModeAuto && req.Mode != snap.Mode:
		return hook.Because(hook.ErrIncompatible, "the chain is in %v mode, and all its members are", snap.Mode).
			Hint("ask for %v or auto", snap.Mode)
	}
	return nil
}

// runsXDP refuses the kinds of devices where the kernel takes an XDP program and does not
// run it: what arrives at the devices of a VRF never comes back to the receive path as the
// VRF's (l3mdev_ip_rcv, after ip_rcv), and ifb gives packets back as those of the device
// that they came from (ifb_ri_tasklet, drivers/net/ifb.c).
func runsXDP(d *rtnl.Device) error {
	switch d.Kind {
	case "vrf":
		return hook.Because(hook.ErrIncompatible, "%s is a VRF, and packets that arrive at its devices do not pass XDP programs on the VRF itself", d.Name).
			Hint("attach to the devices in the VRF")
	case "ifb":
		return hook.Because(hook.ErrIncompatible, "%s is an ifb, and the packets that are redirected to it do not pass XDP programs on it", d.Name).
			Hint("attach to the device that the packets arrive at")
	}
	return nil
}

// finishClosing takes a closed chain off the device, and returns kernel.ErrAgain: the
// process that closed the chain died before it did that.
func (d Device) finishClosing(snap *Snapshot) error {
	if err := snap.Root.Release(snap.Prog); err != nil {
		return err
	}
	return kernel.ErrAgain
}

// newMember makes the member that a request asks for, and its slot, which the caller
// closes.
func newMember(req target.Request, prog *load.Loaded) (slot *ebpf.Map, member dispatch.Slot, err error) {
	member = dispatch.Slot{Owner: req.Owner, Persistent: req.Persistent, Settings: req.Settings.Or(prog.Defaults).WithDefaults()}
	if member.Name, err = req.NameFor(prog); err != nil {
		return nil, member, err
	}
	if slot, err = NewSlot(prog); err != nil {
		return nil, member, err
	}
	if member.MapID, err = kernel.MapID(slot); err != nil {
		slot.Close()
	}
	return slot, member, err
}

// insert returns an edit that adds a member. The member replaces a closed door of the
// same name, which drops packets until then. Members that do not stay may be leaving: the
// error for their name, and for a full chain, is ErrTaken too.
func insert(member dispatch.Slot, req target.Request, stays func(dispatch.Slot) bool) func(*state.Chain, map[uint32]bool) error {
	return func(c *state.Chain, empty map[uint32]bool) error {
		if i := c.Named(member.Name); i >= 0 {
			if !empty[c.Slots[i].MapID] {
				return target.NameTaken(member.Name, !stays(c.Slots[i]))
			}
			c.Remove(i)
		}
		err := noMember(c.Insert(member, req.Position, req.Priority))
		if errors.Is(err, hook.ErrChainFull) && slices.ContainsFunc(c.Slots, func(s dispatch.Slot) bool { return !stays(s) }) {
			err = hook.Because(target.ErrTaken, "%w", err)
		}
		return err
	}
}

// stays returns which members of the chain that the root carries stay when processes end:
// those with a pin. A process may have died before it pinned a persistent member.
func (d Device) stays(root root, chainID uint64) func(dispatch.Slot) bool {
	return func(s dispatch.Slot) bool {
		return s.Persistent && (d.Pins == nil || d.Pins.Has(state.ChainFolder(root.LinkID(), chainID), s.Name))
	}
}

// NewSlot makes a slot with the program in it; the caller closes it.
func NewSlot(prog *load.Loaded) (*ebpf.Map, error) {
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

// join adds the program to the chain of the snapshot, or starts one.
func (d Device) join(l *state.Locked, snap *Snapshot, prog *load.Loaded, req target.Request) (*handle, error) {
	if !snap.Current() { // another process changed the chain before this one got the lock
		now, err := d.readToJoin(req)
		if err != nil {
			return nil, err
		}
		defer now.Close()
		if snap = now; !snap.takes(prog) {
			return nil, kernel.ErrAgain
		}
	}
	slot, member, err := newMember(req, prog)
	if err != nil {
		return nil, err
	}
	h := &handle{Base: target.Base{Opened: d.Opened}, slot: slot, slotID: member.MapID}
	kernel.Step("attach: slot made")
	if snap.Free() {
		h.chainID = rand.Uint64()
		h.root, err = d.start(snap.Device, req.Mode, h.chainID, prog, slot, member)
	} else {
		h.chainID = snap.Chain.ID
		h.root, snap.Root = snap.Root, nil
		_, err = changeFrom(h.root, snap.Prog, snap.Chain, map[uint32]*ebpf.Map{h.slotID: slot}, func(c *state.Chain, empty map[uint32]bool) error {
			c.LastSeen = d.Seen(snap.Device, snap.Mode)
			return insert(member, req, d.stays(h.root, h.chainID))(c, empty)
		})
	}
	if err != nil {
		h.drop()
		return nil, joinError(err)
	}
	kernel.Step("attach: attached")
	if req.Persistent {
		if err := l.Add(h.folder(), h.root.Pinner(), state.MemberPins{Name: member.Name, Slot: slot, Maps: prog.Maps}); err != nil {
			// Half attached is not attached.
			_, undo := change(h.root, h.chainID, nil, without(member))
			h.drop()
			return nil, kernel.Undo(err, undo)
		}
	}
	return h, nil
}

// plan does what join does, up to the point where other processes would see it.
func (d Device) plan(snap *Snapshot, prog *load.Loaded, req target.Request) (*hook.Chain, error) {
	slot, member, err := newMember(req, prog)
	if err != nil {
		return nil, err
	}
	defer slot.Close()
	c := snap.Describe(d.Opened)
	old := &state.Chain{Plan: dispatch.Plan{Shape: prog.Shape}}
	var linkID uint32
	if snap.Free() {
		c.Mode = req.Mode
	} else {
		old, linkID = snap.Chain, snap.Root.LinkID()
	}
	if linkID == 0 {
		if err := d.changeable(snap.Device.Index, req.Mode); err != nil {
			return nil, err
		}
	}
	next, dispatcher, err := revise(old, linkID, map[uint32]*ebpf.Map{member.MapID: slot}, insert(member, req, func(dispatch.Slot) bool { return true }))
	if err != nil {
		return nil, err
	}
	defer dispatcher.Close()
	if err := viewChain(c, dispatcher, next, linkID, d.Pins); err != nil {
		return nil, err
	}
	c.DispatcherID = 0 // the dispatcher is gone when this returns
	for i := range c.Members {
		if c.Members[i].SlotID == member.MapID {
			c.Members[i].SlotID = 0
		}
	}
	return c, nil
}

// joinError marks the error for a chain that is gone meanwhile with kernel.ErrAgain.
func joinError(err error) error {
	if errors.Is(err, hook.ErrDefunct) || errors.Is(err, target.ErrDetached) {
		return fmt.Errorf("%w: %w", kernel.ErrAgain, err)
	}
	return err
}

// start makes a chain with one member, and a root link that carries it. In mode auto it is
// generic mode where the driver refuses, but for a program that may have frags yet.
func (d Device) start(dev rtnl.Device, mode hook.Mode, id uint64, loaded *load.Loaded, slot *ebpf.Map, member dispatch.Slot) (root, error) {
	chain := &state.Chain{ID: id, LastSeen: d.Seen(dev, mode), Plan: dispatch.Plan{Shape: loaded.Shape, Slots: []dispatch.Slot{member}}}
	prog, err := state.Build(chain, []*ebpf.Map{slot}, nil)
	if err != nil {
		return nil, err
	}
	defer prog.Close()
	r, err := d.Create(dev.Index, mode, prog)
	if mode != hook.ModeAuto || !errors.Is(err, ebpf.ErrNotSupported) || mayHaveFrags(loaded) {
		return r, err
	}
	r, generic := d.Create(dev.Index, hook.ModeGeneric, prog)
	if generic != nil {
		return nil, err
	}
	r.(*linkRoot).refused = err.Error()
	return r, nil
}

// mayHaveFrags tells whether the program was loaded without the frags that it can have.
func mayHaveFrags(prog *load.Loaded) bool {
	return prog.Frags && !prog.Shape.Frags && FragsSupported() == nil
}

// reason returns the kernel's words for why it does not attach the program, which an error
// of BPF_LINK_CREATE does not have and an error of netlink has.
func (d Device) reason(index int, mode hook.Mode, prog *ebpf.Program) (words string) {
	_ = rtnl.In(d.NS, func(conn *rtnl.Conn) error {
		err := conn.ReplaceXDP(index, prog.FD(), -1, mode)
		if err == nil { // it does by now, but without a link it is not to stay
			return conn.ReplaceXDP(index, -1, prog.FD(), mode)
		}
		words = rtnl.Reason(err)
		devices, err := conn.Devices()
		for _, dev := range devices {
			if _, has := dev.Software(); has && dev.Master == index {
				words += fmt.Sprintf(" (%s has a program)", dev.Name)
			}
		}
		return err
	})
	return words
}

// Seen returns where a chain on the device is, for its description.
func (d Device) Seen(dev rtnl.Device, mode hook.Mode) state.LastSeen {
	return state.LastSeen{Target: dev.Name, NetNS: d.NS.ID(), Mode: mode}
}

// Create puts a dispatcher on a free device with a root link; the caller closes it.
// The error is kernel.ErrAgain when the device is not free.
func (d Device) Create(index int, mode hook.Mode, prog *ebpf.Program) (root, error) {
	var l link.Link
	kernel.Step("create: before")
	err := d.NS.Do(func() (err error) {
		l, err = link.AttachXDP(link.XDPOptions{Program: prog, Interface: index, Flags: link.XDPAttachFlags(rtnl.Flags(mode))})
		return err
	})
	kernel.Step("create: after")
	switch {
	case err == nil:
		return newLinkRoot(l)
	case errors.Is(err, unix.EBUSY), errors.Is(err, unix.EEXIST):
		if err := d.changeable(index, mode); err != nil {
			return nil, err
		}
		// Another process was quicker, or a link was closed just now and the kernel
		// has not released it yet.
		return nil, fmt.Errorf("%w: %w", kernel.ErrAgain, err)
	}
	return nil, kernel.RefusedXDP(d.Name, mode, d.reason(index, mode, prog), err)
}

// changeable returns rtnl.ErrUpper where the kernel changes no program of the device.
func (d Device) changeable(index int, mode hook.Mode) error {
	return rtnl.In(d.NS, func(conn *rtnl.Conn) error { return conn.CheckXDP(index, mode) })
}

// Read describes the chain on the device. The error is ErrStyle for a chain of libxdp.
func (Family) Read(o *target.Opened) (*hook.Chain, error) {
	d := Device{o}
	snap, err := d.Read()
	if err != nil {
		return nil, err
	}
	defer snap.Close()
	return d.View(snap)
}

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
		return takeOut(l, snap.Root, snap.Chain.ID, leaving)
	})
}

// takeOut removes members from a chain, and then their pins.
func takeOut(l *state.Locked, r root, chainID uint64, leaving []dispatch.Slot) error {
	left, err := change(r, chainID, nil, without(leaving...))
	if errors.Is(err, rtnl.ErrUpper) {
		left, err = new(state.Chain), emptySlots(leaving, err)
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
func emptySlots(leaving []dispatch.Slot, reason error) error {
	for _, s := range leaving {
		if s.OnMissing != hook.MissingContinue || s.Sealed.Program != 0 {
			return reason
		}
	}
	var opened state.Slots
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

// noMember marks the error for an unknown member with fs.ErrNotExist.
func noMember(err error) error {
	if errors.Is(err, dispatch.ErrNoEntry) {
		return hook.Because(fs.ErrNotExist, "%w", err)
	}
	return err
}

// FragsSupported loads a program for packets in fragments (xdp.frags). It returns nil
// if the kernel takes it, else the reason.
func FragsSupported() error {
	return kernel.Explain(state.Loads(dispatch.Shape{AttachType: ebpf.AttachXDP, Frags: true}, nil, nil, nil))
}
