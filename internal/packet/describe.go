package packet

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/libdispatcher/dispatcher/hook"
)

// EtherTypes and IP protocol numbers.
const (
	typeIPv4  = 0x0800
	typeARP   = 0x0806
	typeVLAN  = 0x8100
	typeQinQ  = 0x88a8
	typeIPv6  = 0x86dd
	etherSize = 14

	protoHopByHop    = 0
	protoICMP        = 1
	protoIPIP        = 4
	protoTCP         = 6
	protoUDP         = 17
	protoIPv6        = 41
	protoRouting     = 43
	protoFragment    = 44
	protoGRE         = 47
	protoESP         = 50
	protoAH          = 51
	protoICMPv6      = 58
	protoNone        = 59
	protoDestination = 60
	protoSCTP        = 132
)

var protocols = map[byte]string{
	protoICMP: "ICMP", protoIPIP: "IPIP", protoTCP: "TCP", protoUDP: "UDP", protoIPv6: "IPv6-in-IP", protoGRE: "GRE",
	protoESP: "ESP", protoAH: "AH", protoICMPv6: "ICMPv6", protoNone: "no payload", protoSCTP: "SCTP",
}

// reader takes fields off the front of a packet.
type reader struct {
	left []byte
	cut  bool // a field was missing
}

// take returns the next n bytes, or nil.
func (r *reader) take(n int) []byte {
	if n > len(r.left) {
		r.cut = true
		return nil
	}
	b := r.left[:n]
	r.left = r.left[n:]
	return b
}

// Describe describes a packet in one line, as far as the packet can be parsed.
// It accepts any bytes.
func Describe(p []byte, begins hook.Begins) string {
	r := &reader{left: p}
	switch {
	case begins == "":
		return r.ethernet()
	case begins == hook.BeginsIP && len(p) > 0 && p[0]>>4 == 4:
		return r.words(r.ipv4())
	case begins == hook.BeginsIP && len(p) > 0 && p[0]>>4 == 6:
		return r.words(r.ipv6())
	}
	return fmt.Sprintf("not IP, begins with %x", p[:min(len(p), 4)])
}

func (r *reader) ethernet() string {
	h := r.take(etherSize)
	if h == nil {
		return "too short for Ethernet"
	}
	var words []string
	etherType := binary.BigEndian.Uint16(h[12:])
	for etherType == typeVLAN || etherType == typeQinQ {
		tag := r.take(4)
		if tag == nil {
			break
		}
		words = append(words, fmt.Sprintf("vlan %d", binary.BigEndian.Uint16(tag)&0xfff))
		etherType = binary.BigEndian.Uint16(tag[2:])
	}
	switch etherType {
	case typeIPv4:
		words = append(words, r.ipv4())
	case typeIPv6:
		words = append(words, r.ipv6())
	case typeARP:
		words = append(words, r.arp())
	default:
		words = append(words, fmt.Sprintf("EtherType 0x%04x %s > %s", etherType, net.HardwareAddr(h[6:12]), net.HardwareAddr(h[:6])))
	}
	return r.words(words...)
}

// words joins words, and says if the packet was cut short.
func (r *reader) words(words ...string) string {
	if r.cut {
		words = append(words, "cut short")
	}
	return strings.Join(words, " ")
}

// MACs returns the packet's source and destination address on its link, or "" if the
// packet has none, or is too short.
func MACs(p []byte, begins hook.Begins) string {
	if begins != "" || len(p) < etherSize {
		return ""
	}
	return fmt.Sprintf("%s > %s", net.HardwareAddr(p[6:12]), net.HardwareAddr(p[:6]))
}

func (r *reader) arp() string {
	b := r.take(28)
	switch {
	case b == nil:
		return "ARP"
	case binary.BigEndian.Uint16(b[6:]) == 1:
		return fmt.Sprintf("ARP who has %s, says %s", addr(b[24:28]), addr(b[14:18]))
	}
	return fmt.Sprintf("ARP %s is at %s", addr(b[14:18]), net.HardwareAddr(b[8:14]))
}

func addr(b []byte) netip.Addr { a, _ := netip.AddrFromSlice(b); return a }

func (r *reader) ipv4() string {
	h := r.take(20)
	if h == nil {
		return "IPv4"
	}
	if size := int(h[0]&15) * 4; size > 20 {
		r.take(size - 20)
	}
	from, to, protocol := addr(h[12:16]), addr(h[16:20]), h[9]
	if offset := binary.BigEndian.Uint16(h[6:]) & 0x1fff; offset != 0 {
		return fmt.Sprintf("IPv4 %s > %s %s fragment at %d", from, to, protocolName(protocol), int(offset)*8)
	}
	return "IPv4 " + r.transport(from, to, protocol)
}

func (r *reader) ipv6() string {
	h := r.take(40)
	if h == nil {
		return "IPv6"
	}
	from, to, next := addr(h[8:24]), addr(h[24:40]), h[6]
	for !r.cut {
		switch next {
		case protoHopByHop, protoRouting, protoDestination:
			if e := r.take(8); e != nil {
				next = e[0]
				r.take(int(e[1]) * 8)
			}
		case protoFragment:
			if e := r.take(8); e != nil {
				next = e[0]
				if offset := binary.BigEndian.Uint16(e[2:]) &^ 7; offset != 0 {
					return fmt.Sprintf("IPv6 %s > %s %s fragment at %d", from, to, protocolName(next), offset)
				}
			}
		default:
			return "IPv6 " + r.transport(from, to, next)
		}
	}
	return "IPv6 " + r.transport(from, to, next)
}

func protocolName(p byte) string {
	if name, ok := protocols[p]; ok {
		return name
	}
	return fmt.Sprintf("protocol %d", p)
}

// flags are the TCP flags from the lowest bit up.
var flags = []string{"FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR"}

// transport describes the part behind the IP headers.
func (r *reader) transport(from, to netip.Addr, protocol byte) string {
	name := protocolName(protocol)
	plain := fmt.Sprintf("%s > %s %s", from, to, name)
	size := map[byte]int{protoUDP: 8, protoTCP: 20, protoSCTP: 12, protoICMP: 8, protoICMPv6: 4}[protocol]
	if r.cut || size == 0 {
		return plain
	}
	h := r.take(size)
	if h == nil {
		return plain
	}
	if protocol == protoICMP || protocol == protoICMPv6 {
		what := map[[2]byte]string{
			{protoICMP, 0}: "echo reply", {protoICMP, 3}: "unreachable", {protoICMP, 8}: "echo request", {protoICMP, 11}: "time exceeded",
			{protoICMPv6, 1}: "unreachable", {protoICMPv6, 2}: "packet too big", {protoICMPv6, 3}: "time exceeded", {protoICMPv6, 128}: "echo request", {protoICMPv6, 129}: "echo reply",
			{protoICMPv6, 133}: "router solicitation", {protoICMPv6, 134}: "router advertisement",
			{protoICMPv6, 135}: "neighbour solicitation", {protoICMPv6, 136}: "neighbour advertisement",
		}[[2]byte{protocol, h[0]}]
		if what == "" {
			what = fmt.Sprintf("type %d code %d", h[0], h[1])
		}
		return plain + " " + what
	}
	ports := fmt.Sprintf("%s > %s %s",
		netip.AddrPortFrom(from, binary.BigEndian.Uint16(h)), netip.AddrPortFrom(to, binary.BigEndian.Uint16(h[2:])), name)
	if protocol == protoTCP {
		var set []string
		for i, f := range flags {
			if h[13]&(1<<i) != 0 {
				set = append(set, f)
			}
		}
		if len(set) > 0 {
			ports += " " + strings.Join(set, ",")
		}
	}
	return ports
}
