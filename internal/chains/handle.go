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

// releaseNetNS lets the namespace go away while the handle is open. A root link is
// found without the namespace. A chain without a link is not, so its handle keeps the
// namespace.
func (h *handle) releaseNetNS() {
	if h.root.LinkID() != 0 {
		h.Opened.NS.Release()
	}
}

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

// change runs fn with the present chain and the index of the member, with the handle's
// lock and the lock of the pins held. It tries again while fn returns kernel.ErrAgain.
func (h *handle) change(ctx context.Context, fn func(l *state.Locked, c *state.Chain, i int) error) error {
	return h.Locked(func() error {
		return kernel.Retry(ctx, func() error {
			return h.Opened.Locked(ctx, func(l *state.Locked) error {
				c, i, err := h.find()
				if err != nil {
					return err
				}
				return fn(l, c, i)
			})
		})
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
		if r, err = linkCarrying(kernel.ProgramID(prog), n.Index); err != nil {
			prog.Close()
			return nil, nil, err
		}
		if r != nil {
			h.root = r
			h.releaseNetNS()
		}
	}
	return prog, c, err
}

// edit runs fn on the chain and the index of the member, and swaps in the result.
func (h *handle) edit(fn func(c *state.Chain, i int) error) error {
	_, err := change(h.root, h.chainID, nil, func(c *state.Chain, _ map[uint32]bool) error {
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
	return h.Locked(func() error {
		var prog *load.Loaded
		err := kernel.Retry(ctx, func() error {
			c, _, err := h.find()
			if err != nil {
				return err
			}
			prog, err = h.successor(load.PinningIn(src, h.Opened.BPFFS), c)
			return err
		})
		if err != nil {
			return err
		}
		used, sealed := false, false
		err = kernel.Retry(ctx, func() error {
			return h.Opened.Locked(ctx, func(l *state.Locked) error {
				// Read the chain again: the member may be gone.
				c, i, err := h.find()
				if err != nil {
					return err
				}
				broken, err := h.breakSeal(c, i)
				if err != nil {
					return err
				}
				sealed = sealed || broken
				kernel.Step("replace: before")
				if err := state.Fill(h.slot, prog.Program); err != nil {
					return err
				}
				used = true
				kernel.Step("replace: after")
				if l != nil && l.Has(h.folder(), c.Slots[i].Name) {
					err = l.SetMaps(h.folder(), c.Slots[i].Name, prog.Maps)
				}
				if err == nil {
					err = h.sealAgain(sealed)
				}
				return err
			})
		})
		if !used {
			prog.Discard()
			return err
		}
		h.Swap(prog)
		return err
	})
}

// successor loads the program that will replace the program in the slot.
func (h *handle) successor(src load.Source, c *state.Chain) (*load.Loaded, error) {
	old, err := h.occupant()
	if err != nil {
		return nil, err
	}
	defer old.Close()
	return load.Successor(src, old, load.Want{Hook: hook.XDP, Shape: &c.Shape})
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
		}
		path = l.HeldPath(h.folder(), name)
		return h.edit(func(c *state.Chain, i int) error { c.Slots[i].Persistent = true; return nil })
	})
	return path, err
}

// Unpin removes the member's pins, and its seal.
func (h *handle) Unpin(ctx context.Context) error {
	return h.change(ctx, func(l *state.Locked, c *state.Chain, i int) error {
		if err := h.edit(func(c *state.Chain, i int) error {
			c.Slots[i].Persistent, c.Slots[i].Sealed = false, dispatch.Sealed{}
			return nil
		}); err != nil || l == nil {
			return err
		}
		return l.Remove(h.folder(), c.Slots[i].Name)
	})
}

// Detach takes the member out and removes its pins. A member that is gone already is
// no error; its pins are removed all the same.
func (h *handle) Detach(ctx context.Context) error {
	err := h.change(ctx, func(l *state.Locked, c *state.Chain, i int) error {
		return takeOut(l, h.root, h.chainID, []string{c.Slots[i].Name}, []uint32{h.slotID})
	})
	if err != nil && !target.Gone(err) {
		return err
	}
	return h.Leave(func() error {
		if err != nil {
			if err := h.unpinGone(ctx); err != nil {
				return err
			}
		}
		// A handle without a member must not keep the chain on the device.
		h.drop()
		return nil
	})
}

// unpinGone removes the pins of a member that has lost its chain.
func (h *handle) unpinGone(ctx context.Context) error {
	r, ok := h.root.(*linkRoot)
	if !ok {
		return nil // the sweep removes the pins
	}
	return h.Opened.Locked(ctx, func(l *state.Locked) error {
		id, _, err := r.state()
		if l == nil || err != nil {
			return err
		}
		prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
		if err != nil {
			return kernel.Errno("dispatcher", err)
		}
		defer prog.Close()
		c, err := state.Find(prog)
		if err != nil || c.Index(h.slotID) < 0 {
			return err
		}
		return l.Remove(h.folder(), c.Slots[c.Index(h.slotID)].Name)
	})
}

// Info describes the member.
func (h *handle) Info(ctx context.Context) (*hook.Member, error) {
	var m hook.Member
	err := h.Locked(func() error {
		return kernel.Retry(ctx, func() error {
			c, i, err := h.find()
			if err != nil {
				return err
			}
			pins := h.Opened.Pins
			pinned := pins != nil && pins.Has(h.folder(), c.Slots[i].Name)
			m, err = viewMember(c.Slots[i], h.slot, pinned)
			return err
		})
	})
	if err != nil {
		return nil, err
	}
	return &m, nil
}

// Chain describes the member's chain.
func (h *handle) Chain(ctx context.Context) (*hook.Chain, error) {
	var c *hook.Chain
	err := h.Locked(func() error {
		return kernel.Retry(ctx, func() error {
			prog, chain, err := h.carried()
			if err != nil {
				return err
			}
			defer prog.Close()
			c = &hook.Chain{Hook: h.Opened.Hook, NetNS: h.Opened.NS.ID(), Pins: []string{}, Members: []hook.Member{}}
			if err := h.locate(c, prog); err != nil {
				return err
			}
			return viewChain(c, prog, chain, h.root.LinkID(), h.Opened.Pins)
		})
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
		c.Ifindex = int(index)
	}
	info, err := prog.Info()
	if err != nil {
		return kernel.Errno("dispatcher", err)
	}
	id, _ := info.ID()
	err = rtnl.In(h.Opened.NS, func(conn *rtnl.Conn) error {
		d, err := conn.DeviceByIndex(c.Ifindex)
		if err != nil {
			return err
		}
		for _, x := range d.XDP {
			if x.Program == uint32(id) {
				c.Target, c.Mode = d.Name, x.Mode
			}
		}
		return nil
	})
	if err != nil && !errors.Is(err, kernel.ErrNetNSGone) && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if c.Target != "" {
		return nil
	}
	// The device has moved to another namespace.
	c.NetNS = hook.NetNS{}
	ns, err := findXDP(c.Ifindex, uint32(id), func(name string, mode hook.Mode) { c.Target, c.Mode = name, mode })
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	c.NetNS = ns.ID()
	return ns.Close()
}

// Program opens the program in the slot; the caller closes it.
func (h *handle) Program(context.Context) (prog *ebpf.Program, err error) {
	err = h.Locked(func() error {
		if h.Left {
			return target.ErrDetached
		}
		prog, err = h.occupant()
		return err
	})
	return prog, err
}

func (h *handle) occupant() (*ebpf.Program, error) {
	for {
		id, err := state.Occupant(h.slot)
		if err != nil {
			return nil, err
		}
		prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
		if err == nil {
			return prog, nil
		}
		// Another owner replaced the program just now, or the slot was emptied by hand.
		if now, err := state.Occupant(h.slot); err != nil || now != id {
			continue
		}
		return nil, kernel.Errno("program in the slot", err)
	}
}
