package contract

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// What filters are for, mostly: a member that drops what must not arrive, and nothing else.
func TestContractDropsOnePort(t *testing.T) {
	for _, h := range []hook.Hook{hook.XDP, hook.TCXIngress, hook.TCXEgress, hook.TCIngress, hook.TCEgress} {
		t.Run(string(h), func(t *testing.T) {
			p := newPlace(t, h)
			passed := map[bool]func(testing.TB, int, int) int{true: p.Replied, false: p.Passed}[p.Side() == "egress"]
			link, err := p.tryAttach(t, testenv.DropUDPPort(t, "ldt_drop", scene.Port, testenv.On(h)), dispatcher.Options{})
			qt.Assert(t, qt.IsNil(err))
			p.join(t, 1, dispatcher.Options{Priority: 1})
			qt.Check(t, qt.Equals(passed(t, scene.Port, 10), 0))
			qt.Check(t, qt.DeepEquals(p.Trace.Last(t), []int{1}))
			qt.Check(t, qt.Equals(passed(t, scene.Port+1, 10), 10))
			other := map[bool]func(testing.TB, int, int) int{false: p.Replied, true: p.Passed}[p.Side() == "egress"]
			qt.Check(t, qt.Equals(other(t, scene.Port, 10), 10))
			qt.Assert(t, qt.IsNil(link.Detach(t.Context())))
			qt.Check(t, qt.Equals(passed(t, scene.Port, 10), 10))
			p.end(t, false)
		})
	}
}

// A proxy that clients do not know of: they ask for one address and reach another, for as long as the member is there.
func TestContractRedirectsConnections(t *testing.T) {
	for h, ip := range map[hook.Hook]netip.Addr{
		hook.CgroupConnect4: netip.AddrFrom4([4]byte{127, 0, 0, 1}), hook.CgroupConnect6: netip.IPv6Loopback(),
	} {
		t.Run(string(h), func(t *testing.T) {
			p := newPlace(t, h)
			asked, real := p.aside.Listen(t, netip.AddrPortFrom(ip, 0)), p.aside.Listen(t, netip.AddrPortFrom(ip, 0))
			reaches := func(want netip.AddrPort) {
				t.Helper()
				for _, network := range []string{"tcp", "udp"} {
					got, err := p.Resident.Dial(t, network, asked)
					qt.Assert(t, qt.IsNil(err))
					qt.Check(t, qt.Equals(got, testenv.Reached{Peer: want, Answer: want}))
				}
			}
			reaches(asked)
			link, err := p.tryAttach(t, testenv.ConnectTo(t, "ldt_proxy", real), dispatcher.Options{})
			qt.Assert(t, qt.IsNil(err))
			reaches(real)
			qt.Assert(t, qt.IsNil(link.Close()))
			reaches(asked)
			p.end(t, false)
		})
	}
}

// A meter that bills by the datagram must not miss one, nor count one twice: also while it is moved and exchanged.
func TestContractCountsEveryDatagram(t *testing.T) {
	p := newPlace(t, hook.CgroupSKBEgress)
	program := func() (*ebpf.Program, func() int) {
		return testenv.CountProgram(t, "ldt_meter", scene.Port, testenv.CgroupAllow, testenv.On(p.Target.Hook))
	}
	meter, count := program()
	link, err := p.tryAttach(t, meter, dispatcher.Options{Priority: 10})
	qt.Assert(t, qt.IsNil(err))
	p.join(t, 1, dispatcher.Options{Priority: 20})
	to := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), scene.Port)
	send := func(n int) {
		t.Helper()
		accepted, arrived := p.Resident.Passed(t, p.aside, to, n)
		qt.Assert(t, qt.Equals(accepted, n))
		qt.Assert(t, qt.Equals(arrived, n))
	}
	send(17)
	qt.Check(t, qt.Equals(count(), 17))
	qt.Assert(t, qt.IsNil(link.Set(t.Context(), scene.Priority(30))))
	send(25)
	qt.Check(t, qt.Equals(count(), 42))

	next, countNext := program()
	qt.Assert(t, qt.IsNil(link.Update(t.Context(), dispatcher.Program(next))))
	send(8)
	qt.Check(t, qt.Equals(count(), 42))
	qt.Check(t, qt.Equals(countNext(), 8))
	p.end(t, false)
}

// A filter that lets packets through while it is exchanged for a better one is none.
func TestContractUpdateLeaksNothing(t *testing.T) {
	for _, h := range []hook.Hook{hook.TCXIngress, hook.TCIngress} {
		t.Run(string(h), func(t *testing.T) {
			testenv.CheckLeaks(t)
			p := newPlace(t, h)
			var progs [2]*ebpf.Program
			for i := range progs {
				progs[i] = testenv.DropUDPPort(t, fmt.Sprintf("ldt_drop_%d", i), scene.Port, testenv.On(h))
			}
			link, err := p.tryAttach(t, progs[0], dispatcher.Options{})
			qt.Assert(t, qt.IsNil(err))
			flood := p.Flood(t, scene.Port)
			scene.Soon(t, func() bool { return flood.Sent() > 1000 })
			for n := range scene.Changes(t, 200) {
				qt.Assert(t, qt.IsNil(link.Update(t.Context(), dispatcher.Program(progs[(n+1)%2]))))
			}
			sent, received := flood.Stop()
			qt.Check(t, qt.Equals(received, 0), qt.Commentf("of %d", sent))
			p.end(t, false)
		})
	}
}

// A program that refuses is heeded on every hook where one may refuse.
func TestContractRefusesCalls(t *testing.T) {
	for _, h := range hook.CgroupHooks() {
		if !testenv.CanDeny(h) {
			continue // nor does the kernel load such a program
		}
		t.Run(string(h), func(t *testing.T) {
			p := newPlace(t, h)
			link, err := p.tryAttach(t, testenv.VerdictProgram(t, "ldt_deny", testenv.CgroupDeny, testenv.On(h)), dispatcher.Options{})
			qt.Assert(t, qt.IsNil(err))
			err = p.exercise(t)
			if want := testenv.Denied(h); want != nil {
				qt.Check(t, qt.ErrorIs(err, want))
			} else {
				qt.Check(t, qt.IsNil(err))
			}
			qt.Assert(t, qt.IsNil(link.Close()))
			qt.Check(t, qt.IsNil(p.exercise(t)))
			p.end(t, false)
		})
	}
}
