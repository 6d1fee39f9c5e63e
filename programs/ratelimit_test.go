package programs_test

import (
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/programs"
)

func bucketOf(t *testing.T, coll *ebpf.Collection, source string) programs.Bucket {
	t.Helper()
	var b programs.Bucket
	key := programs.Source(netip.MustParseAddr(source).As16())
	qt.Assert(t, qt.IsNil(coll.Maps["buckets"].Lookup(key, &b)))
	return b
}

func limitTotals(t *testing.T, coll *ebpf.Collection) programs.LimitTotals {
	t.Helper()
	return perCPU(t, coll.Maps["totals"], uint32(0), func(sum *programs.LimitTotals, v programs.LimitTotals) {
		sum.Passed += v.Passed
		sum.Dropped += v.Dropped
		sum.Untracked += v.Untracked
	})
}

// passing sends n packets and says how many passed.
func passing(t *testing.T, coll *ebpf.Collection, packet []byte, n int) int {
	t.Helper()
	passed := 0
	for range n {
		if run(t, coll, "ratelimit", packet) == pass {
			passed++
		}
	}
	return passed
}

// One packet a second: practically no refill within a test.
const slow = 1

func TestRatelimitBurst(t *testing.T) {
	for _, test := range []struct {
		name, source, other   string
		packet, packetOfOther []byte
	}{
		{
			"v4", "192.0.2.1", "192.0.2.2",
			packet(eth(typeIPv4), ipv4("192.0.2.1", protoUDP)),
			packet(eth(typeIPv4), ipv4("192.0.2.2", protoUDP)),
		},
		{
			"v6", "2001:db8::1", "2001:db8::2",
			packet(eth(typeIPv6), ipv6("2001:db8::1", protoUDP)),
			packet(eth(typeIPv6), ipv6("2001:db8::2", protoUDP)),
		},
		{
			"tagged", "192.0.2.1", "2001:db8::1",
			packet(eth(typeQinQ), vlan(1, typeVLAN), vlan(2, typeIPv4), ipv4("192.0.2.1", protoUDP)),
			packet(eth(typeVLAN), vlan(2, typeIPv6), ipv6("2001:db8::1", protoUDP)),
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			coll := load(t, "ratelimit", constants{"rate": slow, "burst": 5})
			qt.Check(t, qt.Equals(passing(t, coll, test.packet, 8), 5))
			qt.Check(t, qt.Equals(passing(t, coll, test.packetOfOther, 2), 2))

			b := bucketOf(t, coll, test.source)
			qt.Check(t, qt.Equals(b.Passed, 5))
			qt.Check(t, qt.Equals(b.Dropped, 3))
			qt.Check(t, qt.Equals(bucketOf(t, coll, test.other).Passed, 2))
			qt.Check(t, qt.Equals(limitTotals(t, coll), programs.LimitTotals{Passed: 7, Dropped: 3}))
		})
	}
}

// When the time at which a bucket is full again comes nearer, time has passed for the program.
func TestRatelimitRefill(t *testing.T) {
	coll := load(t, "ratelimit", constants{"rate": slow, "burst": 5})
	p := packet(eth(typeIPv4), ipv4("192.0.2.1", protoUDP))
	key := programs.Source(netip.MustParseAddr("192.0.2.1").As16())

	for _, test := range []struct {
		seconds uint64
		want    int
	}{
		{0, 5}, // the first burst
		{0, 0},
		{1, 1},
		{3, 3},
		{5, 5},
		{1000, 5}, // no more than a burst, however long the source was silent
	} {
		var b programs.Bucket
		if coll.Maps["buckets"].Lookup(key, &b) == nil {
			b.FullAt -= min(b.FullAt, test.seconds*uint64(time.Second))
			qt.Assert(t, qt.IsNil(coll.Maps["buckets"].Put(key, b)))
		}
		qt.Check(t, qt.Equals(passing(t, coll, p, 10), test.want), qt.Commentf("after %d s", test.seconds))
	}
}

func TestRatelimitOverTime(t *testing.T) {
	const rate, burst = 200, 20
	coll := load(t, "ratelimit", constants{"rate": rate, "burst": burst})
	p := packet(eth(typeIPv6), ipv6("2001:db8::1", protoUDP))

	start, passed := time.Now(), 0
	for time.Since(start) < 300*time.Millisecond {
		passed += passing(t, coll, p, 1)
	}
	refilled := rate * time.Since(start).Seconds()
	qt.Check(t, qt.IsTrue(float64(passed) <= burst+refilled+1), qt.Commentf("%d passed", passed))
	// A pause of the test only loses tokens that a full bucket cannot take.
	qt.Check(t, qt.IsTrue(float64(passed) >= burst+refilled/2), qt.Commentf("%d passed", passed))
}

func TestRatelimitSources(t *testing.T) {
	from4 := func(src string) []byte { return packet(eth(typeIPv4), ipv4(src, protoUDP)) }
	from6 := func(src string) []byte { return packet(eth(typeIPv6), ipv6(src, protoUDP)) }

	for _, test := range []struct {
		set         constants
		first, then []byte
		source      string // both packets use the bucket of this source; empty: each has a bucket of its own
	}{
		{constants{}, from4("192.0.2.1"), from4("192.0.2.2"), ""},
		{constants{"bits_v4": 24}, from4("192.0.2.1"), from4("192.0.2.200"), "192.0.2.0"},
		{constants{"bits_v4": 24}, from4("192.0.2.1"), from4("192.0.3.1"), ""},
		{constants{"bits_v4": 25}, from4("192.0.2.1"), from4("192.0.2.200"), ""},
		{constants{"bits_v4": 0}, from4("192.0.2.1"), from4("203.0.113.1"), "0.0.0.0"},
		{constants{"bits_v4": 99}, from4("192.0.2.1"), from4("192.0.2.2"), ""},
		{constants{}, from6("2001:db8::1"), from6("2001:db8::2"), ""},
		{constants{"bits_v6": 127}, from6("2001:db8::2"), from6("2001:db8::3"), "2001:db8::2"},
		{constants{"bits_v6": 64}, from6("2001:db8::1"), from6("2001:db8::f00:2"), "2001:db8::"},
		{constants{"bits_v6": 64}, from6("2001:db8::1"), from6("2001:db8:0:1::1"), ""},
		{constants{"bits_v6": 63}, from6("2001:db8::1"), from6("2001:db8:0:1::1"), "2001:db8::"},
		{constants{"bits_v6": 0}, from6("2001:db8::1"), from6("fe80::1"), "::"},
	} {
		t.Run(fmt.Sprint(test.set), func(t *testing.T) {
			set := constants{"rate": slow, "burst": 1}
			for name, value := range test.set {
				set[name] = value
			}
			coll := load(t, "ratelimit", set)

			qt.Check(t, qt.Equals(run(t, coll, "ratelimit", test.first), pass))
			second := run(t, coll, "ratelimit", test.then)
			if test.source == "" {
				qt.Check(t, qt.Equals(second, pass))
				return
			}
			qt.Check(t, qt.Equals(second, drop))
			qt.Check(t, qt.Equals(bucketOf(t, coll, test.source).Dropped, 1))
		})
	}
}

func TestRatelimitConstants(t *testing.T) {
	p := packet(eth(typeIPv4), ipv4("192.0.2.1", protoUDP))
	for _, test := range []struct {
		name string
		set  constants
		want int // of 100
	}{
		{"defaults", nil, 100},
		{"no limit", constants{"rate": 0, "burst": 1}, 100},
		{"beyond one a nanosecond", constants{"rate": 4_000_000_000, "burst": 1}, 100},
		{"no burst is a burst of one", constants{"rate": slow, "burst": 0}, 1},
		{"the longest queue", constants{"rate": slow, "burst": 4_294_967_295}, 100},
	} {
		t.Run(test.name, func(t *testing.T) {
			coll := load(t, "ratelimit", test.set)
			qt.Check(t, qt.Equals(passing(t, coll, p, 100), test.want))
		})
	}
}

// A packet without a source passes and takes no bucket.
func TestRatelimitNotIP(t *testing.T) {
	coll := load(t, "ratelimit", constants{"rate": slow, "burst": 1})
	whole := packet(eth(typeQinQ), vlan(1, typeVLAN), vlan(2, typeIPv6), ipv6("2001:db8::1", protoUDP))

	qt.Check(t, qt.Equals(passing(t, coll, packet(eth(typeARP), payload(46)), 3), 3))
	for n := minPacket; n < len(whole); n++ {
		qt.Check(t, qt.Equals(run(t, coll, "ratelimit", whole[:n]), pass), qt.Commentf("%d bytes", n))
	}
	qt.Check(t, qt.Equals(limitTotals(t, coll), programs.LimitTotals{}))

	qt.Check(t, qt.Equals(passing(t, coll, whole, 3), 1))
}

// When several CPUs ask at once, no token is spent twice, and none is lost.
func TestRatelimitConcurrent(t *testing.T) {
	const workers, each, burst = 4, 200_000, 300_000
	coll := load(t, "ratelimit", constants{"rate": slow, "burst": burst})
	opts := ebpf.RunOptions{Data: packet(eth(typeIPv4), ipv4("192.0.2.1", protoUDP)), Repeat: each}

	start := time.Now()
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			// The kernel starts again when it is interrupted, so there are at least as many runs as asked for.
			_, err := coll.Programs["ratelimit"].Run(&opts)
			qt.Check(t, qt.IsNil(err))
		})
	}
	wg.Wait()
	refilled := slow*uint64(time.Since(start)/time.Second) + 1

	b := bucketOf(t, coll, "192.0.2.1")
	qt.Check(t, qt.IsTrue(b.Passed >= burst && b.Passed <= burst+refilled), qt.Commentf("%d passed", b.Passed))
	qt.Check(t, qt.IsTrue(b.Passed+b.Dropped >= workers*each), qt.Commentf("%d passed, %d dropped", b.Passed, b.Dropped))
	qt.Check(t, qt.Equals(limitTotals(t, coll), programs.LimitTotals{Passed: b.Passed, Dropped: b.Dropped}))
}
