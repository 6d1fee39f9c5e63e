package testenv

import (
	"crypto/ecdh"
	"encoding/binary"
	"errors"
	"net/netip"
	"testing"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// request makes a netlink request in the namespace. It skips the test where the kernel does not know
// what is asked for.
func (ns *NetNS) request(t testing.TB, what string, family int, m netlink.Message) (answers []netlink.Message) {
	t.Helper()
	ns.Do(t, func() {
		conn, err := netlink.Dial(family, nil)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		defer conn.Close()
		answers, err = conn.Execute(m)
		switch {
		case errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOENT):
			t.Skipf("this kernel has no such devices: %s", what)
		case err != nil:
			t.Fatalf("%s: %v", what, err)
		}
	})
	return answers
}

// attributes encodes netlink attributes.
func attributes(t testing.TB, fill func(*netlink.AttributeEncoder)) []byte {
	t.Helper()
	encoder := netlink.NewAttributeEncoder()
	fill(encoder)
	b, err := encoder.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// AddNetkit creates a netkit device (Linux 6.7), and its peer of the same name in another namespace, and
// sets both up. iproute2 can do that from 6.7 on, which is newer than Debian 12's.
func (ns *NetNS) AddNetkit(t testing.TB, name string, other *NetNS) {
	t.Helper()
	const ifinfomsg, peerInfo = unix.SizeofIfInfomsg, 1 // IFLA_NETKIT_PEER_INFO
	fd, err := unix.Open(other.Path(), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatalf("%s: %v", other.Path(), err)
	}
	defer unix.Close(fd)
	peer := append(make([]byte, ifinfomsg), attributes(t, func(a *netlink.AttributeEncoder) {
		a.String(unix.IFLA_IFNAME, name)
		a.Uint32(unix.IFLA_NET_NS_FD, uint32(fd))
	})...)
	ns.request(t, "netkit", unix.NETLINK_ROUTE, netlink.Message{
		Header: netlink.Header{Type: unix.RTM_NEWLINK, Flags: netlink.Request | netlink.Acknowledge | netlink.Create | netlink.Excl},
		Data: append(make([]byte, ifinfomsg), attributes(t, func(a *netlink.AttributeEncoder) {
			a.String(unix.IFLA_IFNAME, name)
			a.Nested(unix.IFLA_LINKINFO, func(a *netlink.AttributeEncoder) error {
				a.String(unix.IFLA_INFO_KIND, "netkit")
				a.Nested(unix.IFLA_INFO_DATA, func(a *netlink.AttributeEncoder) error {
					a.Bytes(peerInfo, peer)
					return nil
				})
				return nil
			})
		})...),
	})
	for _, end := range []*NetNS{ns, other} {
		end.IP(t, "link", "set", name, "up")
	}
}

// AddWireGuard creates a WireGuard device (Linux 5.6) on both sides of the pair, each the other's peer.
func (p *Pair) AddWireGuard(t testing.TB, name string) {
	t.Helper()
	p.Server.AddDevice(t, name, "type", "wireguard")
	p.Client.AddDevice(t, name, "type", "wireguard")
	key := func(number byte) *ecdh.PrivateKey {
		k, err := ecdh.X25519().NewPrivateKey(append(make([]byte, 31), number))
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	server, client := key(1), key(2)
	p.Server.setWireGuard(t, name, server, client.PublicKey(), netip.AddrPort{})
	p.Client.setWireGuard(t, name, client, server.PublicKey(), netip.AddrPortFrom(ServerIPv4, wireGuardPort))
}

const wireGuardPort = 51820

// setWireGuard gives a device its key and its peer, which may have any IPv4 address: what `wg set` does.
func (ns *NetNS) setWireGuard(t testing.TB, name string, key *ecdh.PrivateKey, peer *ecdh.PublicKey, at netip.AddrPort) {
	t.Helper()
	const (
		setDevice                              = 1 // enum wg_cmd and so on, include/uapi/linux/wireguard.h
		ifname, privateKey, listenPort, peers  = 2, 3, 6, 8
		publicKey, endpoint, allowedIPs        = 1, 4, 9
		addressFamily, address, addressCIDRLen = 1, 2, 3
	)
	generic := func(cmd, version byte, fill func(*netlink.AttributeEncoder)) []byte {
		return append([]byte{cmd, version, 0, 0}, attributes(t, fill)...)
	}
	answers := ns.request(t, "wireguard", unix.NETLINK_GENERIC, netlink.Message{
		Header: netlink.Header{Type: unix.GENL_ID_CTRL, Flags: netlink.Request},
		Data: generic(unix.CTRL_CMD_GETFAMILY, 1, func(a *netlink.AttributeEncoder) {
			a.String(unix.CTRL_ATTR_FAMILY_NAME, "wireguard")
		}),
	})
	family, err := netlink.NewAttributeDecoder(answers[0].Data[4:])
	if err != nil {
		t.Fatal(err)
	}
	var id uint16
	for family.Next() {
		if family.Type() == unix.CTRL_ATTR_FAMILY_ID {
			id = family.Uint16()
		}
	}
	ns.request(t, "wireguard", unix.NETLINK_GENERIC, netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(id), Flags: netlink.Request | netlink.Acknowledge},
		Data: generic(setDevice, 1, func(a *netlink.AttributeEncoder) {
			a.String(ifname, name)
			a.Bytes(privateKey, key.Bytes())
			a.Uint16(listenPort, wireGuardPort)
			a.Nested(peers, func(a *netlink.AttributeEncoder) error {
				a.Nested(0, func(a *netlink.AttributeEncoder) error {
					a.Bytes(publicKey, peer.Bytes())
					if at.IsValid() {
						sockaddr := binary.NativeEndian.AppendUint16(nil, unix.AF_INET)
						sockaddr = binary.BigEndian.AppendUint16(sockaddr, at.Port())
						sockaddr = append(append(sockaddr, at.Addr().AsSlice()...), make([]byte, 8)...)
						a.Bytes(endpoint, sockaddr)
					}
					a.Nested(allowedIPs, func(a *netlink.AttributeEncoder) error {
						a.Nested(0, func(a *netlink.AttributeEncoder) error {
							a.Uint16(addressFamily, unix.AF_INET)
							a.Bytes(address, make([]byte, 4))
							a.Uint8(addressCIDRLen, 0)
							return nil
						})
						return nil
					})
					return nil
				})
				return nil
			})
		}),
	})
}
