package packet_test

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/packet"
)

var (
	here  = net.HardwareAddr{2, 0, 0, 0, 0, 1}
	there = net.HardwareAddr{2, 0, 0, 0, 0, 2}
)

func spec(p packet.Protocol, from, to string) packet.Spec {
	return packet.Spec{
		Protocol: p, From: netip.MustParseAddr(from), To: netip.MustParseAddr(to),
		FromPort: 40000, ToPort: 53, FromMAC: here, ToMAC: there,
	}
}

func build(t *testing.T, s packet.Spec) []byte {
	t.Helper()
	p, err := packet.Build(s)
	qt.Assert(t, qt.IsNil(err))
	return p
}

// Describe finds in a built packet what was asked for. TestStackTakes shows that the kernel
// accepts built packets, checksums included.
func TestBuildAndDescribe(t *testing.T) {
	syn := spec(packet.TCP, "192.0.2.1", "198.51.100.7")
	syn.Flags = 2
	ack := spec(packet.TCP, "2001:db8::1", "2001:db8::2")
	ack.Flags = 0x12
	tagged := spec(packet.ICMP, "2001:db8::1", "2001:db8::2")
	tagged.VLAN = 7
	long := spec(packet.UDP, "192.0.2.1", "198.51.100.7")
	long.Size = 1001
	for _, tc := range []struct {
		spec packet.Spec
		want string
		size int
	}{
		{spec(packet.UDP, "192.0.2.1", "198.51.100.7"), "IPv4 192.0.2.1:40000 > 198.51.100.7:53 UDP", 42},
		{spec(packet.UDP, "2001:db8::1", "2001:db8::2"), "IPv6 [2001:db8::1]:40000 > [2001:db8::2]:53 UDP", 62},
		{spec(packet.ICMP, "192.0.2.1", "198.51.100.7"), "IPv4 192.0.2.1 > 198.51.100.7 ICMP echo request", 42},
		{syn, "IPv4 192.0.2.1:40000 > 198.51.100.7:53 TCP SYN", 54},
		{ack, "IPv6 [2001:db8::1]:40000 > [2001:db8::2]:53 TCP SYN,ACK", 74},
		{tagged, "vlan 7 IPv6 2001:db8::1 > 2001:db8::2 ICMPv6 echo request", 66},
		{long, "IPv4 192.0.2.1:40000 > 198.51.100.7:53 UDP", 1001},
	} {
		p := build(t, tc.spec)
		qt.Check(t, qt.Equals(packet.Describe(p, ""), tc.want))
		qt.Check(t, qt.Equals(packet.MACs(p, ""), "02:00:00:00:00:01 > 02:00:00:00:00:02"))
		qt.Check(t, qt.HasLen(p, tc.size))
		for i := range p { // Describe never panics, and never returns an empty string
			qt.Check(t, qt.Not(qt.Equals(packet.Describe(p[:i], ""), "")))
		}
		qt.Check(t, qt.StringContains(packet.Describe(p[:20], ""), "cut short"))
	}
}

func TestBuildRefuses(t *testing.T) {
	good := spec(packet.UDP, "192.0.2.1", "198.51.100.7")
	for _, tc := range []struct {
		spoil func(*packet.Spec)
		want  string
	}{
		{func(s *packet.Spec) { s.To = netip.MustParseAddr("::1") }, "one is IPv4, the other IPv6"},
		{func(s *packet.Spec) { s.To = netip.Addr{} }, "needs two addresses"},
		{func(s *packet.Spec) { s.FromMAC = nil }, "6 bytes"},
		{func(s *packet.Spec) { s.VLAN = 4095 }, "1 to 4094"},
		{func(s *packet.Spec) { s.Size = packet.MaxSize + 1 }, "at most 65535"},
	} {
		s := good
		tc.spoil(&s)
		_, err := packet.Build(s)
		qt.Check(t, qt.ErrorMatches(err, ".*"+tc.want+".*"))
	}
}

func TestDescribe(t *testing.T) {
	for _, tc := range []struct{ hex, want string }{
		{"", "too short for Ethernet"},
		{"ffffffffffff 020000000001 88cc 00", "EtherType 0x88cc 02:00:00:00:00:01 > ff:ff:ff:ff:ff:ff"},
		{"ffffffffffff 020000000001 0806 0001 0800 06 04 0001 020000000001 0a000001 000000000000 0a000002", "ARP who has 10.0.0.2, says 10.0.0.1"},
		{"ffffffffffff 020000000001 0806 0001 0800 06 04 0002 020000000001 0a000001 000000000000 0a000002", "ARP 10.0.0.1 is at 02:00:00:00:00:01"},
		{"020000000002 020000000001 0800 45000014000000b94011 0000 0a000001 0a000002", "IPv4 10.0.0.1 > 10.0.0.2 UDP fragment at 1480"},
		{"020000000002 020000000001 0800 45000014000000004063 0000 0a000001 0a000002", "IPv4 10.0.0.1 > 10.0.0.2 protocol 99"},
		// IPv4 options, and hop-by-hop options before a UDP header.
		{"020000000002 020000000001 0800 4600001c000000004011 0000 0a000001 0a000002 01010101 9c400035 0008 0000", "IPv4 10.0.0.1:40000 > 10.0.0.2:53 UDP"},
		{"020000000002 020000000001 86dd 60000000 0010 00 40" + strings.Repeat("00", 15) + "01" + strings.Repeat("00", 15) + "02" + "1100000000000000 9c400035 0008 0000", "IPv6 [::1]:40000 > [::2]:53 UDP"},
		{"020000000002 020000000001 86dd 60000000 0010 2c 40" + strings.Repeat("00", 15) + "01" + strings.Repeat("00", 15) + "02" + "11000009 00000000", "IPv6 ::1 > ::2 UDP fragment at 8"},
		{"020000000002 020000000001 88a8 0005 8100 0006 0800", "vlan 5 vlan 6 IPv4 cut short"},
	} {
		b, err := hex.DecodeString(strings.ReplaceAll(tc.hex, " ", ""))
		qt.Assert(t, qt.IsNil(err))
		qt.Check(t, qt.Equals(packet.Describe(b, ""), tc.want))
	}
}

func TestParseFlags(t *testing.T) {
	set, err := packet.ParseFlags("syn, ACK")
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(set, 0x12))
	_, err = packet.ParseFlags("syn,xmas")
	qt.Check(t, qt.ErrorMatches(err, `unknown flag "xmas" \(known: fin, syn, .*`))
}

// file is a capture file under construction.
type file struct {
	order binary.AppendByteOrder
	bytes.Buffer
}

func (f *file) words(words ...uint32) {
	for _, w := range words {
		f.Write(f.order.AppendUint32(nil, w))
	}
}

func pcap(order binary.AppendByteOrder, magic, linkType uint32, packets ...[]byte) *file {
	f := &file{order: order}
	f.words(magic)
	f.Write(order.AppendUint16(order.AppendUint16(nil, 2), 4)) // the version
	f.words(0, 0, 65535, linkType)
	for _, p := range packets {
		f.words(1, 2, uint32(len(p)), uint32(len(p)))
		f.Write(p)
	}
	return f
}

// block appends a pcapng block.
func (f *file) block(kind uint32, body []byte) {
	for len(body)%4 != 0 {
		body = append(body, 0)
	}
	f.words(kind, uint32(len(body)+12))
	f.Write(body)
	f.words(uint32(len(body) + 12))
}

func pcapng(order binary.AppendByteOrder, linkType uint16, packets ...[]byte) *file {
	f := &file{order: order}
	f.section()
	f.iface(linkType)
	for _, p := range packets {
		f.enhanced(0, len(p), p)
	}
	return f
}

func (f *file) section() {
	b := f.order.AppendUint32(nil, 0x1a2b3c4d)
	f.block(0x0a0d0d0a, append(f.order.AppendUint16(b, 1), 0, 0, 255, 255, 255, 255, 255, 255, 255, 255))
}

func (f *file) iface(linkType uint16) {
	f.block(1, f.order.AppendUint32(f.order.AppendUint16(f.order.AppendUint16(nil, linkType), 0), 0))
}

func (f *file) enhanced(iface uint32, length int, p []byte) {
	body := f.order.AppendUint32(nil, iface)
	body = append(body, 0, 0, 0, 0, 0, 0, 0, 0)
	body = f.order.AppendUint32(f.order.AppendUint32(body, uint32(len(p))), uint32(length))
	f.block(6, append(body, p...))
}

func readAll(t *testing.T, in io.Reader) (list [][]byte, err error) {
	t.Helper()
	c, err := packet.NewCapture(in)
	if err != nil {
		return nil, err
	}
	for {
		p, err := c.Next()
		if errors.Is(err, io.EOF) {
			return list, nil
		}
		if err != nil {
			return list, err
		}
		list = append(list, p.Data)
	}
}

func TestCapture(t *testing.T) {
	want := [][]byte{build(t, spec(packet.UDP, "192.0.2.1", "198.51.100.7")), {1, 2, 3, 4, 5}, build(t, spec(packet.TCP, "2001:db8::1", "2001:db8::2"))}
	for _, order := range []binary.AppendByteOrder{binary.LittleEndian, binary.BigEndian} {
		for _, magic := range []uint32{0xa1b2c3d4, 0xa1b23c4d} {
			got, err := readAll(t, pcap(order, magic, 1, want...))
			qt.Assert(t, qt.IsNil(err))
			qt.Assert(t, qt.DeepEquals(got, want))
		}
		f := pcapng(order, 1, want[:2]...)
		f.block(5, make([]byte, 17)) // statistics, which the reader skips
		f.section()
		f.iface(1)
		f.block(3, append(f.order.AppendUint32(nil, uint32(len(want[2]))), want[2]...))
		got, err := readAll(t, f)
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.DeepEquals(got, want))
	}

	// The reader knows that a captured packet was cut.
	f := pcap(binary.LittleEndian, 0xa1b2c3d4, 1)
	f.words(1, 2, 3, 1500)
	f.Write([]byte{1, 2, 3})
	c, err := packet.NewCapture(f)
	qt.Assert(t, qt.IsNil(err))
	p, err := c.Next()
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(p.Length, 1500))
	qt.Check(t, qt.IsTrue(p.Truncated()))
}

func TestCaptureRefuses(t *testing.T) {
	whole := pcap(binary.LittleEndian, 0xa1b2c3d4, 1, make([]byte, 60)).Bytes()
	huge := slices.Clone(whole[:24])
	huge = append(huge, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255, 255, 255, 255, 255)
	ng := pcapng(binary.LittleEndian, 1, make([]byte, 60)).Bytes()
	stray := &file{order: binary.LittleEndian}
	stray.section()
	stray.enhanced(3, 60, make([]byte, 60))
	for _, tc := range []struct {
		file []byte
		want string
	}{
		{nil, "it is empty, so it is not a capture file"},
		{[]byte("hello, world"), "it begins with 68656c6c: neither pcap nor pcapng; .*"},
		{whole[:10], "it ends in the middle of packet 1: .*"},
		{whole[:30], "it ends in the middle of packet 1: .*"},
		{whole[:40], "it ends in the middle of packet 1: .*"},
		{whole[:80], "it ends in the middle of packet 1: .*"},
		{huge, "it is broken at packet 1: capture length exceeds .*"},
		{pcap(binary.BigEndian, 0xa1b2c3d4, 113).Bytes(), `its link type is 113 \(Linux cooked, as of "tcpdump -i any"\): packets with an Ethernet header are needed, .*`},
		{pcapng(binary.LittleEndian, 999, make([]byte, 60)).Bytes(), `its link type is 999: .*`},
		{ng[:len(ng)-1], "it ends in the middle of packet 1: .*"},
		{stray.Bytes(), "it is broken at packet 1: Interface id 3 not present in section .*"},
	} {
		_, err := readAll(t, bytes.NewReader(tc.file))
		qt.Check(t, qt.ErrorMatches(err, tc.want))
	}
}

// Any file is read or refused, within memory and time that its length allows.
func FuzzCapture(f *testing.F) {
	for _, order := range []binary.AppendByteOrder{binary.LittleEndian, binary.BigEndian} {
		f.Add(pcap(order, 0xa1b2c3d4, 1, make([]byte, 60), []byte{1, 2, 3}).Bytes())
		f.Add(pcapng(order, 1, make([]byte, 60), []byte{1, 2, 3}).Bytes())
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := packet.NewCapture(bytes.NewReader(b))
		if err != nil {
			return
		}
		for total := 0; ; {
			p, err := c.Next()
			if err != nil {
				return
			}
			if total += len(p.Data); total > len(b) {
				t.Fatalf("%d bytes of packets from a file of %d", total, len(b))
			}
			packet.Describe(p.Data, "")
		}
	})
}

func FuzzDescribe(f *testing.F) {
	for _, s := range []packet.Spec{spec(packet.UDP, "192.0.2.1", "198.51.100.7"), spec(packet.TCP, "2001:db8::1", "2001:db8::2"), spec(packet.ICMP, "::1", "::2")} {
		p, err := packet.Build(s)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(p)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if s := packet.Describe(b, ""); s == "" || strings.ContainsAny(s, "\n\x00") {
			t.Fatalf("%q", s)
		}
	})
}

// A packet without Ethernet header is built, described and read from a raw capture.
func TestWithoutEthernet(t *testing.T) {
	for _, s := range []packet.Spec{spec(packet.UDP, "192.0.2.1", "198.51.100.7"), spec(packet.TCP, "2001:db8::1", "2001:db8::2")} {
		whole := build(t, s)
		want := packet.Describe(whole, "")
		s.Begins = hook.BeginsIP
		_, err := packet.Build(s)
		qt.Check(t, qt.ErrorMatches(err, ".*no Ethernet address"))
		s.FromMAC, s.ToMAC = nil, nil
		p := build(t, s)
		qt.Check(t, qt.DeepEquals(p, whole[14:]))
		qt.Check(t, qt.Equals(packet.Describe(p, hook.BeginsIP), want))
		qt.Check(t, qt.Equals(packet.MACs(p, hook.BeginsIP), ""))

		for _, f := range []*file{pcap(binary.LittleEndian, 0xa1b2c3d4, 101, p), pcapng(binary.LittleEndian, 101, p)} {
			c, err := packet.NewCapture(f)
			qt.Assert(t, qt.IsNil(err))
			got, err := c.Next()
			qt.Assert(t, qt.IsNil(err))
			qt.Check(t, qt.DeepEquals(got, &packet.Captured{Data: p, Length: len(p), Begins: hook.BeginsIP}))
		}
	}
	qt.Check(t, qt.Equals(packet.Describe([]byte{0x45}, hook.BeginsIP), "IPv4 cut short"))
	qt.Check(t, qt.Equals(packet.Describe(nil, hook.BeginsIP), "not IP, begins with "))
	_, err := packet.Build(packet.Spec{From: netip.MustParseAddr("::1"), To: netip.MustParseAddr("::1"), Begins: hook.BeginsOther})
	qt.Check(t, qt.ErrorMatches(err, ".*neither an Ethernet header nor their own IP header.*"))
}
