package rtnl_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

const port = 7000

// at is the address of a filter for all protocols on ingress.
func at(pref uint16, handle uint32) hook.Filter {
	return hook.Filter{Parent: rtnl.ClsactIngress, Pref: pref, Protocol: unix.ETH_P_ALL, Handle: handle, DirectAction: true}
}

func dial(t testing.TB, ns *testenv.NetNS) *rtnl.Conn {
	t.Helper()
	var c *rtnl.Conn
	ns.Do(t, func() {
		var err error
		c, err = rtnl.Dial()
		qt.Assert(t, qt.IsNil(err))
	})
	t.Cleanup(func() { c.Close() })
	return c
}

// newServer returns a pair, and a connection to its server side, which gets the
// filters.
func newServer(t testing.TB) (*testenv.Pair, *rtnl.Conn) {
	t.Helper()
	testenv.CheckLeaks(t)
	pair := testenv.NewPair(t)
	return pair, dial(t, pair.Server)
}

func tc(t testing.TB, ns *testenv.NetNS, command string) string {
	t.Helper()
	out, err := exec.Command("tc", append([]string{"-n", ns.Name}, strings.Fields(command)...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("tc %s: %v\n%s", command, err, out)
	}
	return string(out)
}

func verdict(t testing.TB, name string, verdict int) *ebpf.Program {
	t.Helper()
	return testenv.VerdictProgram(t, name, verdict, testenv.On(hook.TCIngress))
}

// pinned pins a program for tc.
func pinned(t testing.TB, prog *ebpf.Program) string {
	t.Helper()
	path := filepath.Join(testenv.BPFFS(t), "prog")
	qt.Assert(t, qt.IsNil(prog.Pin(path)))
	return path
}

// wantFilter is the filter that Filters must return for f with that program.
func wantFilter(t testing.TB, f hook.Filter, prog *ebpf.Program, name, qdisc string) rtnl.Filter {
	t.Helper()
	info, err := prog.Info()
	qt.Assert(t, qt.IsNil(err))
	id, _ := info.ID()
	return rtnl.Filter{Filter: f, Kind: "bpf", Name: name, Program: uint32(id), Tag: info.Tag, Qdisc: qdisc}
}

func filters(t testing.TB, c *rtnl.Conn, index int) []rtnl.Filter {
	t.Helper()
	list, err := c.Filters(index)
	qt.Assert(t, qt.IsNil(err))
	// FiltersOf needs fewer requests and returns the same.
	d, err := c.DeviceByIndex(index)
	qt.Assert(t, qt.IsNil(err))
	known, err := c.FiltersOf(d)
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.DeepEquals(known, list))
	return list
}

func TestFilter(t *testing.T) {
	pair, c := newServer(t)
	index := pair.ServerIfindex
	drop, pass := verdict(t, "ldt_drop", testenv.TCDrop), verdict(t, "ldt_pass", testenv.TCPass)
	qt.Assert(t, qt.HasLen(filters(t, c, index), 0))

	qt.Assert(t, qt.ErrorIs(c.AddFilter(index, at(1, 1), drop.FD(), ""), unix.EINVAL)) // no qdisc
	qt.Assert(t, qt.IsNil(c.EnsureClsact(index)))
	qt.Assert(t, qt.IsNil(c.EnsureClsact(index)))
	qt.Assert(t, qt.HasLen(filters(t, c, index), 0))

	address := at(7, 0x2a)
	qt.Assert(t, qt.ErrorIs(c.ReplaceFilter(index, address, drop.FD(), "nobody"), fs.ErrNotExist))
	qt.Assert(t, qt.HasLen(filters(t, c, index), 0)) // and the request made no qdisc

	qt.Assert(t, qt.IsNil(c.AddFilter(index, address, drop.FD(), "first")))
	qt.Assert(t, qt.DeepEquals(filters(t, c, index), []rtnl.Filter{wantFilter(t, address, drop, "first", "clsact")}))
	qt.Assert(t, qt.Equals(pair.Passed(t, port, 10), 0))

	err := c.AddFilter(index, address, pass.FD(), "second")
	qt.Assert(t, qt.ErrorIs(err, unix.EEXIST))
	qt.Assert(t, qt.ErrorIs(err, fs.ErrExist))
	qt.Assert(t, qt.DeepEquals(filters(t, c, index), []rtnl.Filter{wantFilter(t, address, drop, "first", "clsact")}))

	qt.Assert(t, qt.IsNil(c.ReplaceFilter(index, address, pass.FD(), "second")))
	qt.Assert(t, qt.DeepEquals(filters(t, c, index), []rtnl.Filter{wantFilter(t, address, pass, "second", "clsact")}))
	qt.Assert(t, qt.Equals(pair.Passed(t, port, 10), 10))

	qt.Assert(t, qt.IsNil(c.DeleteFilter(index, address)))
	qt.Assert(t, qt.HasLen(filters(t, c, index), 0))
	qt.Assert(t, qt.ErrorIs(c.DeleteFilter(index, address), fs.ErrNotExist))
	qt.Assert(t, qt.StringContains(tc(t, pair.Server, "qdisc show dev veth1"), "clsact"))
}

// Filters that disappeared in other ways than by a request with their handle.
func TestFilterMissing(t *testing.T) {
	pair, c := newServer(t)
	index := pair.ServerIfindex
	prog := verdict(t, "ldt_pass", testenv.TCPass)
	missing := func(address hook.Filter) {
		t.Helper()
		qt.Check(t, qt.ErrorIs(c.ReplaceFilter(index, address, prog.FD(), ""), fs.ErrNotExist))
		qt.Check(t, qt.ErrorIs(c.DeleteFilter(index, address), fs.ErrNotExist))
	}
	qt.Assert(t, qt.IsNil(c.EnsureClsact(index)))
	qt.Assert(t, qt.IsNil(c.AddFilter(index, at(7, 1), prog.FD(), "")))
	tc(t, pair.Server, "filter add dev veth1 ingress pref 8 protocol all u32 match u32 0 0")

	ipv4 := at(7, 1)
	ipv4.Protocol = unix.ETH_P_IP
	missing(ipv4)
	qt.Assert(t, qt.ErrorIs(c.AddFilter(index, ipv4, prog.FD(), ""), unix.EINVAL))
	missing(at(7, 2))
	missing(at(8, 0x800))
	missing(at(9, 1))
	chain := at(7, 1)
	chain.Chain = 5
	missing(chain)
	egress := at(7, 1)
	egress.Parent = rtnl.ClsactEgress
	missing(egress)
	class := at(7, 1)
	class.Parent = 0x10002
	missing(class)
	qt.Assert(t, qt.HasLen(filters(t, c, index), 3)) // with the one of u32 and its hash table

	// A filter that exists: the error must be the kernel's reason for refusing
	// the program.
	xdp := testenv.VerdictProgram(t, "ldt_xdp", testenv.XDPPass)
	err := c.ReplaceFilter(index, at(7, 1), xdp.FD(), "")
	qt.Assert(t, qt.ErrorIs(err, unix.EINVAL))
	qt.Assert(t, qt.IsFalse(errors.Is(err, fs.ErrNotExist)))

	tc(t, pair.Server, "qdisc del dev veth1 clsact")
	missing(at(7, 1))
	qt.Assert(t, qt.HasLen(filters(t, c, index), 0))
	qt.Assert(t, qt.IsNil(c.EnsureClsact(index)))
	qt.Assert(t, qt.IsNil(c.AddFilter(index, at(7, 1), prog.FD(), "")))
}

func TestFilterWithoutDevice(t *testing.T) {
	pair, c := newServer(t)
	prog := verdict(t, "ldt_pass", testenv.TCPass)
	_, want := c.DeviceByIndex(1000)
	qt.Assert(t, qt.ErrorIs(want, fs.ErrNotExist))
	_, list := c.Filters(1000)
	for _, err := range []error{
		list, c.EnsureClsact(1000), c.DeleteFilter(1000, at(1, 1)),
		c.AddFilter(1000, at(1, 1), prog.FD(), ""), c.ReplaceFilter(1000, at(1, 1), prog.FD(), ""),
	} {
		qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
		qt.Check(t, qt.ErrorMatches(err, want.Error()))
	}
	pair.Server.IP(t, "link", "del", "veth1")
	_, err := c.Filters(pair.ServerIfindex)
	qt.Assert(t, qt.ErrorIs(err, fs.ErrNotExist))
}

func TestFilterUsage(t *testing.T) {
	pair, c := newServer(t)
	index := pair.ServerIfindex
	prog := verdict(t, "ldt_pass", testenv.TCPass)
	qt.Assert(t, qt.IsNil(c.EnsureClsact(index)))

	long := strings.Repeat("n", 256)
	qt.Assert(t, qt.IsNil(c.AddFilter(index, at(7, 1), prog.FD(), long)))
	qt.Assert(t, qt.IsNil(c.AddFilter(index, at(7, 2), prog.FD(), "")))
	qt.Assert(t, qt.DeepEquals(filters(t, c, index), []rtnl.Filter{
		wantFilter(t, at(7, 2), prog, "", "clsact"), wantFilter(t, at(7, 1), prog, long, "clsact"),
	}))
	qt.Assert(t, qt.ErrorIs(c.AddFilter(index, at(7, 3), prog.FD(), long+"n"), hook.ErrUsage))
	qt.Assert(t, qt.ErrorIs(c.ReplaceFilter(index, at(7, 1), prog.FD(), "a\x00b"), hook.ErrUsage))

	other := at(7, 1)
	other.Protocol = 0
	for _, address := range []hook.Filter{at(7, 0), at(0, 1), other} {
		qt.Check(t, qt.ErrorIs(c.AddFilter(index, address, prog.FD(), ""), hook.ErrUsage))
		qt.Check(t, qt.ErrorIs(c.ReplaceFilter(index, address, prog.FD(), ""), hook.ErrUsage))
		qt.Check(t, qt.ErrorIs(c.DeleteFilter(index, address), hook.ErrUsage))
	}
	qt.Assert(t, qt.HasLen(filters(t, c, index), 2))
}

// The list has the order in which packets meet the filters: a filter behind a
// program with a final verdict gets no packet.
func TestFilterOrder(t *testing.T) {
	pair, c := newServer(t)
	index := pair.ServerIfindex
	qt.Assert(t, qt.IsNil(c.EnsureClsact(index)))
	final := verdict(t, "ldt_final", testenv.TCPass)

	var want []hook.Filter
	progs := map[hook.Filter]*ebpf.Program{}
	counts := map[hook.Filter]func() int{}
	for i, address := range []hook.Filter{at(20, 1), at(10, 5), at(30, 1), at(10, 9), at(10, 7), at(20, 2)} {
		name := fmt.Sprintf("ldt_count_%d", i)
		progs[address], counts[address] = testenv.CountProgram(t, name, port, testenv.TCNext, testenv.On(hook.TCIngress))
		qt.Assert(t, qt.IsNil(c.AddFilter(index, address, progs[address].FD(), name)))
	}
	for _, f := range filters(t, c, index) {
		want = append(want, f.Filter)
	}
	// Of equal preference the newest is first.
	qt.Assert(t, qt.DeepEquals(want, []hook.Filter{at(10, 7), at(10, 9), at(10, 5), at(20, 2), at(20, 1), at(30, 1)}))

	for last, address := range want {
		before := map[hook.Filter]int{}
		for address, count := range counts {
			before[address] = count()
		}
		qt.Assert(t, qt.IsNil(c.ReplaceFilter(index, address, final.FD(), "final")))
		qt.Assert(t, qt.Equals(pair.Passed(t, port, 10), 10))
		for i, address := range want {
			seen := 10
			if i >= last {
				seen = 0
			}
			qt.Check(t, qt.Equals(counts[address]()-before[address], seen), qt.Commentf("filter %d with filter %d final", i, last))
		}
		qt.Assert(t, qt.IsNil(c.ReplaceFilter(index, address, progs[address].FD(), "count")))
	}
}

// Filters reads filters that tc made as tc shows them.
func TestFiltersOfTC(t *testing.T) {
	pair, c := newServer(t)
	index := pair.ServerIfindex
	prog := verdict(t, "ldt_pass", testenv.TCPass)
	pin := pinned(t, prog)

	ns := pair.Server
	tc(t, ns, "qdisc add dev veth1 clsact")
	tc(t, ns, "filter add dev veth1 ingress pref 5 handle 0x2a protocol ip chain 3 bpf da object-pinned "+pin)
	tc(t, ns, "filter add dev veth1 ingress pref 9 handle 1 protocol ip bpf object-pinned "+pin+" classid 1:1")
	tc(t, ns, "filter add dev veth1 egress pref 6 handle 3 protocol ipv6 bpf da object-pinned "+pin)
	bytecode := filepath.Join(t.TempDir(), "bytecode")
	qt.Assert(t, qt.IsNil(os.WriteFile(bytecode, []byte("1,6 0 0 0"), 0o600)))
	tc(t, ns, "filter add dev veth1 egress pref 7 handle 4 bpf bytecode-file "+bytecode)
	tc(t, ns, "filter add dev veth1 egress pref 8 protocol all u32 match u32 0 0")

	const name = "prog:[*fsobj]"
	in := hook.Filter{Parent: rtnl.ClsactIngress, Pref: 9, Protocol: unix.ETH_P_IP, Handle: 1}
	chain := hook.Filter{Parent: rtnl.ClsactIngress, Chain: 3, Pref: 5, Protocol: unix.ETH_P_IP, Handle: 0x2a, DirectAction: true}
	out := hook.Filter{Parent: rtnl.ClsactEgress, Pref: 6, Protocol: unix.ETH_P_IPV6, Handle: 3, DirectAction: true}
	classic := hook.Filter{Parent: rtnl.ClsactEgress, Pref: 7, Protocol: unix.ETH_P_ALL, Handle: 4}
	list := filters(t, c, index)
	qt.Assert(t, qt.DeepEquals(list, []rtnl.Filter{
		wantFilter(t, in, prog, name, "clsact"), wantFilter(t, chain, prog, name, "clsact"), wantFilter(t, out, prog, name, "clsact"),
		{Filter: classic, Kind: "bpf", Qdisc: "clsact"},
		{Filter: hook.Filter{Parent: rtnl.ClsactEgress, Pref: 8, Protocol: unix.ETH_P_ALL, Handle: 0x80000000}, Kind: "u32", Qdisc: "clsact"}, // its hash table
		{Filter: hook.Filter{Parent: rtnl.ClsactEgress, Pref: 8, Protocol: unix.ETH_P_ALL, Handle: 0x80000800}, Kind: "u32", Qdisc: "clsact"},
	}))
	qt.Assert(t, qt.Equals(list[1].Hook(), hook.TCIngress))
	qt.Assert(t, qt.Equals(list[2].Hook(), hook.TCEgress))

	tc(t, ns, "filter del dev veth1 egress pref 8")
	for _, f := range list[:4] {
		qt.Assert(t, qt.IsNil(c.DeleteFilter(index, f.Filter)))
	}
	qt.Assert(t, qt.HasLen(filters(t, c, index), 0))
}

// tc shows filters that this package made as it shows its own.
func TestFilterShownByTC(t *testing.T) {
	pair, c := newServer(t)
	qt.Assert(t, qt.IsNil(c.EnsureClsact(pair.ServerIfindex)))
	prog := verdict(t, "ldt_pass", testenv.TCPass)
	address := hook.Filter{Parent: rtnl.ClsactEgress, Chain: 2, Pref: 17, Protocol: unix.ETH_P_IPV6, Handle: 0x2a}
	qt.Assert(t, qt.IsNil(c.AddFilter(pair.ServerIfindex, address, prog.FD(), "file.o:[tc]")))
	qt.Assert(t, qt.StringContains(tc(t, pair.Server, "filter show dev veth1 egress"),
		"filter protocol ipv6 pref 17 bpf chain 2 handle 0x2a file.o:[tc] direct-action not_in_hw id "))
	qt.Assert(t, qt.Equals(tc(t, pair.Server, "filter show dev veth1 ingress"), ""))
}

func TestFiltersOfHTB(t *testing.T) {
	pair, c := newServer(t)
	index, ns := pair.ServerIfindex, pair.Server
	prog := verdict(t, "ldt_pass", testenv.TCPass)
	for _, command := range []string{
		"qdisc add dev veth1 root handle 1: htb default 10",
		"class add dev veth1 parent 1: classid 1:10 htb rate 1gbit",
		"class add dev veth1 parent 1: classid 1:20 htb rate 1gbit",
		"qdisc add dev veth1 parent 1:20 handle 2: htb",
		"class add dev veth1 parent 2: classid 2:5 htb rate 1gbit",
	} {
		tc(t, ns, command)
	}
	qt.Assert(t, qt.IsNil(c.EnsureClsact(index)))
	var want []rtnl.Filter
	for _, parent := range []uint32{rtnl.ClsactIngress, 0x1_0000, 0x1_0010, 0x2_0000, 0x2_0005} {
		address := at(3, 1)
		address.Parent = parent
		qdisc := "htb"
		if parent == rtnl.ClsactIngress {
			qdisc = "clsact"
		}
		qt.Assert(t, qt.IsNil(c.AddFilter(index, address, prog.FD(), "f")))
		want = append(want, wantFilter(t, address, prog, "f", qdisc))
	}
	list := filters(t, c, index)
	qt.Assert(t, qt.ContentEquals(list, want)) // the kernel lists classes in any order
	for _, f := range list[1:] {
		qt.Check(t, qt.Equals(f.Hook(), hook.TCQdisc))
	}
	for _, f := range list {
		qt.Assert(t, qt.IsNil(c.DeleteFilter(index, f.Filter)))
	}
	qt.Assert(t, qt.HasLen(filters(t, c, index), 0))
}

func TestFiltersOfIngress(t *testing.T) {
	pair, c := newServer(t)
	index := pair.ServerIfindex
	drop := verdict(t, "ldt_drop", testenv.TCDrop)
	tc(t, pair.Server, "qdisc add dev veth1 ingress")
	err := c.EnsureClsact(index)
	qt.Assert(t, qt.ErrorIs(err, hook.ErrBusy))
	qt.Assert(t, qt.ErrorMatches(err, ".*old ingress qdisc.*"))
	qt.Assert(t, qt.HasLen(filters(t, c, index), 0))

	// The ingress qdisc accepts any parent, clsact's egress side too, and shows
	// the one that was used last.
	for _, parent := range []uint32{0xffff0000, rtnl.ClsactIngress, rtnl.ClsactEgress} {
		address := at(3, 1)
		address.Parent = parent
		qt.Assert(t, qt.IsNil(c.AddFilter(index, address, drop.FD(), "f")))
		list := filters(t, c, index)
		qt.Assert(t, qt.DeepEquals(list, []rtnl.Filter{wantFilter(t, address, drop, "f", "ingress")}))
		qt.Assert(t, qt.Equals(list[0].Hook(), hook.TCIngress))
		qt.Assert(t, qt.Equals(pair.Passed(t, port, 10), 0))
		qt.Assert(t, qt.IsNil(c.DeleteFilter(index, list[0].Filter)))
		qt.Assert(t, qt.Equals(pair.Passed(t, port, 10), 10))
	}
}

// Filters of a shared block are read like others, and cannot be changed.
func TestFiltersOfSharedBlock(t *testing.T) {
	pair, c := newServer(t)
	index := pair.ServerIfindex
	prog := verdict(t, "ldt_pass", testenv.TCPass)
	pin := pinned(t, prog)
	tc(t, pair.Server, "qdisc add dev veth1 ingress_block 22 egress_block 23 clsact")
	tc(t, pair.Server, "filter add block 22 pref 5 handle 1 protocol all bpf da object-pinned "+pin)

	want := wantFilter(t, at(5, 1), prog, "prog:[*fsobj]", "clsact")
	want.Block = 22
	qt.Assert(t, qt.DeepEquals(filters(t, c, index), []rtnl.Filter{want}))
	qt.Assert(t, qt.ErrorIs(c.DeleteFilter(index, at(5, 1)), unix.EOPNOTSUPP))
	qt.Assert(t, qt.ErrorIs(c.ReplaceFilter(index, at(5, 1), prog.FD(), ""), unix.EOPNOTSUPP))
	qt.Assert(t, qt.ErrorIs(c.AddFilter(index, at(5, 2), prog.FD(), ""), unix.EOPNOTSUPP))
	qt.Assert(t, qt.DeepEquals(filters(t, c, index), []rtnl.Filter{want}))
}

// While one drop program replaces another, no packet passes.
func TestReplaceFilterUnderFlood(t *testing.T) {
	pair, c := newServer(t)
	index := pair.ServerIfindex
	progs := []*ebpf.Program{
		testenv.DropUDPPort(t, "ldt_drop_a", port, testenv.On(hook.TCIngress)),
		testenv.DropUDPPort(t, "ldt_drop_b", port, testenv.On(hook.TCIngress)),
	}
	qt.Assert(t, qt.IsNil(c.EnsureClsact(index)))
	qt.Assert(t, qt.IsNil(c.AddFilter(index, at(1, 1), progs[0].FD(), "0")))

	flood := pair.Flood(t, port, port+1)
	for i := 1; i <= 200; i++ {
		for before := flood.Sent(); flood.Sent() < before+100; {
		}
		qt.Assert(t, qt.IsNil(c.ReplaceFilter(index, at(1, 1), progs[i%2].FD(), fmt.Sprint(i))))
	}
	sent, received := flood.Stop()
	_, marked := flood.Marker()
	t.Logf("%d sent, %d others arrived", sent, marked)
	qt.Assert(t, qt.Equals(received, 0))
	qt.Assert(t, qt.Not(qt.Equals(marked, 0)))
}

// A list contains every filter that existed all the time exactly once, whatever
// is added or removed meanwhile.
func TestFiltersWhileOthersChange(t *testing.T) {
	pair, c := newServer(t)
	index := pair.ServerIfindex
	other := dial(t, pair.Server)
	prog := verdict(t, "ldt_pass", testenv.TCPass)
	qt.Assert(t, qt.IsNil(c.EnsureClsact(index)))
	var want []hook.Filter
	for i := range uint32(50) {
		address := at(7, 50-i)
		qt.Assert(t, qt.IsNil(c.AddFilter(index, address, prog.FD(), "a name of usual length")))
		want = append([]hook.Filter{address}, want...)
	}

	var stop atomic.Bool
	var changing sync.WaitGroup
	changing.Go(func() {
		for !stop.Load() {
			for _, address := range []hook.Filter{at(7, 100), at(6, 1)} {
				if err := errors.Join(other.AddFilter(index, address, prog.FD(), ""), other.DeleteFilter(index, address)); err != nil {
					t.Error(err)
					return
				}
			}
		}
	})
	defer changing.Wait()
	defer stop.Store(true)
	for range 1000 {
		var got []hook.Filter
		list, err := c.Filters(index)
		qt.Assert(t, qt.IsNil(err))
		for _, f := range list {
			if f.Pref == 7 && f.Handle <= 50 {
				got = append(got, f.Filter)
			}
		}
		if !slices.Equal(got, want) {
			t.Fatalf("got %v, want %v", got, want)
		}
	}
}
