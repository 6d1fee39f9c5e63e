package programs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"
)

// PrefixV4 is a key of droplist's map droplist_v4. The value is a uint64: the
// packets dropped so far.
type PrefixV4 struct {
	Len  uint32
	Addr [4]byte
}

// PrefixV6 is a key of droplist's map droplist_v6. The value is a uint64: the
// packets dropped so far.
type PrefixV6 struct {
	Len  uint32
	Addr [16]byte
}

// Prefix returns the key as a prefix.
func (p PrefixV4) Prefix() netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4(p.Addr), int(p.Len))
}

// Prefix returns the key as a prefix.
func (p PrefixV6) Prefix() netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom16(p.Addr), int(p.Len))
}

// DropKey returns the name of the droplist map for a valid prefix, and the key there:
//
//	name, key := programs.DropKey(netip.MustParsePrefix("192.0.2.0/24"))
//	err := coll.Maps[name].Put(key, uint64(0))
func DropKey(p netip.Prefix) (mapName string, key any) {
	p = p.Masked()
	if p.Addr().Is4() {
		return "droplist_v4", PrefixV4{uint32(p.Bits()), p.Addr().As4()}
	}
	return "droplist_v6", PrefixV6{uint32(p.Bits()), p.Addr().As16()}
}

// Source is a key of ratelimit's map buckets: an IPv6 address, or an IPv4 address
// mapped into one, as [netip.Addr.As16] has it. Of either, only the leading
// bits that make a source (constants bits_v4, bits_v6) are set.
type Source [16]byte

// Addr returns the source's address.
func (s Source) Addr() netip.Addr {
	return netip.AddrFrom16(s).Unmap()
}

// Bucket is a value of ratelimit's map buckets: a token bucket, and how many packets
// of its source passed or were dropped since the source came into the map.
type Bucket struct {
	FullAt  uint64 // when the bucket is full again: nanoseconds, CLOCK_MONOTONIC
	Passed  uint64
	Dropped uint64
}

// LimitTotals is the value of ratelimit's map totals: packets of all sources, on
// one CPU.
type LimitTotals struct {
	Passed    uint64
	Dropped   uint64
	Untracked uint64 // passed because there was no room for a bucket
}

// Protocol is a key of count's map protocols.
type Protocol struct {
	EtherType uint16 // the one behind the VLAN tags; 0 for 802.3 frames with a length
	Protocol  uint8  // of IPv4 and IPv6; 255 if the IP header is cut short
	_         uint8
}

// Traffic is a value of count's maps protocols and total: what one CPU saw.
type Traffic struct {
	Packets uint64
	Bytes   uint64 // from the Ethernet header on, without the checksum; on a cgroup, and on a device without Ethernet, from the IP header on
}

// DestinationV4 is a key of redirect's map redirect_v4: the destination of connect(2).
// An address of zeros means any address, and port 0 means any port.
type DestinationV4 struct {
	Addr [4]byte
	Port uint16
}

// DestinationV6 is a key of redirect's map redirect_v6, like [DestinationV4].
type DestinationV6 struct {
	Addr [16]byte
	Port uint16
}

// AddrPort returns the key as an address and a port.
func (d DestinationV4) AddrPort() netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4(d.Addr), d.Port)
}

// AddrPort returns the key as an address and a port.
func (d DestinationV6) AddrPort() netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16(d.Addr), d.Port)
}

// TargetV4 is a value of redirect's map redirect_v4: where connect(2) goes instead. An
// address of zeros means the same address as before, and port 0 the same port.
type TargetV4 struct {
	Addr     [4]byte
	Port     uint16
	_        uint16
	Connects uint64 // how often it went there
}

// TargetV6 is a value of redirect's map redirect_v6, like [TargetV4].
type TargetV6 struct {
	Addr     [16]byte
	Port     uint16
	_        [3]uint16
	Connects uint64 // how often it went there
}

// AddrPort returns the value as an address and a port.
func (t TargetV4) AddrPort() netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4(t.Addr), t.Port)
}

// AddrPort returns the value as an address and a port.
func (t TargetV6) AddrPort() netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16(t.Addr), t.Port)
}

// RedirectEntry returns the name of the redirect map for an entry, and the key and
// value there:
//
//	name, key, value, err := programs.RedirectEntry(
//		netip.MustParseAddrPort("192.0.2.1:80"), netip.MustParseAddrPort("127.0.0.1:8080"))
//	...
//	err = coll.Maps[name].Put(key, value)
//
// In from, the unspecified address (0.0.0.0 or ::) means any address, and port 0 any
// port. In to, they mean the same as before. IPv4 goes to IPv4 only, and IPv6 to
// IPv6: anything else is an error. A zone is an error too, since the maps have no
// room for it.
func RedirectEntry(from, to netip.AddrPort) (mapName string, key, value any, err error) {
	f, t := from.Addr().Unmap(), to.Addr().Unmap()
	switch {
	case !f.IsValid() || !t.IsValid():
		return "", nil, nil, errors.New("redirect: an address is missing")
	case f.Zone() != "" || t.Zone() != "":
		return "", nil, nil, fmt.Errorf("redirect %v to %v: addresses with a zone cannot be redirected", from, to)
	case f.Is4() != t.Is4():
		return "", nil, nil, fmt.Errorf("redirect %v to %v: IPv4 and IPv6 cannot be mixed", from, to)
	case f.Is4():
		return "redirect_v4", DestinationV4{f.As4(), from.Port()}, TargetV4{Addr: t.As4(), Port: to.Port()}, nil
	}
	return "redirect_v6", DestinationV6{f.As16(), from.Port()}, TargetV6{Addr: t.As16(), Port: to.Port()}, nil
}

// SampleStats is the value of sample's map stats: what one CPU saw.
type SampleStats struct {
	Packets uint64 // all packets
	Sampled uint64
	Lost    uint64 // chosen, but the ring buffer was full
	Skip    uint64 // packets until the next one is chosen
}

// Sample is a record of sample's ring buffer samples.
type Sample struct {
	Time      time.Duration // on CLOCK_MONOTONIC
	PacketLen uint32
	Ifindex   uint32 // of the device that received it
	RxQueue   uint32
	Bytes     []byte // the packet, at most snaplen bytes of it
}

// sampleHeader is the length of the header before the bytes: the time (8 bytes), then
// the packet's length, the captured length, the ifindex and the queue (4 each).
const sampleHeader = 24

// ParseSample reads a record. The sample's bytes are a part of the record, not a copy.
func ParseSample(record []byte) (Sample, error) {
	if len(record) < sampleHeader {
		return Sample{}, fmt.Errorf("sample of %d bytes: shorter than its header", len(record))
	}
	header, bytes, ne := record[:sampleHeader], record[sampleHeader:], binary.NativeEndian

	captured := ne.Uint32(header[12:])
	if uint64(captured) > uint64(len(bytes)) {
		return Sample{}, fmt.Errorf("sample of %d bytes: %d captured bytes do not fit", len(record), captured)
	}
	return Sample{
		Time:      time.Duration(ne.Uint64(header)),
		PacketLen: ne.Uint32(header[8:]),
		Ifindex:   ne.Uint32(header[16:]),
		RxQueue:   ne.Uint32(header[20:]),
		Bytes:     bytes[:captured:captured],
	}, nil
}
