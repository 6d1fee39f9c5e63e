package packet

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/libdispatcher/dispatcher/hook"
)

// A Spec describes a packet to build. From and To must both be IPv4 or both be
// IPv6.
type Spec struct {
	Protocol Protocol
	From, To netip.Addr
	// FromPort and ToPort are UDP or TCP ports.
	FromPort, ToPort uint16
	// Flags are TCP flags, see [ParseFlags].
	Flags byte
	// Begins says what the packet begins with: its Ethernet header, or its IP header.
	Begins hook.Begins
	// FromMAC and ToMAC have 6 bytes each. A packet without Ethernet header has none.
	FromMAC, ToMAC net.HardwareAddr
	VLAN           uint16 // 0 for none
	// Size is the least length of the packet. A longer payload fills a shorter
	// packet.
	Size int
}

// A Protocol is a kind of packet that Build makes.
type Protocol int

// The protocols of a Spec. ICMP is an echo request; for IPv6 addresses it is an
// ICMPv6 one.
const (
	UDP Protocol = iota
	TCP
	ICMP
)

// MaxSize is the length of the longest packet that Build makes: the largest length
// that an IP header can hold.
const MaxSize = 65535

// Build makes a packet with correct checksums and a TTL of 64.
func Build(s Spec) ([]byte, error) {
	s.From, s.To = s.From.Unmap(), s.To.Unmap()
	switch {
	case !s.From.IsValid() || !s.To.IsValid():
		return nil, fmt.Errorf("a packet needs two addresses")
	case s.From.Is4() != s.To.Is4():
		return nil, fmt.Errorf("%s and %s: one is IPv4, the other IPv6", s.From, s.To)
	case s.Begins == hook.BeginsOther:
		return nil, fmt.Errorf("packets on the device begin with %v: give them as bytes (--hex)", s.Begins)
	case s.Begins != "" && (s.VLAN != 0 || s.FromMAC != nil || s.ToMAC != nil):
		return nil, fmt.Errorf("packets on the device begin with %v: they have no VLAN tag and no Ethernet address", s.Begins)
	case s.Begins == "" && len(s.FromMAC) != 6 || s.Begins == "" && len(s.ToMAC) != 6:
		return nil, fmt.Errorf("%s, %s: Ethernet addresses have 6 bytes", s.FromMAC, s.ToMAC)
	case s.VLAN > 4094:
		return nil, fmt.Errorf("vlan %d: VLAN ids are 1 to 4094", s.VLAN)
	case s.Size < 0 || s.Size > MaxSize:
		return nil, fmt.Errorf("%d bytes: a packet has at most %d", s.Size, MaxSize)
	}
	b := append(append([]byte{}, s.ToMAC...), s.FromMAC...)
	if s.VLAN != 0 {
		b = binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(b, typeVLAN), s.VLAN)
	}
	headers, etherType := 20, uint16(typeIPv4)
	if s.From.Is6() {
		headers, etherType = 40, typeIPv6
	}
	if s.Begins == "" {
		b = binary.BigEndian.AppendUint16(b, etherType)
	}
	t := s.transport(s.Size - len(b) - headers)
	if s.From.Is4() {
		h := make([]byte, 20)
		h[0], h[8], h[9] = 0x45, 64, s.number()
		binary.BigEndian.PutUint16(h[2:], uint16(20+len(t)))
		h[6] = 0x40 // do not fragment
		copy(h[12:], s.From.AsSlice())
		copy(h[16:], s.To.AsSlice())
		binary.BigEndian.PutUint16(h[10:], ^sum(0, h))
		return append(append(b, h...), t...), nil
	}
	h := make([]byte, 40)
	h[0], h[6], h[7] = 0x60, s.number(), 64
	binary.BigEndian.PutUint16(h[4:], uint16(len(t)))
	copy(h[8:], s.From.AsSlice())
	copy(h[24:], s.To.AsSlice())
	return append(append(b, h...), t...), nil
}

// number returns the protocol's number in an IP header.
func (s *Spec) number() byte {
	switch {
	case s.Protocol == TCP:
		return protoTCP
	case s.Protocol == UDP:
		return protoUDP
	case s.From.Is6():
		return protoICMPv6
	}
	return protoICMP
}

// transport makes the part behind the IP header.
func (s *Spec) transport(size int) []byte {
	var h []byte
	at := 0 // offset of the checksum
	switch s.Protocol {
	case UDP:
		h, at = make([]byte, max(8, size)), 6
		binary.BigEndian.PutUint16(h[4:], uint16(len(h)))
	case TCP:
		h, at = make([]byte, max(20, size)), 16
		h[7], h[12], h[13] = 1, 5<<4, s.Flags // sequence number 1, no options
		if s.Flags&flagACK != 0 {
			h[11] = 1
		}
		binary.BigEndian.PutUint16(h[14:], 64240)
	case ICMP:
		h, at = make([]byte, max(8, size)), 2
		if h[0] = 8; s.From.Is6() {
			h[0] = 128
		}
		h[5], h[7] = 1, 1 // identifier and sequence number
	}
	if s.Protocol != ICMP {
		binary.BigEndian.PutUint16(h, s.FromPort)
		binary.BigEndian.PutUint16(h[2:], s.ToPort)
	}
	var start uint32
	if s.Protocol != ICMP || s.From.Is6() { // the checksum includes the addresses, the length and the protocol
		start = uint32(sum(uint32(len(h))+uint32(s.number()), append(s.From.AsSlice(), s.To.AsSlice()...)))
	}
	check := ^sum(start, h)
	if check == 0 && s.Protocol == UDP {
		check = 0xffff // 0 would mean that there is no checksum
	}
	binary.BigEndian.PutUint16(h[at:], check)
	return h
}

// sum adds up 16-bit words in ones' complement (RFC 1071).
func sum(start uint32, b []byte) uint16 {
	n := uint64(start)
	for ; len(b) > 1; b = b[2:] {
		n += uint64(binary.BigEndian.Uint16(b))
	}
	if len(b) > 0 {
		n += uint64(b[0]) << 8
	}
	for n > 0xffff {
		n = n>>16 + n&0xffff
	}
	return uint16(n)
}

const flagACK = 1 << 4

// ParseFlags reads names of TCP flags that are separated by commas: "syn,ack".
func ParseFlags(s string) (set byte, err error) {
next:
	for name := range strings.SplitSeq(s, ",") {
		for i, f := range flags {
			if strings.EqualFold(f, strings.TrimSpace(name)) {
				set |= 1 << i
				continue next
			}
		}
		return 0, fmt.Errorf("unknown flag %q (known: %s)", name, strings.ToLower(strings.Join(flags, ", ")))
	}
	return set, nil
}
