package rtnl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// skipStats keeps counters out of answers (RTEXT_FILTER_SKIP_STATS, linux/rtnetlink.h).
const skipStats = 1 << 3

// altNameSize is ALTIFNAMSIZ (linux/if.h): the buffer size of an alternative
// name.
const altNameSize = 128

// A Device is a network device and the XDP programs on it.
type Device struct {
	Index int
	Name  string
	Type  uint16 // of its link layer: ARPHRD_* (linux/if_arp.h)
	Kind  string // "veth", "vrf", ...; empty for hardware
	// Multipoint says of a tunnel that it has no remote address.
	Multipoint bool
	MTU        int
	// Lower is the device that this one is made on, Master the one that it is a port or
	// slave of: their indexes, 0 for none in this network namespace.
	Lower, Master int
	// Qdisc is the kind of the root qdisc.
	Qdisc string
	// AltNames are its alternative names.
	AltNames []string
	// XDP are the attached programs, at most one for each mode.
	XDP []XDP
}

// Begins says what packets on the device begin with.
func (d *Device) Begins() hook.Begins {
	switch d.Type {
	case unix.ARPHRD_ETHER, unix.ARPHRD_LOOPBACK:
		return ""
	case unix.ARPHRD_NONE, unix.ARPHRD_RAWIP, unix.ARPHRD_PPP:
		return hook.BeginsIP
	case unix.ARPHRD_TUNNEL, unix.ARPHRD_TUNNEL6, unix.ARPHRD_SIT, unix.ARPHRD_IPGRE, unix.ARPHRD_IP6GRE:
		// Before Linux 5.14, and on GRE without a remote address, a program sees the outer
		// header, of the packet in which this one came (__ipgre_rcv, net/ipv4/ip_gre.c).
		if kernel.Since(5, 14) && (d.Type != unix.ARPHRD_IPGRE || !d.Multipoint) {
			return hook.BeginsIP
		}
	}
	return hook.BeginsOther
}

// XDP is a program on a device. rtnetlink does not tell whether a link or
// netlink attached it.
type XDP struct {
	Mode    hook.Mode
	Program uint32 // id
}

// Software returns the program that runs on the host, not on the card. The
// kernel allows one, native or generic.
func (d *Device) Software() (XDP, bool) {
	for _, x := range d.XDP {
		if x.Mode != hook.ModeOffload {
			return x, true
		}
	}
	return XDP{}, false
}

// A Conn is a connection to the rtnetlink of one network namespace: the
// namespace of the thread that called Dial, whichever thread uses the
// connection later.
type Conn struct {
	nl   *netlink.Conn
	wide bool // see widen
}

// Dial connects to the namespace of the calling thread.
func Dial() (*Conn, error) {
	nl, err := netlink.Dial(unix.NETLINK_ROUTE, nil)
	if err != nil {
		return nil, fmt.Errorf("rtnetlink: %w", kernel.Explain(err))
	}
	// Errors then have messages. Linux before 4.12 refuses the option.
	_ = nl.SetOption(netlink.ExtendedAcknowledge, true)
	return &Conn{nl: nl}, nil
}

// In runs fn with a connection to a namespace.
func In(ns *kernel.NetNS, fn func(*Conn) error) error {
	return ns.Do(func() error {
		conn, err := Dial()
		if err != nil {
			return err
		}
		defer conn.Close()
		return fn(conn)
	})
}

// Close releases the connection.
func (c *Conn) Close() error { return c.nl.Close() }

// Request sends a request, of a header and attributes, and returns the answer.
func Request(nl *netlink.Conn, kind netlink.HeaderType, flags netlink.HeaderFlags, header []byte, ae *netlink.AttributeEncoder) ([]netlink.Message, error) {
	attrs, err := ae.Encode()
	if err != nil {
		return nil, err
	}
	return nl.Execute(netlink.Message{
		Header: netlink.Header{Type: kind, Flags: netlink.Request | flags},
		Data:   append(header, attrs...),
	})
}

// Device returns the device of that name or alternative name. The error is
// fs.ErrNotExist when there is none.
func (c *Conn) Device(name string) (*Device, error) {
	if name == "" {
		return nil, hook.Because(hook.ErrUsage, "the device name is empty")
	}
	// The kernel would use only the part before the zero.
	if strings.Contains(name, "\x00") || len(name) >= altNameSize {
		return nil, hook.Because(fs.ErrNotExist, "there is no device %.40q in this network namespace", name)
	}
	ae := netlink.NewAttributeEncoder()
	if len(name) < unix.IFNAMSIZ {
		ae.String(unix.IFLA_IFNAME, name)
	} else {
		ae.String(unix.IFLA_ALT_IFNAME, name)
	}
	return c.device(0, ae, fmt.Sprintf("device %q", name))
}

// DeviceByIndex returns the device of that index.
func (c *Conn) DeviceByIndex(index int) (*Device, error) {
	return c.device(index, netlink.NewAttributeEncoder(), fmt.Sprintf("device with index %d", index))
}

func (c *Conn) device(index int, ae *netlink.AttributeEncoder, what string) (*Device, error) {
	devices, err := c.get(index, ae, 0)
	switch {
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ERANGE), err == nil && len(devices) == 0:
		return nil, hook.Because(fs.ErrNotExist, "there is no %s in this network namespace", what)
	case err != nil:
		return nil, fmt.Errorf("%s: %w", what, kernel.Explain(err))
	}
	return &devices[0], nil
}

// Devices returns all devices of the namespace.
func (c *Conn) Devices() ([]Device, error) {
	devices, err := c.get(0, netlink.NewAttributeEncoder(), netlink.Dump)
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", kernel.Explain(err))
	}
	return devices, nil
}

func (c *Conn) get(index int, ae *netlink.AttributeEncoder, flags netlink.HeaderFlags) ([]Device, error) {
	ae.Uint32(unix.IFLA_EXT_MASK, skipStats)
	msgs, err := Request(c.nl, unix.RTM_GETLINK, flags, ifinfomsg(index), ae)
	if err != nil {
		return nil, err
	}
	var devices []Device
	for _, m := range msgs {
		if m.Header.Type != unix.RTM_NEWLINK {
			continue
		}
		d, err := parse(m.Data)
		if err != nil {
			return nil, err
		}
		devices = append(devices, d)
	}
	return devices, nil
}

// ifinfomsg returns a struct ifinfomsg (linux/rtnetlink.h) for any family.
func ifinfomsg(index int) []byte {
	b := make([]byte, unix.SizeofIfInfomsg)
	binary.NativeEndian.PutUint32(b[4:], uint32(index))
	return b
}

func parse(b []byte) (Device, error) {
	var d Device
	if len(b) < unix.SizeofIfInfomsg {
		return d, errors.New("rtnetlink: short message")
	}
	d.Type = binary.NativeEndian.Uint16(b[2:])
	d.Index = int(binary.NativeEndian.Uint32(b[4:]))
	ad, err := netlink.NewAttributeDecoder(b[unix.SizeofIfInfomsg:])
	if err != nil {
		return d, fmt.Errorf("rtnetlink: %w", err)
	}
	elsewhere := false // the lower device is in another namespace
	for ad.Next() {
		switch ad.Type() {
		case unix.IFLA_LINK:
			d.Lower = int(ad.Uint32())
		case unix.IFLA_LINK_NETNSID:
			elsewhere = true
		case unix.IFLA_MASTER:
			d.Master = int(ad.Uint32())
		case unix.IFLA_IFNAME:
			d.Name = ad.String()
		case unix.IFLA_PROP_LIST:
			ad.Nested(func(nad *netlink.AttributeDecoder) error {
				for nad.Next() {
					if nad.Type() == unix.IFLA_ALT_IFNAME {
						d.AltNames = append(d.AltNames, nad.String())
					}
				}
				return nil
			})
		case unix.IFLA_BROADCAST: // of a tunnel this is the remote address
			d.Multipoint = !slices.ContainsFunc(ad.Bytes(), func(b byte) bool { return b != 0 })
		case unix.IFLA_MTU:
			d.MTU = int(ad.Uint32())
		case unix.IFLA_QDISC:
			d.Qdisc = ad.String()
		case unix.IFLA_LINKINFO:
			ad.Nested(func(nad *netlink.AttributeDecoder) error {
				for nad.Next() {
					if nad.Type() == unix.IFLA_INFO_KIND {
						d.Kind = nad.String()
					}
				}
				return nil
			})
		case unix.IFLA_XDP:
			ad.Nested(func(nad *netlink.AttributeDecoder) error {
				d.XDP = parseXDP(nad)
				return nil
			})
		}
	}
	if elsewhere {
		d.Lower = 0
	}
	return d, ad.Err()
}

// parseXDP reads the ids by mode. It ignores IFLA_XDP_ATTACHED: its values
// (XDP_ATTACHED_*) look like the flags for attaching but differ from them.
func parseXDP(ad *netlink.AttributeDecoder) []XDP {
	var list []XDP
	for ad.Next() {
		var mode hook.Mode
		switch ad.Type() {
		case unix.IFLA_XDP_DRV_PROG_ID:
			mode = hook.ModeNative
		case unix.IFLA_XDP_SKB_PROG_ID:
			mode = hook.ModeGeneric
		case unix.IFLA_XDP_HW_PROG_ID:
			mode = hook.ModeOffload
		default:
			continue
		}
		list = append(list, XDP{mode, ad.Uint32()})
	}
	return list
}
