package rtnl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"

	"github.com/cilium/ebpf"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Features of a device in native mode (enum netdev_xdp_act, linux/netdev.h).
const (
	XDPBasic    = 1 << 0
	XDPRedirect = 1 << 1
	XDPOffload  = 1 << 4
	XDPFrags    = 1 << 5
)

// The "netdev" family of generic netlink (linux/netdev.h, Linux 6.3).
const (
	netdevFamily      = "netdev"
	netdevCmdDevGet   = 1
	netdevIfindex     = 1
	netdevXDPFeatures = 3
)

// XDPFeatures returns the features that the driver of a device offers. The
// device is in the calling thread's namespace. The error is
// ebpf.ErrNotSupported before Linux 6.3.
func XDPFeatures(index int) (uint64, error) {
	conn, err := netlink.Dial(unix.NETLINK_GENERIC, nil)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	family, err := genericFamily(conn, netdevFamily)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, fmt.Errorf("%w (needs Linux 6.3)", ebpf.ErrNotSupported)
	}
	if err != nil {
		return 0, err
	}
	ae := netlink.NewAttributeEncoder()
	ae.Uint32(netdevIfindex, uint32(index))
	answer, err := generic(conn, family, netdevCmdDevGet, ae)
	if err != nil {
		return 0, err
	}
	for answer.Next() {
		if answer.Type() == netdevXDPFeatures {
			return answer.Uint64(), answer.Err()
		}
	}
	return 0, answer.Err()
}

// genericFamily looks up the number of a family. The error is fs.ErrNotExist
// when the kernel has no such family.
func genericFamily(conn *netlink.Conn, name string) (uint16, error) {
	ae := netlink.NewAttributeEncoder()
	ae.String(unix.CTRL_ATTR_FAMILY_NAME, name)
	answer, err := generic(conn, unix.GENL_ID_CTRL, unix.CTRL_CMD_GETFAMILY, ae)
	if err != nil {
		return 0, err
	}
	for answer.Next() {
		if answer.Type() == unix.CTRL_ATTR_FAMILY_ID {
			return answer.Uint16(), nil
		}
	}
	return 0, kernel.Join(answer.Err(), fs.ErrNotExist)
}

// generic sends one request to a generic netlink family and returns the answer.
func generic(conn *netlink.Conn, family uint16, cmd uint8, ae *netlink.AttributeEncoder) (*netlink.AttributeDecoder, error) {
	const headerSize = 4 // size of struct genlmsghdr
	header := binary.NativeEndian.AppendUint16([]byte{cmd, 1}, 0)
	msgs, err := Request(conn, netlink.HeaderType(family), 0, header, ae)
	if err != nil {
		return nil, err
	}
	if len(msgs) == 0 || len(msgs[0].Data) < headerSize {
		return nil, errors.New("generic netlink: short answer")
	}
	return netlink.NewAttributeDecoder(msgs[0].Data[headerSize:])
}
