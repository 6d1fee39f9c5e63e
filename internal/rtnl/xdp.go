package rtnl

import (
	"errors"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
)

// Flags returns the XDP_FLAGS_* value that requests a mode.
func Flags(m hook.Mode) uint32 {
	switch m {
	case hook.ModeNative:
		return unix.XDP_FLAGS_DRV_MODE
	case hook.ModeGeneric:
		return unix.XDP_FLAGS_SKB_MODE
	case hook.ModeOffload:
		return unix.XDP_FLAGS_HW_MODE
	}
	return 0
}

// ErrUpper: a device above has an XDP program, and as long as it has, the kernel changes
// nothing on the devices below (dev_xdp_attach, net/core/dev.c; Linux 5.15).
var ErrUpper = hook.Because(hook.ErrBusy, "a device above has an XDP program")

// ReplaceXDP replaces the program of descriptor old, or no program when old is
// -1, by the program of descriptor fd, or by none when fd is -1.
//
// The error is EEXIST when another program is attached, EBUSY when a link holds the
// device (dev_xdp_attach, net/core/dev.c), and ErrUpper.
func (c *Conn) ReplaceXDP(index, fd, old int, mode hook.Mode) error {
	ae := netlink.NewAttributeEncoder()
	ae.Nested(unix.IFLA_XDP, func(nae *netlink.AttributeEncoder) error {
		nae.Int32(unix.IFLA_XDP_FD, int32(fd))
		nae.Int32(unix.IFLA_XDP_EXPECTED_FD, int32(old))
		nae.Uint32(unix.IFLA_XDP_FLAGS, unix.XDP_FLAGS_REPLACE|Flags(mode))
		return nil
	})
	_, err := Request(c.nl, unix.RTM_SETLINK, netlink.Acknowledge, ifinfomsg(index), ae)
	if errors.Is(err, unix.EEXIST) && strings.Contains(Reason(err), "upper device") {
		return c.upper(index)
	}
	return err
}

// CheckXDP returns ErrUpper where the kernel takes no program for that reason. It replaces
// no program by none, which changes nothing whatever the device has.
func (c *Conn) CheckXDP(index int, mode hook.Mode) error {
	if err := c.ReplaceXDP(index, -1, -1, mode); errors.Is(err, ErrUpper) {
		return err
	}
	return nil
}

// Reason returns the kernel's words for an error of netlink (the extended
// acknowledgement), or "".
func Reason(err error) string {
	var op *netlink.OpError
	if errors.As(err, &op) {
		return op.Message
	}
	return ""
}

// upper returns ErrUpper with the devices above that have a program.
func (c *Conn) upper(index int) error {
	const until = "until it is off, the kernel changes no program below"
	devices, err := c.Devices()
	if err != nil {
		return hook.Because(ErrUpper, "a device above has an XDP program, and %s", until)
	}
	var self Device
	for _, d := range devices {
		if d.Index == index {
			self = d
		}
	}
	for _, d := range devices {
		if _, has := d.Software(); has && (d.Lower == index || d.Index == self.Master) {
			return hook.Because(ErrUpper, "%s is above %s and has an XDP program, and %s", d.Name, self.Name, until).
				Hint("take the program off %s, and attach it again after this", d.Name)
		}
	}
	return hook.Because(ErrUpper, "a device above %s has an XDP program, and %s; the device is in another network namespace, as a macvlan or VLAN of a container is", self.Name, until).
		Hint("take the program off there first")
}
