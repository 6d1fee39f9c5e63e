package chains

import (
	"errors"
	"fmt"

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

// start makes a chain with one member, and a root link that carries it. In mode auto it is
// generic mode where the driver refuses, but for a program that may have frags yet.
func (d Device) start(dev rtnl.Device, mode hook.Mode, id uint64, loaded *load.Loaded, slot *ebpf.Map, member dispatch.Slot) (root, error) {
	chain := &state.Chain{ID: id, LastSeen: d.Seen(dev, mode), Plan: dispatch.Plan{Shape: loaded.Shape, Slots: []dispatch.Slot{member}}}
	built, err := state.Build(chain, []*ebpf.Map{slot}, nil)
	if err != nil {
		return nil, err
	}
	defer built.Close()
	r, err := d.Create(dev.Index, mode, built.Program)
	if mode == hook.ModeAuto && errors.Is(err, ebpf.ErrNotSupported) && !mayHaveFrags(loaded) {
		generic, genericErr := d.Create(dev.Index, hook.ModeGeneric, built.Program)
		if genericErr != nil {
			return nil, err
		}
		generic.(*linkRoot).refused = err.Error()
		r, err = generic, nil
	}
	if err != nil {
		return nil, err
	}
	know(r, built, chain)
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
		return newLinkRoot(l, d.Pins)
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

// FragsSupported loads a program for packets in fragments (xdp.frags). It returns nil
// if the kernel takes it, else the reason.
func FragsSupported() error {
	return kernel.Explain(state.Loads(dispatch.Shape{AttachType: ebpf.AttachXDP, Frags: true}, nil, nil, nil))
}
