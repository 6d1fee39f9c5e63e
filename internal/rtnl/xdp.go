package rtnl

import (
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

// ReplaceXDP replaces the program of descriptor old, or no program when old is
// -1, by the program of descriptor fd, or by none when fd is -1.
//
// The error is EEXIST when another program is attached, and EBUSY when a link
// holds the device (dev_xdp_attach, net/core/dev.c).
func (c *Conn) ReplaceXDP(index, fd, old int, mode hook.Mode) error {
	ae := netlink.NewAttributeEncoder()
	ae.Nested(unix.IFLA_XDP, func(nae *netlink.AttributeEncoder) error {
		nae.Int32(unix.IFLA_XDP_FD, int32(fd))
		nae.Int32(unix.IFLA_XDP_EXPECTED_FD, int32(old))
		nae.Uint32(unix.IFLA_XDP_FLAGS, unix.XDP_FLAGS_REPLACE|Flags(mode))
		return nil
	})
	_, err := Request(c.nl, unix.RTM_SETLINK, netlink.Acknowledge, ifinfomsg(index), ae)
	return err
}
