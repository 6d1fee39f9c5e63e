package observe

import (
	"context"
	"net/netip"
	"slices"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// A chain that netlink carries is watched like others.
func TestMeasureUnprotected(t *testing.T) {
	s := scene.New(t)
	all, checkAll := seen(t, "ldt_all", hook.XDP, testenv.XDPDrop)
	s.AttachLegacy(t, all)

	// Before, there is a program without a link, of which the kernel tells less.
	got := sample(t, s, s.Target, func() { qt.Assert(t, qt.IsTrue(s.Drops(t))) })
	qt.Check(t, qt.Equals(got.Method, hook.MethodKernel))
	checkAll(t, got.Entries[0].Runs, 10)
	qt.Check(t, qt.IsTrue(got.Entries[0].Time > 0))
	qt.Check(t, qt.Equals(got.Entries[0].Verdicts, [hook.Verdicts]uint64{}))

	link, err := dispatcher.Adopt(t.Context(), s.Target, dispatcher.AdoptOptions{NoGap: true, BPFFS: s.BPFFS})
	qt.Assert(t, qt.IsNil(err))
	defer link.Close()
	got = sample(t, s, s.Target, func() { qt.Assert(t, qt.IsTrue(s.Drops(t))) })
	checkAll(t, dropped(got.Entries[0]), 10)
	wantPlain(t, s)
	s.Clear(t)
}

// Links on TCX are measured by the kernel.
func TestMeasureTCX(t *testing.T) {
	testenv.Need(t, testenv.FeatureTCX)
	s := scene.New(t)
	at := dispatcher.On(hook.TCXIngress, s.ServerDev).In(s.Server.Name)
	tcx := s.OnDevice(at)
	first, checkFirst := seen(t, "ldt_first", hook.TCXIngress, testenv.TCNext)
	second, checkSecond := seen(t, "ldt_second", hook.TCXIngress, testenv.TCPass)
	tcx.Attach(t, first, dispatcher.Options{Priority: 10})
	tcx.Attach(t, second, dispatcher.Options{Priority: 20})
	got := sample(t, s, at, func() {
		s.Send(t, scene.Port, 30)
		s.Send(t, scene.Port+1, 20)
	})
	qt.Check(t, qt.Equals(got.Method, hook.MethodKernel))
	qt.Check(t, qt.IsFalse(got.Whole.Known))
	checkFirst(t, got.Entries[0].Runs, 50)
	checkSecond(t, got.Entries[1].Runs, 50)
	for _, c := range got.Entries {
		qt.Check(t, qt.IsTrue(c.Known && c.Time > 0))
	}
}

// So are programs on a cgroup, whatever they are about.
func TestMeasureCgroup(t *testing.T) {
	s := scene.New(t)
	cgroup := testenv.NewCgroup(t)
	at := dispatcher.On(hook.CgroupConnect4, cgroup.Path)
	prog, ran := testenv.CgroupProgram(t, "ldt_connect", hook.CgroupConnect4, testenv.CgroupAllow)
	s.OnDevice(at).Attach(t, prog, dispatcher.Options{})
	resident := cgroup.Enter(t, s.Client)
	to := netip.AddrPortFrom(testenv.ServerIPv4, scene.Port)
	s.Server.Listen(t, to)
	got := sample(t, s, at, func() {
		for range 7 {
			_, err := resident.Dial(t, "udp", to)
			qt.Assert(t, qt.IsNil(err))
		}
	})
	qt.Check(t, qt.Equals(ran(), 7))
	qt.Check(t, qt.Equals(counted(got.Entries[0]), hook.Counts{Known: true, Runs: 7}))
}

// All of a network namespace at once. Not of the machine: that would put counting dispatchers in the chains of others, and
// of the tests that run beside this one.
func TestMeasureNamespace(t *testing.T) {
	s := scene.New(t)
	s.Attach(t, testenv.DropUDPPort(t, "ldt_drop", scene.Port), dispatcher.Options{})
	index := s.Server.AddDevice(t, "other", "type", "veth", "peer", "name", "other", "netns", s.Client.Name)
	s.Server.IP(t, "address", "add", upperServer.String()+"/24", "dev", "other")
	s.Client.IP(t, "address", "add", upperClient.String()+"/24", "dev", "other")
	s.Client.IP(t, "link", "set", "other", "up")
	s.Client.IP(t, "neigh", "add", upperServer.String(), "lladdr", "02:00:0a:4f:00:01", "dev", "other") // what drops all drops ARP
	other := &scene.Scene{Pair: &testenv.Pair{Server: s.Server, ServerIfindex: index}, Target: dispatcher.XDP("other").In(s.Server.Name)}
	legacy, checkLegacy := seen(t, "ldt_legacy", hook.XDP, testenv.XDPDrop)
	other.AttachLegacy(t, legacy)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	o := dispatcher.MeasureOptions{
		Interval: soonest, Hooks: []hook.Hook{hook.XDP}, BPFFS: s.BPFFS, NetNS: s.Server.Name,
		Started: func() {
			qt.Check(t, qt.IsTrue(s.Drops(t)))
			qt.Check(t, qt.Equals(s.PassedTo(t, netip.AddrPortFrom(upperServer, scene.Port), 10), 0))
		},
	}
	for samples, err := range dispatcher.Measure(ctx, o) {
		qt.Assert(t, qt.IsNil(err))
		of := func(s *scene.Scene) hook.Counts {
			i := slices.IndexFunc(samples, func(got hook.Sample) bool { return got.Chain.Target == s.Target.Device })
			qt.Assert(t, qt.IsTrue(i >= 0))
			return samples[i].Entries[0]
		}
		qt.Check(t, qt.Equals(dropped(of(s)), 10))
		checkLegacy(t, of(other).Runs, 10)
		cancel()
	}
	wantPlain(t, s)
}

// Of a chain of libxdp only the whole is known: its members are no programs of
// their own once they are in the dispatcher.
func TestMeasureLibxdp(t *testing.T) {
	s := scene.New(t)
	testenv.NeedFreplace(t)
	s.JoinLibxdp(t, 1, scene.Pass, 10)
	s.JoinLibxdp(t, 2, scene.Pass, 20)
	got := sample(t, s, s.Target, func() { s.Send(t, scene.Port, 10) })
	qt.Check(t, qt.Equals(got.Method, hook.MethodKernel))
	qt.Check(t, qt.IsTrue(got.Whole.Known && got.Whole.Runs >= 10))
	qt.Check(t, qt.DeepEquals(got.Entries, make([]hook.Counts, 2)))
	s.Clear(t)
}
