package testenv_test

import (
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

func attachTCX(t testing.TB, ns *testenv.NetNS, ifindex int, h hook.Hook, prog *ebpf.Program) link.Link {
	t.Helper()
	var l link.Link
	ns.Do(t, func() {
		var err error
		l, err = link.AttachTCX(link.TCXOptions{Interface: ifindex, Program: prog, Attach: testenv.AttachType(h)})
		qt.Assert(t, qt.IsNil(err))
	})
	t.Cleanup(func() { l.Close() })
	return l
}

func TestReplied(t *testing.T) {
	testenv.CheckLeaks(t)
	pair := testenv.NewPair(t)
	for _, n := range []int{0, 1, 1000} {
		qt.Assert(t, qt.Equals(pair.Replied(t, port, n), n))
		qt.Assert(t, qt.Equals(pair.Replied6(t, port, n), n))
	}
}

func TestTCX(t *testing.T) {
	type exchange func(t testing.TB, port, n int) int
	for h, pick := range map[hook.Hook]func(*testenv.Pair) (exchange, exchange){
		hook.TCXIngress: func(p *testenv.Pair) (exchange, exchange) { return p.Passed, p.Passed6 },
		hook.TCXEgress:  func(p *testenv.Pair) (exchange, exchange) { return p.Replied, p.Replied6 },
	} {
		t.Run(string(h), func(t *testing.T) {
			testenv.NeedHook(t, h)
			testenv.CheckLeaks(t)
			pair := testenv.NewPair(t)
			passed, passed6 := pick(pair)
			attach := func(prog *ebpf.Program) link.Link {
				t.Helper()
				return attachTCX(t, pair.Server, pair.ServerIfindex, h, prog)
			}
			want := func(n, n6, others int) {
				t.Helper()
				qt.Assert(t, qt.Equals(passed(t, port, 10), n))
				qt.Assert(t, qt.Equals(passed6(t, port, 10), n6))
				qt.Assert(t, qt.Equals(passed(t, other, 10), others))
			}
			l := attach(testenv.DropUDPPort(t, "ldt_drop", port, testenv.On(h)))
			want(0, 0, 10)
			last := attach(testenv.VerdictProgram(t, "ldt_last", testenv.TCDrop, testenv.On(h)))
			want(0, 0, 0)
			qt.Assert(t, qt.IsNil(last.Close()))
			qt.Assert(t, qt.IsNil(l.Close()))
			want(10, 10, 10)

			trace := testenv.NewTrace(t, port)
			attach(trace.Program(t, 1, testenv.TCNext, testenv.On(h)))
			attach(trace.Program(t, 2, testenv.TCPass, testenv.On(h), testenv.ExpectedAttachType(testenv.AttachType(h))))
			attach(trace.Program(t, 3, testenv.TCDrop, testenv.On(h)))
			count, counted := testenv.CountProgram(t, "ldt_count", other, testenv.TCNext, testenv.On(h))
			attach(count)
			for range 2 {
				want(10, 10, 10)
				qt.Assert(t, qt.DeepEquals(trace.Last(t), []int{1, 2}))
				trace.Reset(t)
			}
			qt.Assert(t, qt.Equals(counted(), 20))
		})
	}
}

func TestClsact(t *testing.T) {
	testenv.CheckLeaks(t)
	pair := testenv.NewPair(t)
	pin := filepath.Join(testenv.BPFFS(t), "prog")
	qt.Assert(t, qt.IsNil(testenv.DropUDPPort(t, "ldt_drop", port, testenv.On(hook.TCIngress)).Pin(pin)))
	pair.Server.TC(t, "qdisc", "add", "dev", pair.ServerDev, "clsact")
	for side, passed := range map[string]func(t testing.TB, port, n int) int{"ingress": pair.Passed, "egress": pair.Replied} {
		qt.Assert(t, qt.Equals(passed(t, port, 10), 10))
		pair.Server.TC(t, "filter", "add", "dev", pair.ServerDev, side, "bpf", "direct-action", "object-pinned", pin)
		qt.Assert(t, qt.Equals(passed(t, port, 10), 0))
		qt.Assert(t, qt.Equals(passed(t, other, 10), 10))
	}
	qt.Assert(t, qt.StringContains(pair.Server.TC(t, "filter", "show", "dev", pair.ServerDev, "egress"), "ldt_drop"))
}
