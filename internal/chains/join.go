package chains

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"slices"

	"github.com/cilium/ebpf"

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
		slot, member, err := newMember(req, prog)
		if err != nil {
			return err
		}
		kernel.Step("attach: slot made")
		h = &handle{Base: target.Base{Opened: d.Opened}, slot: slot, slotID: member.MapID}
		err = d.LockedAsking(ctx, toJoin(snap, member, req), func(l *state.Locked) error {
			return d.join(l, snap, prog, req, h, member)
		})
		if err != nil {
			h.drop()
		}
		return patience(err)
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
		if !snap.Free() || !prog.Frags || prog.Shape.Frags || !errors.Is(err, ebpf.ErrNotSupported) {
			return err
		}
		// The driver may take long packets in several buffers only.
		if FragsSupported() != nil {
			return hook.Because(ebpf.ErrNotSupported, "%w; the program can take packets in several buffers (frags), which needs Linux 5.18", err)
		}
		frags = true
		prog.Discard()
		prog = nil
		return fmt.Errorf("%w: %w", kernel.ErrAgain, err)
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

// join adds the member of the handle, with the program in its slot, to the chain of the
// snapshot, or starts one.
func (d Device) join(l *state.Locked, snap *Snapshot, prog *load.Loaded, req target.Request, h *handle, member dispatch.Slot) error {
	if !snap.Current() { // another process changed the chain before this one got the lock
		now, err := d.readToJoin(req)
		if err != nil {
			return err
		}
		defer now.Close()
		if snap = now; !snap.takes(prog) {
			return kernel.ErrAgain
		}
	}
	var err error
	if snap.Free() {
		h.chainID = rand.Uint64()
		h.root, err = d.start(snap.Device, req.Mode, h.chainID, prog, h.slot, member)
	} else {
		h.chainID = snap.Chain.ID
		h.root, snap.Root = snap.Root, nil
		if snap.Chain.Index(member.MapID) < 0 { // else who had the lock has done it
			_, err = changeFrom(h.root, snap.Prog, snap.Chain, h.own(), l, func(c *state.Chain, empty map[uint32]bool) error {
				c.LastSeen = d.Seen(snap.Device, snap.Mode)
				return insert(member, req, d.stays(h.root, h.chainID))(c, empty)
			})
		}
	}
	if err != nil {
		return joinError(err)
	}
	kernel.Step("attach: attached")
	if req.Persistent {
		if err := l.Add(h.folder(), h.root.Pinner(), state.MemberPins{Name: member.Name, Slot: h.slot, Maps: prog.Maps}); err != nil {
			// Half attached is not attached.
			_, undo := change(h.root, h.chainID, h.own(), nil, without(member))
			return kernel.Undo(err, undo)
		}
		PinDispatcher(h.root)
	}
	return nil
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
	rev, err := revise(snap.Root, old, map[uint32]*ebpf.Map{member.MapID: slot}, nil, insert(member, req, func(dispatch.Slot) bool { return true }))
	if err != nil {
		return nil, err
	}
	defer rev.dispatcher.Close()
	if err := viewChain(c, rev.dispatcher.Program, rev.chain, snap.Root, map[uint32]*ebpf.Map{member.MapID: slot}, d.Pins); err != nil {
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

// noMember marks the error for an unknown member with fs.ErrNotExist.
func noMember(err error) error {
	if errors.Is(err, dispatch.ErrNoEntry) {
		return hook.Because(fs.ErrNotExist, "%w", err)
	}
	return err
}
