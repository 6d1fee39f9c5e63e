package programs_test

import (
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/programs"
)

func putPrefix(t *testing.T, coll *ebpf.Collection, prefix string) {
	t.Helper()
	mapName, key := programs.DropKey(netip.MustParsePrefix(prefix))
	qt.Assert(t, qt.IsNil(coll.Maps[mapName].Put(key, uint64(0))))
}

func drops(t *testing.T, coll *ebpf.Collection, prefix string) uint64 {
	t.Helper()
	var n uint64
	mapName, key := programs.DropKey(netip.MustParsePrefix(prefix))
	qt.Assert(t, qt.IsNil(coll.Maps[mapName].Lookup(key, &n)))
	return n
}

func TestDroplist(t *testing.T) {
	from4 := func(src string) []byte { return packet(eth(typeIPv4), ipv4(src, protoUDP), payload(8)) }
	from6 := func(src string) []byte { return packet(eth(typeIPv6), ipv6(src, protoUDP), payload(8)) }

	for _, test := range []struct {
		name     string
		prefixes []string
		packet   []byte
		by       string // the prefix that drops it; empty: it passes
	}{
		{"empty list, v4", nil, from4("192.0.2.1"), ""},
		{"empty list, v6", nil, from6("2001:db8::1"), ""},
		{"inside v4", []string{"192.0.2.0/24"}, from4("192.0.2.255"), "192.0.2.0/24"},
		{"just below v4", []string{"192.0.2.0/24"}, from4("192.0.1.255"), ""},
		{"just above v4", []string{"192.0.2.0/24"}, from4("192.0.3.0"), ""},
		{"odd length v4", []string{"192.0.2.128/25"}, from4("192.0.2.127"), ""},
		{"/32 hit", []string{"192.0.2.1/32"}, from4("192.0.2.1"), "192.0.2.1/32"},
		{"/32 miss", []string{"192.0.2.1/32"}, from4("192.0.2.0"), ""},
		{"all of v4", []string{"0.0.0.0/0"}, from4("203.0.113.9"), "0.0.0.0/0"},
		{"all of v4 is not v6", []string{"0.0.0.0/0"}, from6("2001:db8::1"), ""},
		{"all of v6", []string{"::/0"}, from6("2001:db8::1"), "::/0"},
		{"all of v6 is not v4", []string{"::/0"}, from4("192.0.2.1"), ""},
		{"longest v4", []string{"0.0.0.0/0", "192.0.2.0/24", "192.0.2.1/32"}, from4("192.0.2.1"), "192.0.2.1/32"},
		{"second longest v4", []string{"0.0.0.0/0", "192.0.2.0/24", "192.0.2.1/32"}, from4("192.0.2.2"), "192.0.2.0/24"},
		{"inside v6", []string{"2001:db8::/32"}, from6("2001:db8:ffff::9"), "2001:db8::/32"},
		{"outside v6", []string{"2001:db8::/32"}, from6("2001:db9::"), ""},
		{"/128 hit", []string{"2001:db8::1/128"}, from6("2001:db8::1"), "2001:db8::1/128"},
		{"/128 miss", []string{"2001:db8::1/128"}, from6("2001:db8::"), ""},
		{"longest v6", []string{"::/0", "2001:db8::/32", "2001:db8::/127"}, from6("2001:db8::1"), "2001:db8::/127"},
		{"destination does not count", []string{"198.51.100.1/32"}, from4("192.0.2.1"), ""},
		{
			"one tag", []string{"192.0.2.0/24"},
			packet(eth(typeVLAN), vlan(7, typeIPv4), ipv4("192.0.2.1", protoTCP)), "192.0.2.0/24",
		},
		{
			"two tags", []string{"2001:db8::/32"},
			packet(eth(typeQinQ), vlan(7, typeVLAN), vlan(8, typeIPv6), ipv6("2001:db8::1", protoTCP)), "2001:db8::/32",
		},
		{
			"three tags", []string{"0.0.0.0/0"},
			packet(eth(typeQinQ), vlan(7, typeVLAN), vlan(8, typeVLAN), vlan(9, typeIPv4), ipv4("192.0.2.1", protoTCP)), "",
		},
		{"not IP", []string{"0.0.0.0/0", "::/0"}, packet(eth(typeARP), payload(46)), ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, on := range hooks {
				if on.drop == on.pass {
					continue
				}
				coll := loadFor(t, on.hook, "droplist", nil)
				for _, prefix := range test.prefixes {
					putPrefix(t, coll, prefix)
				}

				want := on.pass
				if test.by != "" {
					want = on.drop
				}
				qt.Check(t, qt.Equals(run(t, coll, programs.Function("droplist", on.hook), test.packet), want), qt.Commentf("%s", on.hook))

				for _, prefix := range test.prefixes {
					var want uint64
					if prefix == test.by {
						want = 1
					}
					qt.Check(t, qt.Equals(drops(t, coll, prefix), want), qt.Commentf("%s: %s", on.hook, prefix))
				}
			}
		})
	}
}

func TestDroplistRemoval(t *testing.T) {
	coll := load(t, "droplist", nil)
	p := packet(eth(typeIPv4), ipv4("192.0.2.1", protoUDP))

	putPrefix(t, coll, "192.0.2.0/24")
	qt.Check(t, qt.Equals(run(t, coll, "droplist", p), drop))
	mapName, key := programs.DropKey(netip.MustParsePrefix("192.0.2.0/24"))
	qt.Assert(t, qt.IsNil(coll.Maps[mapName].Delete(key)))
	qt.Check(t, qt.Equals(run(t, coll, "droplist", p), pass))
}

func TestDroplistWithoutCounters(t *testing.T) {
	coll := load(t, "droplist", constants{"count_drops": 0})
	putPrefix(t, coll, "192.0.2.0/24")
	qt.Check(t, qt.Equals(run(t, coll, "droplist", packet(eth(typeIPv4), ipv4("192.0.2.1", protoUDP))), drop))
	qt.Check(t, qt.Equals(drops(t, coll, "192.0.2.0/24"), 0))
}

// A packet is dropped only if its IP header is complete.
func TestDroplistTruncated(t *testing.T) {
	for _, test := range []struct {
		name    string
		packet  []byte
		headers int
	}{
		{"v4", packet(eth(typeIPv4), ipv4("192.0.2.1", protoUDP), payload(8)), 14 + 20},
		{"v6", packet(eth(typeIPv6), ipv6("2001:db8::1", protoUDP), payload(8)), 14 + 40},
		{"v4 behind two tags", packet(eth(typeQinQ), vlan(1, typeVLAN), vlan(2, typeIPv4), ipv4("192.0.2.1", protoUDP)), 14 + 8 + 20},
		{"v6 behind a tag", packet(eth(typeVLAN), vlan(1, typeIPv6), ipv6("2001:db8::1", protoUDP)), 14 + 4 + 40},
	} {
		for _, on := range hooks {
			if on.drop == on.pass {
				continue
			}
			coll := loadFor(t, on.hook, "droplist", nil)
			putPrefix(t, coll, "0.0.0.0/0")
			putPrefix(t, coll, "::/0")
			for n := on.shortest(test.packet); n <= len(test.packet); n++ {
				want := on.pass
				if n >= test.headers {
					want = on.drop
				}
				got := run(t, coll, programs.Function("droplist", on.hook), test.packet[:n])
				qt.Check(t, qt.Equals(got, want), qt.Commentf("%s on %s, %d bytes", test.name, on.hook, n))
			}
		}
	}
}

// A packet that is several on the wire counts as several.
func TestDroplistSegments(t *testing.T) {
	coll := loadFor(t, hook.TCXIngress, "droplist", nil)
	putPrefix(t, coll, "192.0.2.0/24")
	runSegments(t, coll, "droplist_tc", packet(eth(typeIPv4), ipv4("192.0.2.1", protoTCP), payload(3000)), 3)
	qt.Check(t, qt.Equals(drops(t, coll, "192.0.2.0/24"), 3))
}
