package chains

import (
	"context"
	"errors"
	"io/fs"
	"os"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// A handle owns a member of an XDP chain: it holds the slot, so that the
// slot is not emptied, and the root, so that the dispatcher stays on the device.
type handle struct {
	target.Base
	root    root
	slot    *ebpf.Map
	slots   state.Slots // has the slot when it was not made here
	slotID  uint32
	chainID uint64
	left    bool // the member was detached: slot and root are let go
}

// drop lets go of what the handle holds, but not of its target.
func (h *handle) drop() {
	// The slot first: the chain runs on without the member until the root goes.
	h.slots.Close()
	h.slot.Close()
	if h.root != nil {
		h.root.Close()
	}
}

// releaseNetNS lets the namespace go away while the handle is open. A link is
// found without it; a chain without a link is not, so its handle keeps it.
func (h *handle) releaseNetNS() {
	if h.root.LinkID() != 0 {
		h.Opened.NS.Release()
	}
}

func (h *handle) folder() string { return state.ChainFolder(h.root.LinkID(), h.chainID) }

// Close gives up ownership.
func (h *handle) Close() error {
	return h.Release(func() error {
		if !h.left {
			h.drop()
		}
		return nil
	})
}

// change runs fn with the chain as it is and the index of the member, under
// the locks, until it succeeds.
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

// find returns the chain as it is and the index of the member.
func (h *handle) find() (*state.Chain, int, error) {
	prog, c, err := h.carried()
	if err != nil {
		return nil, 0, err
	}
	prog.Close()
	i, err := indexOf(c, h.slotID)
	return c, i, err
}

// carried returns the dispatcher and the chain. Where the chain had no link and
// has been given one since, the handle takes hold of it first.
func (h *handle) carried() (*ebpf.Program, *state.Chain, error) {
	if h.left {
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

// edit changes the member's slot in the chain, and the chain with it.
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

// Update puts another program in the slot.
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
				// Not into a slot that no packet comes by any more.
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

// successor loads the program that is to replace the one in the slot.
func (h *handle) successor(src load.Source, c *state.Chain) (*load.Loaded, error) {
	old, err := h.occupant()
	if err != nil {
		return nil, err
	}
	defer old.Close()
	src, release, err := load.Inherit(src, old)
	if err != nil {
		return nil, err
	}
	defer release()
	return src.Load(load.Want{Hook: hook.XDP, Shape: &c.Shape})
}

// Set changes the settings.
func (h *handle) Set(ctx context.Context, settings hook.Settings) error {
	if err := settings.Check(); err != nil {
		return hook.Because(hook.ErrUsage, "%w", err)
	}
	return h.change(ctx, func(*state.Locked, *state.Chain, int) error {
		return h.edit(func(c *state.Chain, i int) error { return c.Set(i, settings.Or(c.Slots[i].Settings)) })
	})
}

// Move gives the member another place.
func (h *handle) Move(ctx context.Context, to hook.Position) error {
	if err := to.Check(); err != nil {
		return hook.Because(hook.ErrUsage, "%w", err)
	}
	return h.change(ctx, func(*state.Locked, *state.Chain, int) error {
		return h.edit(func(c *state.Chain, i int) error { return noMember(c.Move(i, to)) })
	})
}

// Pin makes the member persistent.
func (h *handle) Pin(ctx context.Context) error {
	return h.change(ctx, func(l *state.Locked, c *state.Chain, i int) error {
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
		return h.edit(func(c *state.Chain, i int) error { c.Slots[i].Persistent = true; return nil })
	})
}

// Unpin removes the pins.
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

// Detach takes the member out. Gone already is fine, its pins go all the same.
func (h *handle) Detach(ctx context.Context) error {
	err := h.change(ctx, func(l *state.Locked, c *state.Chain, i int) error {
		return takeOut(l, h.root, h.chainID, []string{c.Slots[i].Name}, []uint32{h.slotID})
	})
	if err != nil && !target.Gone(err) {
		return err
	}
	again := h.Locked(func() error {
		if h.left {
			return nil
		}
		if err != nil {
			if err := h.unpinGone(ctx); err != nil {
				return err
			}
		}
		// A handle without a member must not keep the chain on the device.
		h.left = true
		h.drop()
		return nil
	})
	if errors.Is(again, os.ErrClosed) {
		return nil
	}
	return again
}

// unpinGone removes the pins of a member whose chain is gone.
func (h *handle) unpinGone(ctx context.Context) error {
	r, ok := h.root.(*linkRoot)
	if !ok {
		return nil // the sweep finds out
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

// Chain describes the chain that the member is in.
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

// locate fills in where the chain is: its device by name, first in the namespace
// where the handle was made, then in all that can be found.
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
	// It has moved: look for it.
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

// Program opens the program in the slot.
func (h *handle) Program() (prog *ebpf.Program, err error) {
	err = h.Locked(func() error {
		if h.left {
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
		// Replaced just now by another owner, or emptied by hand.
		if now, err := state.Occupant(h.slot); err != nil || now != id {
			continue
		}
		return nil, kernel.Errno("program in the slot", err)
	}
}

func (Family) Open(ctx context.Context, o *target.Opened, ref hook.Ref) (target.Handle, error) {
	d := Device{o}
	var h *handle
	name := string(ref)
	err := kernel.Retry(ctx, func() error {
		snap, err := d.Read()
		if err != nil {
			return err
		}
		defer snap.Close()
		switch {
		case snap.Free():
			return hook.Because(fs.ErrNotExist, "there is no member %q: nothing is attached", name)
		case snap.Chain == nil:
			return d.taken(snap)
		}
		i := snap.Chain.Named(name)
		if i < 0 {
			return noMember(snap.Chain.NoMember(ref))
		}
		h, err = d.open(snap.Root, snap.Chain, i)
		if err == nil {
			snap.Root = nil
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	h.releaseNetNS()
	return h, nil
}

// open makes a handle of a slot of a chain. On success the root is the handle's.
func (d Device) open(r root, c *state.Chain, i int) (*handle, error) {
	h := &handle{Base: target.Base{Opened: d.Opened}, root: r, slotID: c.Slots[i].MapID, chainID: c.ID}
	var err error
	if h.slot, err = h.slots.Open(h.slotID, false); err != nil {
		h.slots.Close()
		return nil, kernel.Again(err)
	}
	h.slots.Wait() // if its owner has just gone, it is too late to be another
	prog, err := state.Occupant(h.slot)
	if err == nil && prog == 0 {
		err = hook.Because(fs.ErrNotExist, "member %q is empty: its owner is gone; attach it again", c.Slots[i].Name)
	}
	if err != nil {
		h.slots.Close()
		return nil, err
	}
	return h, nil
}

// openPinnedSlot opens a member by its pin.
func OpenPinned(o *target.Opened, folder, member string) (target.Handle, error) {
	s := Device{o}
	r, err := openPinnedRoot(s.Pins, folder)
	if errors.Is(err, fs.ErrNotExist) && s.Pins.Has(folder, member) {
		return nil, hook.Because(fs.ErrNotExist, "the chain of %q has no link that is pinned", member).
			Hint("open it by device and name")
	}
	if err != nil {
		return nil, err
	}
	h, err := s.openIn(r, member)
	if err != nil {
		r.Close()
	}
	return h, err
}

func (d Device) openIn(r *linkRoot, member string) (*handle, error) {
	prog, err := r.Program()
	if err != nil {
		return nil, err
	}
	defer prog.Close()
	c, err := state.Find(prog)
	if err != nil {
		return nil, err
	}
	i := c.Named(member)
	if i < 0 {
		return nil, noMember(c.NoMember(hook.Ref(member)))
	}
	return d.open(r, c, i)
}

// findXDP finds the network namespace, opened, in which the device of that index
// carries the program, and tells what it is called there.
func findXDP(index int, prog uint32, found func(name string, mode hook.Mode)) (*kernel.NetNS, error) {
	return kernel.FindNetNS(func(ns *kernel.NetNS) bool {
		return rtnl.In(ns, func(conn *rtnl.Conn) error {
			d, err := conn.DeviceByIndex(index)
			if err != nil {
				return err
			}
			for _, x := range d.XDP {
				if x.Program == prog {
					found(d.Name, x.Mode)
					return nil
				}
			}
			return fs.ErrNotExist
		}) == nil
	})
}
