package programs_test

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/programs"
)

// attachTCX loads a program for a TCX hook and attaches it to a device, behind all others.
func attachTCX(t *testing.T, ns *testenv.NetNS, ifindex int, h hook.Hook, name string, c constants) *ebpf.Collection {
	t.Helper()
	testenv.NeedHook(t, h)
	coll := loadFor(t, h, name, c)
	attach := map[hook.Hook]ebpf.AttachType{hook.TCXIngress: ebpf.AttachTCXIngress, hook.TCXEgress: ebpf.AttachTCXEgress}[h]
	ns.Do(t, func() {
		l, err := link.AttachTCX(link.TCXOptions{
			Interface: ifindex, Program: coll.Programs[programs.Function(name, h)], Attach: attach, Anchor: link.Tail(),
		})
		qt.Assert(t, qt.IsNil(err))
		t.Cleanup(func() { l.Close() })
	})
	return coll
}

func udpCounted(t *testing.T, coll *ebpf.Collection, etherType uint16) programs.Traffic {
	t.Helper()
	return counted(t, coll)[programs.Protocol{EtherType: etherType, Protocol: protoUDP}]
}

const datagram = 14 + 20 + 8 + 8 // bytes of each packet that a pair sends, with IPv4

// A packet that droplist drops does not arrive, and the next program does not see it; the others pass.
func TestTCXIngress(t *testing.T) {
	testenv.CheckLeaks(t)
	pair := testenv.NewPair(t)
	list := attachTCX(t, pair.Server, pair.ServerIfindex, hook.TCXIngress, "droplist", nil)
	count := attachTCX(t, pair.Server, pair.ServerIfindex, hook.TCXIngress, "count", nil)

	qt.Check(t, qt.Equals(pair.Passed(t, 7000, 10), 10))
	qt.Check(t, qt.Equals(udpCounted(t, count, typeIPv4), programs.Traffic{Packets: 10, Bytes: 10 * datagram}))

	putPrefix(t, list, testenv.ClientIPv4.String()+"/32")
	qt.Check(t, qt.Equals(pair.Passed(t, 7000, 10), 0))
	qt.Check(t, qt.Equals(pair.Passed6(t, 7000, 10), 10))
	qt.Check(t, qt.Equals(drops(t, list, testenv.ClientIPv4.String()+"/32"), 10))

	putPrefix(t, list, testenv.ClientIPv6.String()+"/64")
	qt.Check(t, qt.Equals(pair.Passed6(t, 7000, 10), 0))
	qt.Check(t, qt.Equals(udpCounted(t, count, typeIPv4).Packets, 10))
	qt.Check(t, qt.Equals(udpCounted(t, count, typeIPv6), programs.Traffic{Packets: 10, Bytes: 10 * (datagram + 20)}))
}

func TestTCXEgress(t *testing.T) {
	testenv.CheckLeaks(t)
	pair := testenv.NewPair(t)
	list := attachTCX(t, pair.Server, pair.ServerIfindex, hook.TCXEgress, "droplist", nil)
	count := attachTCX(t, pair.Server, pair.ServerIfindex, hook.TCXEgress, "count", nil)

	qt.Check(t, qt.Equals(pair.Passed(t, 7000, 10), 10)) // the other direction
	qt.Check(t, qt.Equals(udpCounted(t, count, typeIPv4), programs.Traffic{}))
	qt.Check(t, qt.Equals(pair.Replied(t, 7000, 10), 10))
	qt.Check(t, qt.Equals(udpCounted(t, count, typeIPv4), programs.Traffic{Packets: 10, Bytes: 10 * datagram}))

	putPrefix(t, list, testenv.ServerIPv4.String()+"/32")
	qt.Check(t, qt.Equals(pair.Replied(t, 7000, 10), 0))
	qt.Check(t, qt.Equals(pair.Replied6(t, 7000, 10), 10))
	qt.Check(t, qt.Equals(drops(t, list, testenv.ServerIPv4.String()+"/32"), 10))
}

// sendFrame sends a frame from the client, as it is. The kernel keeps its first linear bytes in one piece,
// and the rest elsewhere if it is longer than a page.
func sendFrame(t *testing.T, pair *testenv.Pair, frame []byte, linear int) {
	t.Helper()
	pair.Client.Do(t, func() {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		qt.Assert(t, qt.IsNil(err))
		defer unix.Close(fd)
		qt.Assert(t, qt.IsNil(unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1)))
		header := make([]byte, 10) // struct virtio_net_hdr
		binary.NativeEndian.PutUint16(header[2:], uint16(linear))
		qt.Assert(t, qt.IsNil(unix.Sendto(fd, append(header, frame...), 0, &unix.SockaddrLinklayer{Ifindex: pair.ClientIfindex})))
	})
	pair.Settle(t)
}

// The kernel takes the first VLAN tag off, and it may have only the Ethernet header in one piece. A frame
// may also be cut off anywhere: nothing has checked it yet.
func TestTCXFrames(t *testing.T) {
	testenv.CheckLeaks(t)
	pair := testenv.NewPair(t)
	pair.Client.IP(t, "link", "set", pair.ClientDev, "mtu", "9000")
	pair.Server.IP(t, "link", "set", pair.ServerDev, "mtu", "9000")
	list := attachTCX(t, pair.Server, pair.ServerIfindex, hook.TCXIngress, "droplist", nil)
	count := attachTCX(t, pair.Client, pair.ClientIfindex, hook.TCXEgress, "count", nil)
	putPrefix(t, list, "192.0.2.0/24")
	putPrefix(t, list, "2001:db8::/32")

	v4, v6 := ipv4("192.0.2.1", protoUDP), ipv6("2001:db8::1", protoUDP)
	// To a TC program, these could be the beginning of an IP header.
	like4 := slices.Concat([]byte{0x46, 0, 0, 60, 0, 1}, eth(typeIPv4)[6:])
	like6 := slices.Concat([]byte{0x66, 0, 0, 0, 0, 1}, eth(typeIPv6)[6:])
	long := payload(5000)
	for _, test := range []struct {
		name   string
		frame  []byte
		prefix string // empty: passes
		is     programs.Protocol
	}{
		{"v4", packet(eth(typeIPv4), v4, payload(8)), "192.0.2.0/24", programs.Protocol{EtherType: typeIPv4, Protocol: protoUDP}},
		{"v4, long", packet(eth(typeIPv4), v4, long), "192.0.2.0/24", programs.Protocol{EtherType: typeIPv4, Protocol: protoUDP}},
		{"v6, long", packet(eth(typeIPv6), v6, long), "2001:db8::/32", programs.Protocol{EtherType: typeIPv6, Protocol: protoUDP}},
		{"tagged, long", packet(eth(typeVLAN), vlan(7, typeIPv6), v6, long), "2001:db8::/32", programs.Protocol{EtherType: typeIPv6, Protocol: protoUDP}},
		{
			"two tags, long", packet(eth(typeQinQ), vlan(7, typeVLAN), vlan(8, typeIPv4), v4, long),
			"192.0.2.0/24", programs.Protocol{EtherType: typeIPv4, Protocol: protoUDP},
		},
		{"MAC like v4", packet(like4, v4, payload(26)), "192.0.2.0/24", programs.Protocol{EtherType: typeIPv4, Protocol: protoUDP}},
		{"MAC like v6", packet(like6, v6, long), "2001:db8::/32", programs.Protocol{EtherType: typeIPv6, Protocol: protoUDP}},
		{"v4, cut off", packet(eth(typeIPv4), v4[:19]), "", programs.Protocol{EtherType: typeIPv4, Protocol: protoCutShort}},
		{"v6, cut off", packet(eth(typeIPv6), v6[:39]), "", programs.Protocol{EtherType: typeIPv6, Protocol: protoCutShort}},
		{"v4, whole", packet(eth(typeIPv4), v4), "192.0.2.0/24", programs.Protocol{EtherType: typeIPv4, Protocol: protoUDP}},
		{"MAC like v4, cut off", packet(like4, v4[:3]), "", programs.Protocol{EtherType: typeIPv4, Protocol: protoCutShort}},
		{"ARP", packet(eth(typeARP), long), "", programs.Protocol{EtherType: typeARP}},
	} {
		t.Run(test.name, func(t *testing.T) {
			sum := func() (n uint64) { return drops(t, list, "192.0.2.0/24") + drops(t, list, "2001:db8::/32") }
			before, droppedBefore, by := counted(t, count)[test.is], sum(), uint64(0)
			if test.prefix != "" {
				by = drops(t, list, test.prefix)
			}
			sendFrame(t, pair, test.frame, 14)

			after := counted(t, count)[test.is]
			qt.Check(t, qt.Equals(after.Packets-before.Packets, 1))
			qt.Check(t, qt.Equals(after.Bytes-before.Bytes, uint64(len(test.frame))))
			if test.prefix == "" {
				qt.Check(t, qt.Equals(sum(), droppedBefore))
			} else {
				qt.Check(t, qt.Equals(drops(t, list, test.prefix), by+1))
			}
		})
	}
}

// On devices without Ethernet, packets begin with the IP header, even if the next bytes look like an EtherType.
func TestTCXWithoutEthernet(t *testing.T) {
	testenv.CheckLeaks(t)
	ns := testenv.NewNetNS(t)
	tun, ifindex := ns.Tun(t, "tun0")
	ns.IP(t, "address", "add", "10.78.0.1/24", "dev", "tun0")

	begins := constants{"ld_link_header": 0}
	list := attachTCX(t, ns, ifindex, hook.TCXIngress, "droplist", begins)
	passed := attachTCX(t, ns, ifindex, hook.TCXIngress, "count", begins)
	sent := attachTCX(t, ns, ifindex, hook.TCXEgress, "count", begins)

	for _, source := range []string{"192.0.2.1", "8.0.69.1", "2001:db8::1", "2001:db8:86dd::1"} {
		addr := netip.MustParseAddr(source)
		p, etherType := packet(ipv4("192.0.2.1", protoUDP), payload(60)), uint16(typeIPv4)
		if addr.Is6() {
			p, etherType = packet(ipv6(source, protoUDP), payload(60)), typeIPv6
		} else {
			copy(p[12:], addr.AsSlice())
		}
		prefix := netip.PrefixFrom(addr, addr.BitLen()).String()
		write := func() {
			_, err := unix.Write(tun, p)
			qt.Assert(t, qt.IsNil(err))
		}

		before := udpCounted(t, passed, etherType)
		write()
		after := udpCounted(t, passed, etherType)
		qt.Check(t, qt.Equals(after.Packets-before.Packets, 1), qt.Commentf("%s", source))
		qt.Check(t, qt.Equals(after.Bytes-before.Bytes, uint64(len(p))))

		putPrefix(t, list, prefix)
		write()
		qt.Check(t, qt.Equals(drops(t, list, prefix), 1), qt.Commentf("%s", source))
		qt.Check(t, qt.Equals(udpCounted(t, passed, etherType), after))
	}

	ns.Do(t, func() {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		qt.Assert(t, qt.IsNil(err))
		defer unix.Close(fd)
		qt.Assert(t, qt.IsNil(unix.Sendto(fd, payload(8), 0, &unix.SockaddrInet4{Port: 7000, Addr: [4]byte{10, 78, 0, 2}})))
	})
	qt.Check(t, qt.Equals(udpCounted(t, sent, typeIPv4), programs.Traffic{Packets: 1, Bytes: datagram - 14}))
}
