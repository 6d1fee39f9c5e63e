package programs_test

import (
	"sync"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/programs"
)

func addTraffic(sum *programs.Traffic, v programs.Traffic) {
	sum.Packets += v.Packets
	sum.Bytes += v.Bytes
}

// counted returns the whole table.
func counted(t *testing.T, coll *ebpf.Collection) map[programs.Protocol]programs.Traffic {
	t.Helper()
	var (
		table  = make(map[programs.Protocol]programs.Traffic)
		key    programs.Protocol
		values []programs.Traffic
	)
	for it := coll.Maps["protocols"].Iterate(); it.Next(&key, &values); {
		var sum programs.Traffic
		for _, v := range values {
			addTraffic(&sum, v)
		}
		table[key] = sum
	}
	return table
}

func TestCount(t *testing.T) {
	v6 := func(next byte, layers ...[]byte) []byte {
		return packet(append([][]byte{eth(typeIPv6), ipv6("2001:db8::1", next)}, layers...)...)
	}

	for _, test := range []struct {
		name   string
		packet []byte
		want   programs.Protocol
	}{
		{"v4 TCP", packet(eth(typeIPv4), ipv4("192.0.2.1", protoTCP), payload(20)), programs.Protocol{EtherType: typeIPv4, Protocol: protoTCP}},
		{"v4 ICMP", packet(eth(typeIPv4), ipv4("192.0.2.1", protoICMP), payload(8)), programs.Protocol{EtherType: typeIPv4, Protocol: protoICMP}},
		{"v4 without payload", packet(eth(typeIPv4), ipv4("192.0.2.1", protoUDP)), programs.Protocol{EtherType: typeIPv4, Protocol: protoUDP}},
		{"ARP", packet(eth(typeARP), payload(46)), programs.Protocol{EtherType: typeARP}},
		{"802.3 length", packet(eth(38), payload(38)), programs.Protocol{}},
		{"one tag", packet(eth(typeVLAN), vlan(1, typeIPv4), ipv4("192.0.2.1", protoUDP)), programs.Protocol{EtherType: typeIPv4, Protocol: protoUDP}},
		{"two tags", packet(eth(typeQinQ), vlan(1, typeVLAN), vlan(2, typeARP), payload(28)), programs.Protocol{EtherType: typeARP}},
		{"three tags", packet(eth(typeQinQ), vlan(1, typeVLAN), vlan(2, typeVLAN), vlan(3, typeARP)), programs.Protocol{EtherType: typeVLAN}},
		{"v6 UDP", v6(protoUDP, payload(8)), programs.Protocol{EtherType: typeIPv6, Protocol: protoUDP}},
		{"v6 without payload", v6(protoNone), programs.Protocol{EtherType: typeIPv6, Protocol: protoNone}},
		{"v6 ESP", v6(protoESP, payload(8)), programs.Protocol{EtherType: typeIPv6, Protocol: protoESP}},
		{"hop by hop", v6(protoHopByHop, extension(protoUDP, 8), payload(8)), programs.Protocol{EtherType: typeIPv6, Protocol: protoUDP}},
		{"routing", v6(protoRouting, extension(protoTCP, 24), payload(20)), programs.Protocol{EtherType: typeIPv6, Protocol: protoTCP}},
		{"the longest header", v6(protoDestination, extension(protoTCP, 2048), payload(20)), programs.Protocol{EtherType: typeIPv6, Protocol: protoTCP}},
		{"authentication", v6(protoAH, authentication(protoTCP, 28), payload(20)), programs.Protocol{EtherType: typeIPv6, Protocol: protoTCP}},
		{"first fragment", v6(protoFragment, fragment(protoDestination, 0), extension(protoUDP, 8), payload(8)), programs.Protocol{EtherType: typeIPv6, Protocol: protoUDP}},
		{"later fragment", v6(protoFragment, fragment(protoUDP, 1480), payload(8)), programs.Protocol{EtherType: typeIPv6, Protocol: protoUDP}},
		{"later fragment is all data", v6(protoFragment, fragment(protoDestination, 8), extension(protoUDP, 8)), programs.Protocol{EtherType: typeIPv6, Protocol: protoDestination}},
		{
			"all of them",
			v6(protoHopByHop, extension(protoDestination, 8), extension(protoRouting, 16), extension(protoFragment, 24),
				fragment(protoAH, 0), authentication(protoDestination, 16), extension(protoTCP, 8), payload(20)),
			programs.Protocol{EtherType: typeIPv6, Protocol: protoTCP},
		},
		{
			"too many",
			v6(protoDestination, extension(protoDestination, 8), extension(protoDestination, 8), extension(protoDestination, 8),
				extension(protoDestination, 8), extension(protoDestination, 8), extension(protoRouting, 8), extension(protoTCP, 8), payload(20)),
			programs.Protocol{EtherType: typeIPv6, Protocol: protoRouting},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, on := range hooks {
				if !on.sees(test.packet) || !on.runs(t) {
					continue
				}
				coll, function := loadFor(t, on.hook, "count", nil), programs.Function("count", on.hook)
				traffic := programs.Traffic{Packets: 2, Bytes: 2 * uint64(on.length(test.packet))}
				qt.Check(t, qt.Equals(run(t, coll, function, test.packet), on.pass))
				qt.Check(t, qt.Equals(run(t, coll, function, test.packet), on.pass))
				qt.Check(t, qt.DeepEquals(counted(t, coll), map[programs.Protocol]programs.Traffic{test.want: traffic}), qt.Commentf("%s", on.hook))
				qt.Check(t, qt.Equals(perCPU(t, coll.Maps["total"], uint32(0), addTraffic), traffic))
			}
		})
	}
}

// A packet that is cut at any length counts for its last complete header.
func TestCountTruncated(t *testing.T) {
	whole := packet(eth(typeQinQ), vlan(1, typeVLAN), vlan(2, typeIPv6), ipv6("2001:db8::1", protoHopByHop),
		extension(protoRouting, 8), extension(protoTCP, 16), payload(20))

	for _, on := range hooks {
		if !on.runs(t) {
			continue
		}
		p, tags := whole, 8
		if !on.sees(p) {
			p, tags = packet(eth(typeIPv6), whole[22:]), 0
		}
		want := func(n int) programs.Protocol {
			switch {
			case n < 10+tags:
				return programs.Protocol{EtherType: typeQinQ}
			case n < 14+tags:
				return programs.Protocol{EtherType: typeVLAN}
			case n < 54+tags:
				return programs.Protocol{EtherType: typeIPv6, Protocol: protoCutShort}
			case n < 54+tags+4: // the part of an extension header that names the next
				return programs.Protocol{EtherType: typeIPv6, Protocol: protoHopByHop}
			case n < 62+tags+4:
				return programs.Protocol{EtherType: typeIPv6, Protocol: protoRouting}
			default:
				return programs.Protocol{EtherType: typeIPv6, Protocol: protoTCP}
			}
		}

		coll, function := loadFor(t, on.hook, "count", nil), programs.Function("count", on.hook)
		expected := make(map[programs.Protocol]programs.Traffic)
		for n := on.shortest(p); n <= len(p); n++ {
			qt.Check(t, qt.Equals(run(t, coll, function, p[:n]), on.pass))
			sum := expected[want(n)]
			addTraffic(&sum, programs.Traffic{Packets: 1, Bytes: uint64(on.length(p[:n]))})
			expected[want(n)] = sum
		}
		qt.Check(t, qt.DeepEquals(counted(t, coll), expected), qt.Commentf("%s", on.hook))
	}
}

// When the kernel handles several packets as one, they count as the packets that they are on the wire.
func TestCountSegments(t *testing.T) {
	p := packet(eth(typeIPv4), ipv4("192.0.2.1", protoTCP), payload(3000))
	for _, on := range hooks {
		if on.hook == hook.XDP {
			continue // packets are not joined there yet
		}
		coll, function := loadFor(t, on.hook, "count", nil), programs.Function("count", on.hook)
		runSegments(t, coll, function, p, 3)
		qt.Check(t, qt.Equals(perCPU(t, coll.Maps["total"], uint32(0), addTraffic), programs.Traffic{Packets: 3, Bytes: uint64(on.length(p))}))
	}
}

// When the table has no room for more protocols, the protocols in it are still counted, and total counts all packets.
func TestCountFull(t *testing.T) {
	coll := load(t, "count", nil)
	const sent = 3000
	for i := range uint16(sent) {
		qt.Check(t, qt.Equals(run(t, coll, "count", packet(eth(0x9000+i))), pass))
	}

	table := counted(t, coll)
	qt.Check(t, qt.Equals(len(table), int(coll.Maps["protocols"].MaxEntries())))
	qt.Check(t, qt.Equals(perCPU(t, coll.Maps["total"], uint32(0), addTraffic), programs.Traffic{Packets: sent, Bytes: 14 * sent}))

	run(t, coll, "count", packet(eth(0x9000)))
	qt.Check(t, qt.Equals(counted(t, coll)[programs.Protocol{EtherType: 0x9000}].Packets, 2))
}

func TestCountConcurrent(t *testing.T) {
	const workers, each = 4, 3000
	coll := load(t, "count", nil)
	p := packet(eth(typeIPv4), ipv4("192.0.2.1", protoTCP))

	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for range each {
				_, err := coll.Programs["count"].Run(&ebpf.RunOptions{Data: p})
				qt.Check(t, qt.IsNil(err))
			}
		})
	}
	wg.Wait()
	qt.Check(t, qt.DeepEquals(counted(t, coll), map[programs.Protocol]programs.Traffic{
		{EtherType: typeIPv4, Protocol: protoTCP}: {Packets: workers * each, Bytes: workers * each * uint64(len(p))},
	}))
}
