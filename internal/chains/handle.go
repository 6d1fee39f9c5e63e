package chains

import (
	"context"
	"errors"
	"io/fs"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// A handle owns a member of an XDP chain. It holds the slot, so that the kernel does
// not empty it, and the root, so that the dispatcher stays on the device. It holds both
// until the member has left.
type handle struct {
	target.Base
	root    root
	slot    *ebpf.Map
	slots   state.Slots // holds the slot if the handle opened it and did not make it
	slotID  uint32
	chainID uint64
}

// drop closes the slot and the root, but not the opened target.
func (h *handle) drop() {
	// Slot before root: so the chain runs on without the member until the root closes.
	h.slots.Close()
	h.slot.Close()
	if h.root != nil {
		h.root.Close()
	}
}

// ReleaseNetNS keeps the namespace for a chain without a link, which is not found without
// it. A root link is.
func (h *handle) ReleaseNetNS() {
	if h.root.LinkID() != 0 {
		h.Base.ReleaseNetNS()
	}
}

// own returns the slot of the member, by its map id.
func (h *handle) own() map[uint32]*ebpf.Map { return map[uint32]*ebpf.Map{h.slotID: h.slot} }

func (h *handle) folder() string { return state.ChainFolder(h.root.LinkID(), h.chainID) }

// Close gives up ownership of the member.
func (h *handle) Close() error {
	return h.Release(func() error {
		if !h.Left {
			h.drop()
		}
		return nil
	})
}

// change is Change with the present chain and the index of the member.
func (h *handle) change(ctx context.Context, fn func(l *state.Locked, c *state.Chain, i int) error) error {
	return h.Change(ctx, func(l *state.Locked) error {
		c, i, err := h.find()
		if err != nil {
			return err
		}
		return fn(l, c, i)
	})
}

// find returns the present chain and the index of the member.
func (h *handle) find() (*state.Chain, int, error) {
	prog, c, err := h.carried()
	if err != nil {
		return nil, 0, err
	}
	prog.Close()
	i, err := indexOf(c, h.slotID)
	return c, i, err
}

// carried returns the dispatcher and the chain; the caller closes the dispatcher. If
// the chain had no root link and has one now, the handle takes the link as its root.
func (h *handle) carried() (*ebpf.Program, *state.Chain, error) {
	if h.Left {
		return nil, nil, target.ErrDetached
	}
	prog, c, err := carried(h.root, h.chainID)
	if n, ok := h.root.(*NetlinkRoot); ok && err == nil {
		var r root
		if r, err = (Device{h.Opened}).linkCarrying(kernel.ProgramID(prog), n.Index); err != nil {
			prog.Close()
			return nil, nil, err
		}
		if r != nil {
			h.root = r
			h.ReleaseNetNS()
		}
	}
	return prog, c, err
}

// edit runs fn on the chain and the index of the member, and swaps in the result.
func (h *handle) edit(fn func(c *state.Chain, i int) error) error {
	_, err := change(h.root, h.chainID, h.own(), nil, func(c *state.Chain, _ map[uint32]bool) error {
		i, err := indexOf(c, h.slotID)
		if err == nil {
			err = fn(c, i)
		}
		return err
	})
	return err
}

// Update puts another program into the slot.
func (h *handle) Update(ctx context.Context, src load.Source) error {
	var shape dispatch.Shape // of the chain, for good
	err := h.Look(ctx, func() error {
		c, _, err := h.find()
		if err == nil {
			shape = c.Shape
		}
		return err
	})
	if err != nil {
		return err
	}
	return h.Replace(ctx, h, src, &shape, func(prog *load.Loaded) (used bool, err error) {
		sealed := false
		err = h.change(ctx, func(l *state.Locked, c *state.Chain, i int) error {
			if c.Slots[i].Sealed.Program != 0 { // its seal is broken, so that the new program runs at once
				if err := h.edit(func(c *state.Chain, i int) error { c.Slots[i].Sealed = dispatch.Sealed{}; return nil }); err != nil {
					return err
				}
				sealed = true
			}
			kernel.Step("replace: before")
			if err := state.Fill(h.slot, prog.Program); err != nil {
				return err
			}
			used = true
			kernel.Step("replace: after")
			if err := h.sealAgain(sealed); err != nil {
				return err
			}
			return l.SetMaps(h.folder(), c.Slots[i].Name, prog.Maps)
		})
		return used, err
	})
}

// Set changes the member's settings.
func (h *handle) Set(ctx context.Context, settings hook.Settings) error {
	if err := settings.Check(); err != nil {
		return hook.Because(hook.ErrUsage, "%w", err)
	}
	return h.change(ctx, func(*state.Locked, *state.Chain, int) error {
		return h.edit(func(c *state.Chain, i int) error { return c.Set(i, settings.Or(c.Slots[i].Settings)) })
	})
}

// Move moves the member to another place in the order.
func (h *handle) Move(ctx context.Context, to hook.Position) error {
	if err := to.Check(); err != nil {
		return hook.Because(hook.ErrUsage, "%w", err)
	}
	return h.change(ctx, func(*state.Locked, *state.Chain, int) error {
		return h.edit(func(c *state.Chain, i int) error { return noMember(c.Move(i, to)) })
	})
}

// Pin makes the member persistent, and returns the path of its pin.
func (h *handle) Pin(ctx context.Context) (path string, err error) {
	err = h.change(ctx, func(l *state.Locked, c *state.Chain, i int) error {
		if l == nil {
			return h.Opened.NoBPFFS()
		}
		name := c.Slots[i].Name
		if !l.Has(h.folder(), name) || h.root.LinkID() != 0 && !l.HasRoot(h.folder()) {
			m := state.MemberPins{Name: name, Slot: h.slot}
			if h.Loaded != nil {
				m.Maps = h.Loaded.Maps
			}
			if err := l.Add(h.folder(), h.root.Pinner(), m); err != nil {
				return err
			}
			PinDispatcher(h.root)
		}
		path = l.HeldPath(h.folder(), name)
		return h.edit(func(c *state.Chain, i int) error { c.Slots[i].Persistent = true; return nil })
	})
	return path, err
}

// Unpin removes the member's pins, and its seal.
func (h *handle) Unpin(ctx context.Context) error {
	return h.change(ctx, func(l *state.Locked, c *state.Chain, i int) error {
		loosen := func() error {
			return h.edit(func(c *state.Chain, i int) error {
				c.Slots[i].Persistent, c.Slots[i].Sealed = false, dispatch.Sealed{}
				return nil
			})
		}
		if l == nil {
			return loosen()
		}
		return l.RemoveWith(h.folder(), c.Slots[i].Name, loosen)
	})
}

// Detach takes the member out and removes its pins. A member that is gone already is
// no error; its pins are removed all the same.
func (h *handle) Detach(ctx context.Context) error {
	err := h.Locked(func() error {
		err := kernel.Retry(ctx, func() error { return h.Opened.LockedAsking(ctx, h.toLeave, h.takeOut) })
		if ctx.Err() != nil {
			if _, _, now := h.find(); target.Gone(now) { // who had the lock has done it
				return nil
			}
		}
		return err
	})
	if err != nil && !errors.Is(err, hook.ErrPins) {
		return err
	}
	_ = h.Leave(func() error {
		// A handle without a member must not keep the chain on the device.
		h.drop()
		return nil
	})
	return err
}

// takeOut takes the member out of its chain, unless it is gone, and removes its pins.
func (h *handle) takeOut(l *state.Locked) error {
	if h.Left {
		return nil
	}
	c, i, err := h.find()
	if err == nil {
		err = takeOut(l, h.root, h.chainID, h.own(), c.Slots[i:i+1])
	}
	if !target.Gone(err) || errors.Is(err, hook.ErrPins) {
		return err
	}
	r, ok := h.root.(*linkRoot)
	if !ok || l == nil {
		return nil // the sweep removes the pins
	}
	// The device is gone, and the link still has its last dispatcher.
	id, _, err := r.state()
	if err != nil {
		return err
	}
	prog, err := r.open(id)
	if err != nil {
		return err
	}
	defer prog.Close()
	c, err = find(r, prog)
	if err != nil || c.Index(h.slotID) < 0 {
		return err
	}
	return l.Remove(h.folder(), c.Slots[c.Index(h.slotID)].Name)
}

// Info describes the member.
func (h *handle) Info(ctx context.Context) (*hook.Member, error) {
	var m hook.Member
	err := h.Look(ctx, func() error {
		c, i, err := h.find()
		if err != nil {
			return err
		}
		pins := h.Opened.Pins
		pinned := pins != nil && pins.Has(h.folder(), c.Slots[i].Name)
		m, err = viewMember(c.Slots[i], h.slot, pinned)
		return err
	})
	if err != nil {
		return nil, err
	}
	return &m, nil
}

// Chain describes the member's chain.
func (h *handle) Chain(ctx context.Context) (*hook.Chain, error) {
	var c *hook.Chain
	err := h.Look(ctx, func() error {
		prog, chain, err := h.carried()
		if err != nil {
			return err
		}
		defer prog.Close()
		c = &hook.Chain{Hook: h.Opened.Hook, NetNS: h.Opened.NS.ID(), Pins: []string{}, Members: []hook.Member{}}
		if err := h.locate(c, prog); err != nil {
			return err
		}
		return viewChain(c, prog, chain, h.root, h.own(), h.Opened.Pins)
	})
	return c, err
}

// locate fills in the device and the namespace of the chain. It looks for the device
// first in the namespace where the handle was made, then in all namespaces that can
// be found.
func (h *handle) locate(c *hook.Chain, prog *ebpf.Program) error {
	switch r := h.root.(type) {
	case *NetlinkRoot:
		c.Ifindex = r.Index
	case *linkRoot:
		_, index, err := r.state()
		if err != nil {
			return err
		}
		c.Ifindex, c.NativeRefused = int(index), r.refused
	}
	id := kernel.ProgramID(prog)
	found := func(d *rtnl.Device, mode hook.Mode) { c.Target, c.Begins, c.Mode = d.Name, d.Begins(), mode }
	err := findXDPIn(h.Opened.NS, c.Ifindex, id, found)
	if !errors.Is(err, kernel.ErrNetNSGone) && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	// The device has moved to another namespace.
	c.NetNS = hook.NetNS{}
	ns, err := findXDP(c.Ifindex, id, found)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	c.NetNS = ns.ID()
	return ns.Close()
}
