package observe

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// A device that is renamed, or goes to another namespace, moved; when it is gone
// its members are defunct.
func TestWatchDevice(t *testing.T) {
	s := scene.New(t)
	other := testenv.NewNetNS(t)
	xdp := s.Attach(t, s.Tracer(t, 1, testenv.XDPPass), dispatcher.Options{Name: "a"})
	both := func(xdp, tcx string) []string { return []string{xdp, tcx} }
	if testenv.Has(t, testenv.FeatureTCX) {
		tcx := s.OnDevice(dispatcher.On(hook.TCXIngress, s.ServerDev).In(s.Server.Name))
		tcx.Attach(t, testenv.VerdictProgram(t, "ldt_b", testenv.TCNext, testenv.On(hook.TCXIngress)), dispatcher.Options{Name: "b", Persistent: true})
	} else {
		both = func(xdp, _ string) []string { return []string{xdp} }
	}
	one := watch(t, s, watchHere(s))
	all := watch(t, s, dispatcher.WatchOptions{First: true})
	all.want(t, both("present a 0>1/1", "present b 0>1/1")...)

	s.Server.IP(t, "link", "set", s.ServerDev, "down")
	s.Server.IP(t, "link", "set", s.ServerDev, "name", "renamed")
	e := all.wantAll(t, both("moved xdp renamed", "moved tcx/ingress renamed")...)[0]
	qt.Check(t, qt.Equals(e.From.Target, s.ServerDev))
	one.wantAll(t, both("moved xdp renamed", "moved tcx/ingress renamed")...)

	s.Server.IP(t, "link", "set", "renamed", "netns", other.Name)
	e = all.wantAll(t, both("moved xdp renamed", "moved tcx/ingress renamed")...)[0]
	qt.Check(t, qt.Equals(e.From.NetNS.Name, s.Server.Name))
	qt.Check(t, qt.Equals(e.NetNS.Name, other.Name))
	e = one.wantAll(t, both("moved xdp", "moved tcx/ingress")...)[0]
	qt.Check(t, qt.Equals(e.From.Target, "renamed"))

	other.IP(t, "link", "del", "renamed")
	all.wantAll(t, both("defunct a 1>0/0", "defunct b 1>0/0")...)
	all.wantNone(t)
	one.wantNone(t)
	xdp.Close()
	qt.Assert(t, qt.IsNil(os.RemoveAll(s.BPFFS+"/libdispatcher")))
}

// A namespace that goes is not held, and neither is a cgroup.
func TestWatchTargetsGone(t *testing.T) {
	s := scene.New(t)
	cg := testenv.NewCgroup(t)
	on := s.OnDevice(dispatcher.On(hook.CgroupSKBIngress, cg.Path))
	on.Attach(t, testenv.VerdictProgram(t, "ldt_c", testenv.CgroupAllow, testenv.On(hook.CgroupSKBIngress)), dispatcher.Options{Name: "c"})
	s.Attach(t, s.Tracer(t, 1, testenv.XDPPass), dispatcher.Options{Name: "a"})
	w := watch(t, s, dispatcher.WatchOptions{})
	cg.Remove(t)
	w.want(t, "defunct c 1>0/0")
	qt.Assert(t, qt.IsNil(s.Server.Delete()))
	w.want(t, "defunct a 1>0/0")
	// The peer goes with it, in the other namespace.
	scene.Soon(t, func() bool { _, err := s.Client.TryIP("link", "show", s.ClientDev); return err != nil })
	w.wantNone(t)
}

// Many in quick succession are all told of, in the order in which they came.
func TestWatchMany(t *testing.T) {
	s := scene.New(t)
	const targets, each = 5, 40
	var cgroups []*testenv.Cgroup
	for range targets {
		cgroups = append(cgroups, testenv.NewCgroup(t))
	}
	o := dispatcher.WatchOptions{}
	o.Hooks = []hook.Hook{hook.CgroupSKBEgress}
	w := watch(t, s, o)
	prog := testenv.VerdictProgram(t, "ldt_many", testenv.CgroupAllow, testenv.On(hook.CgroupSKBEgress))
	var want, got []string
	for i := range targets * each {
		name := fmt.Sprint("m", i)
		want = append(want, name)
		on := s.OnDevice(dispatcher.On(hook.CgroupSKBEgress, cgroups[i%targets].Path))
		on.Attach(t, prog, dispatcher.Options{Name: name})
	}
	for len(got) < len(want) {
		e := w.next(t)
		// A link is there before its name. A look in between tells of both.
		if e.Kind == hook.EventAttached && e.Entry != hook.KindMember {
			e = w.next(t)
			qt.Assert(t, qt.Equals(e.Kind, hook.EventNamed), qt.Commentf("%s", words(&e)))
		} else {
			qt.Assert(t, qt.Equals(e.Kind, hook.EventAttached), qt.Commentf("%s", words(&e)))
		}
		got = append(got, e.Name)
	}
	qt.Assert(t, qt.DeepEquals(got, want))
	w.wantNone(t)
}

// Looking keeps nothing alive, and loses no slot: see "Readers" in
// docs/pins-and-state.md.
func TestWatchHoldsNothing(t *testing.T) {
	s := scene.New(t)
	o := watchHere(s)
	o.Interval = time.Millisecond
	w := watch(t, s, o)
	go func() {
		for range w.events {
		}
	}()
	for i := range 40 {
		link := s.Attach(t, s.Tracer(t, i, testenv.XDPPass), dispatcher.Options{Name: "a"})
		time.Sleep(time.Duration(i%7) * time.Millisecond)
		qt.Assert(t, qt.IsNil(link.Close()))
		scene.Soon(t, func() bool { return len(s.Read(t).Members) == 0 })
	}
	s.WantFree(t)
}

// How late events are, by what brings them, the median and the most.
func BenchmarkWatchLate(b *testing.B) {
	for _, intervalOnly := range []bool{false, true} {
		name := map[bool]string{false: "signs", true: "interval-only"}[intervalOnly]
		b.Run(name, func(b *testing.B) { benchmarkLate(b, intervalOnly) })
	}
}

func benchmarkLate(b *testing.B, intervalOnly bool) {
	s := scene.New(b)
	o := watchHere(s)
	o.IntervalOnly = intervalOnly
	w := watch(b, s, o)
	tcx := s.OnDevice(dispatcher.On(hook.TCXIngress, s.ServerDev).In(s.Server.Name))
	prog := testenv.VerdictProgram(b, "ldt_late", testenv.TCNext, testenv.On(hook.TCXIngress))
	legacy := testenv.VerdictProgram(b, "ldt_netlink", testenv.XDPPass)
	late := map[string][]time.Duration{}
	measure := func(what string, kind hook.EventKind, do func()) {
		time.Sleep(100*time.Millisecond + rand.N(time.Second)) // any time between two looks
		do()
		done := time.Now()
		e := w.next(b)
		qt.Assert(b, qt.Equals(e.Kind, kind), qt.Commentf("%s", words(&e)))
		late[what] = append(late[what], e.Time.Sub(done))
	}
	for b.Loop() {
		var l *dispatcher.Link
		measure("attach", hook.EventAttached, func() { l = tcx.Attach(b, prog, dispatcher.Options{Name: "late"}) })
		measure("pin", hook.EventPinned, func() { qt.Assert(b, qt.IsNil(scene.Second(l.Pin(b.Context())))) })
		measure("unpin", hook.EventUnpinned, func() { qt.Assert(b, qt.IsNil(l.Unpin(b.Context()))) })
		// The program stays: the kernel gives no sign.
		measure("close", hook.EventLeft, func() { l.Close() })
		measure("netlink", hook.EventAttached, func() { s.AttachLegacy(b, legacy) })
		measure("netlink-off", hook.EventLeft, func() { s.Server.IP(b, "link", "set", s.ServerDev, "xdp", "off") })
		var a *scene.App
		measure("attach-xdp", hook.EventAttached, func() { a = s.AttachIn(b, legacy, dispatcher.Options{Name: "held"}) })
		measure("kill", hook.EventLeft, func() { a.Kill() })
	}
	for what, d := range late {
		slices.Sort(d)
		b.ReportMetric(float64(d[len(d)/2].Microseconds())/1000, what+"-ms")
		b.ReportMetric(float64(d[len(d)-1].Microseconds())/1000, what+"-max-ms")
	}
}

// The loop may end whenever it likes, and a context that has ended is no error.
func TestWatchEnds(t *testing.T) {
	s := scene.New(t)
	s.Attach(t, s.Tracer(t, 1, testenv.XDPPass), dispatcher.Options{Name: "a"})
	o := watchHere(s)
	o.First, o.BPFFS = true, s.BPFFS
	n := 0
	for e, err := range dispatcher.Watch(t.Context(), o) {
		qt.Assert(t, qt.IsNil(err))
		qt.Check(t, qt.Equals(words(&e), "present a 0>1/1"))
		n++
		break
	}
	qt.Check(t, qt.Equals(n, 1))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for range dispatcher.Watch(ctx, o) {
		t.Error("an event after the end")
	}
	o.NetNS = "ldt-none"
	for _, err := range dispatcher.Watch(t.Context(), o) {
		qt.Check(t, qt.ErrorMatches(err, "watch: there is no network namespace .*"))
		n++
	}
	qt.Check(t, qt.Equals(n, 2))
}
