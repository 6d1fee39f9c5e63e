package programs_test

import (
	"encoding/binary"
	"net/netip"
	"slices"
)

// minPacket is the length of the shortest packet that BPF_PROG_TEST_RUN takes.
const minPacket = 14

const (
	typeIPv4 = 0x0800
	typeARP  = 0x0806
	typeVLAN = 0x8100
	typeQinQ = 0x88a8
	typeIPv6 = 0x86dd
)

const (
	protoHopByHop    = 0
	protoICMP        = 1
	protoTCP         = 6
	protoUDP         = 17
	protoRouting     = 43
	protoFragment    = 44
	protoESP         = 50
	protoAH          = 51
	protoNone        = 59
	protoDestination = 60
	protoCutShort    = 255
)

// packet joins layers, each made by one of the functions below.
func packet(layers ...[]byte) []byte {
	return slices.Concat(layers...)
}

func eth(etherType uint16) []byte {
	return binary.BigEndian.AppendUint16([]byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2}, etherType)
}

func vlan(id, etherType uint16) []byte {
	return binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, id), etherType)
}

func ipv4(src string, protocol byte) []byte {
	h := make([]byte, 20)
	h[0], h[8], h[9] = 0x45, 64, protocol
	copy(h[12:], netip.MustParseAddr(src).AsSlice())
	copy(h[16:], []byte{198, 51, 100, 1})
	return h
}

func ipv6(src string, next byte) []byte {
	h := make([]byte, 40)
	h[0], h[6], h[7] = 0x60, next, 64
	copy(h[8:], netip.MustParseAddr(src).AsSlice())
	copy(h[24:], netip.MustParseAddr("2001:db8:ffff::1").AsSlice())
	return h
}

// extension is an IPv6 extension header; its length is a multiple of 8.
func extension(next byte, length int) []byte {
	h := make([]byte, length)
	h[0], h[1] = next, byte(length/8-1)
	return h
}

// authentication is an IPv6 AH, the only extension header with a length in units of 4.
func authentication(next byte, length int) []byte {
	h := make([]byte, length)
	h[0], h[1] = next, byte(length/4-2)
	return h
}

func fragment(next byte, offset uint16) []byte {
	h := make([]byte, 8)
	h[0] = next
	binary.BigEndian.PutUint16(h[2:], offset|1) // more to come
	return h
}

// payload is n bytes that differ from one another.
func payload(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i)
	}
	return b
}
