package chains

import (
	"errors"
	"io/fs"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// Open returns a handle to a member; the caller closes it. The error is fs.ErrNotExist
// when there is no such member or its slot is empty, ErrStyle for a chain of libxdp,
// and ErrBusy when the device carries something else.
func (Family) Open(o *target.Opened, ref hook.Ref) (target.Handle, error) {
	d := Device{o}
	snap, err := d.Read()
	if err != nil {
		return nil, err
	}
	defer snap.Close()
	switch {
	case snap.Free():
		return nil, hook.Because(fs.ErrNotExist, "there is no member %q: nothing is attached", string(ref))
	case snap.Chain == nil:
		return nil, d.taken(snap)
	}
	h, err := d.openNamed(snap.Root, snap.Chain, string(ref))
	if err != nil {
		return nil, err
	}
	snap.Root = nil
	return h, nil
}

// openNamed makes a handle to the member of the name. On success the handle owns the root.
func (d Device) openNamed(r root, c *state.Chain, name string) (*handle, error) {
	i := c.Named(name)
	if i < 0 {
		return nil, noMember(c.NoMember(hook.Ref(name)))
	}
	return d.open(r, c, i)
}

// open makes a handle to the member at i. On success the handle owns the root.
func (d Device) open(r root, c *state.Chain, i int) (*handle, error) {
	h := &handle{Base: target.Base{Opened: d.Opened}, root: r, slotID: c.Slots[i].MapID, chainID: c.ID, slots: slotsOf(r, c)}
	var err error
	if h.slot, err = h.slots.Open(h.slotID, false); err != nil {
		h.slots.Close()
		return nil, kernel.Again(err)
	}
	h.slots.Wait() // if the owner has just gone, the slot is lost: let the kernel empty it
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

// OpenPinned opens a member by its pin; the caller closes the handle. The error is
// fs.ErrNotExist when there is no such pin, or when the chain's root link is not
// pinned.
func OpenPinned(o *target.Opened, folder, member string) (target.Handle, error) {
	d := Device{o}
	r, err := openPinnedRoot(d.Pins, folder)
	if errors.Is(err, fs.ErrNotExist) && d.Pins.Has(folder, member) {
		return nil, hook.Because(fs.ErrNotExist, "the chain of %q has no link that is pinned", member).
			Hint("open it by device and name")
	}
	if err != nil {
		return nil, err
	}
	h, err := d.openIn(r, member)
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
	c, err := find(r, prog)
	if err != nil {
		return nil, err
	}
	return d.openNamed(r, c, member)
}

// findXDP opens the network namespace in which the device with the index carries the
// program, and calls found with the device there. The caller closes the
// namespace.
func findXDP(index int, prog uint32, found func(d *rtnl.Device, mode hook.Mode)) (*kernel.NetNS, error) {
	return kernel.FindNetNS(func(ns *kernel.NetNS) error { return findXDPIn(ns, index, prog, found) })
}

// findXDPIn is findXDP in one namespace. The error is fs.ErrNotExist when there is no such
// device.
func findXDPIn(ns *kernel.NetNS, index int, prog uint32, found func(d *rtnl.Device, mode hook.Mode)) error {
	return rtnl.In(ns, func(conn *rtnl.Conn) error {
		d, err := conn.DeviceByIndex(index)
		if err != nil {
			return err
		}
		for _, x := range d.XDP {
			if x.Program == prog {
				found(d, x.Mode)
				return nil
			}
		}
		return fs.ErrNotExist
	})
}
