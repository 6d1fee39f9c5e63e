package dispatcher_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// soonest is an interval for tests that count what happens, and not how fast.
const soonest = 20 * time.Millisecond

// measuring begins to measure a target and returns what takes a sample. The
// test must stop it.
func (s *scene) measuring(t testing.TB, target dispatcher.Target, started func()) (next func() dispatcher.Sample, stop func()) {
	t.Helper()
	pull, stop := iter.Pull2(dispatcher.Measure(t.Context(), dispatcher.MeasureOptions{
		ListOptions: dispatcher.ListOptions{BPFFS: s.bpffs}, Target: &target, Interval: soonest, Started: started,
	}))
	t.Cleanup(stop)
	return func() dispatcher.Sample {
		t.Helper()
		samples, err, ok := pull()
		qt.Assert(t, qt.IsTrue(ok))
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.HasLen(samples, 1))
		return samples[0]
	}, stop
}

// sample measures what happens while fn runs.
func (s *scene) sample(t testing.TB, target dispatcher.Target, fn func()) dispatcher.Sample {
	t.Helper()
	next, stop := s.measuring(t, target, fn)
	defer stop()
	got := next()
	qt.Assert(t, qt.IsNil(got.Err))
	return got
}

// watchOf returns by what the chain is watched, 0 for a plain dispatcher.
func (s *scene) watchOf(t testing.TB) uint32 {
	t.Helper()
	return s.described(t).Watch
}

// described is what the dispatcher says of the chain.
func (s *scene) described(t testing.TB) *state.Chain {
	t.Helper()
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(s.read(t).DispatcherID))
	for errors.Is(err, fs.ErrNotExist) { // whoever watches has exchanged it just now
		prog, err = ebpf.NewProgramFromID(ebpf.ProgramID(s.read(t).DispatcherID))
	}
	qt.Assert(t, qt.IsNil(err))
	defer prog.Close()
	c, err := state.Find(prog)
	qt.Assert(t, qt.IsNil(err))
	return c
}

func (s *scene) wantPlain(t testing.TB) {
	t.Helper()
	qt.Assert(t, qt.Equals(s.watchOf(t), 0))
}

// said are the counts of an entry without its time.
func counted(c dispatcher.Counts) dispatcher.Counts {
	c.Time = 0
	return c
}

// dropped is how many packets were dropped: there are some, and none of those that
// IPv6 sends now and then is among them.
func dropped(c dispatcher.Counts) uint64 { return c.Verdicts[hook.Drop] }

// seen is a program that passes packets on, and counts its runs. It returns what
// checks that others have counted n of them, and no more than it did itself, which
// is n as well unless IPv6 sent something.
func seen(t testing.TB, name string, h hook.Hook, verdict int) (prog *ebpf.Program, check func(t testing.TB, counted uint64, n int)) {
	t.Helper()
	prog, ran := testenv.CgroupProgram(t, name, h, verdict)
	before := 0
	return prog, func(t testing.TB, counted uint64, n int) {
		t.Helper()
		now := ran()
		qt.Check(t, qt.IsTrue(counted >= uint64(n) && counted <= uint64(now-before)), qt.Commentf("%d counted, %d to %d ran", counted, n, now-before))
		before = now
	}
}

// What was counted is what was sent, to the packet.
func TestMeasure(t *testing.T) {
	eachMode(t, func(t *testing.T, s *scene, mode hook.Mode) {
		all, checkAll := seen(t, "ldt_all", hook.XDP, testenv.XDPPass)
		s.attach(t, all, dispatcher.Options{Settings: priority(10), Mode: mode})
		s.attach(t, testenv.DropUDPPort(t, "ldt_drop", port), dispatcher.Options{Settings: priority(20)})
		s.attach(t, testenv.NewTrace(t, port+1).Program(t, 1, testenv.XDPTX), dispatcher.Options{Settings: priority(30)})
		s.attach(t, testenv.NewTrace(t, port+2).Program(t, 2, testenv.XDPAborted), dispatcher.Options{Settings: hook.Settings{
			Priority: 40, ContinueOn: hook.SetOf(hook.Pass, hook.Aborted),
		}})
		door := s.attach(t, testenv.VerdictProgram(t, "ldt_door", testenv.XDPPass), dispatcher.Options{Settings: hook.Settings{
			Priority: 50, OnMissing: hook.MissingDrop,
		}})
		s.attach(t, testenv.VerdictProgram(t, "ldt_last", testenv.XDPPass), dispatcher.Options{Settings: priority(60)})
		plain := s.read(t).DispatcherID

		send := func() {
			for i, n := range []int{100, 70, 30, 50} {
				s.Send(t, port+i, n)
			}
		}
		got := s.sample(t, s.target, func() {
			qt.Assert(t, qt.IsTrue(s.watchOf(t) != 0))
			send()
		})
		s.wantPlain(t)
		qt.Check(t, qt.IsTrue(s.read(t).DispatcherID != plain))

		qt.Check(t, qt.Equals(got.Method, dispatcher.MethodChain))
		qt.Check(t, qt.IsFalse(got.Interrupted))
		qt.Check(t, qt.IsTrue(got.Elapsed >= soonest))
		checkAll(t, got.Whole.Runs, 250)
		noise := got.Whole.Runs - 250
		for i, want := range [][hook.Verdicts]uint64{
			{hook.Pass: 250}, {hook.Drop: 100, hook.Pass: 150}, {hook.TX: 70, hook.Pass: 80}, {hook.Aborted: 30, hook.Pass: 50}, {hook.Pass: 80}, {hook.Pass: 80},
		} {
			want[hook.Pass] += noise
			c, name := got.Entries[i], qt.Commentf("%s", got.Chain.Members[i].Name)
			qt.Check(t, qt.Equals(c.Verdicts, want), name)
			runs := uint64(0)
			for _, n := range want {
				runs += n
			}
			qt.Check(t, qt.Equals(counted(c), dispatcher.Counts{Known: true, Runs: runs, Verdicts: want}), name)
			// A run takes some time, and not much: the clock, and a call or two.
			qt.Check(t, qt.IsTrue(c.Time > 0 && c.PerRun() < time.Millisecond), name)
		}
		qt.Check(t, qt.IsTrue(got.Clock > 0 && got.Clock < 10*time.Microsecond), qt.Commentf("%v", got.Clock))

		// An empty slot, whose door is closed.
		qt.Assert(t, qt.IsNil(door.Close()))
		soon(t, func() bool {
			return s.read(t).Member("ldt_door").State == hook.StateEmpty && s.Passed(t, port, 10) == 0
		})
		got = s.sample(t, s.target, send)
		noise = got.Whole.Runs - 250
		qt.Check(t, qt.Equals(counted(got.Entries[4]), dispatcher.Counts{Known: true, Empty: 80 + noise}))
		qt.Check(t, qt.Equals(counted(got.Entries[5]), dispatcher.Counts{Known: true}))
	})
}

// A chain that is full is counted to its last member, with packets.
func TestMeasureFullChain(t *testing.T) {
	s := newScene(t)
	pass := testenv.VerdictProgram(t, "ldt_pass", testenv.XDPPass)
	for i := range hook.MaxMembers - 1 {
		s.attach(t, pass, dispatcher.Options{Name: fmt.Sprint(i)})
	}
	s.attach(t, testenv.DropUDPPort(t, "ldt_drop", port), dispatcher.Options{})
	got := s.sample(t, s.target, func() { qt.Assert(t, qt.IsTrue(s.drops(t))) })
	qt.Check(t, qt.Equals(dropped(got.Entries[hook.MaxMembers-1]), 10))
	qt.Check(t, qt.IsTrue(s.drops(t)))
}

// Somebody changes the chain while it is watched: it is done at once, and the
// counting goes on.
func TestMeasureChange(t *testing.T) {
	s := newScene(t)
	// Each datagram to the port is aborted, and that goes on.
	s.attach(t, testenv.NewTrace(t, port).Program(t, 1, testenv.XDPAborted), dispatcher.Options{Persistent: true, Settings: hook.Settings{
		Priority: 10, ContinueOn: hook.SetOf(hook.Pass, hook.Aborted),
	}})
	next, stop := s.measuring(t, s.target, nil)
	next()
	s.Send(t, port, 5)
	watched := s.watchOf(t)

	link := s.attach(t, testenv.DropUDPPort(t, "ldt_drop", port), dispatcher.Options{Settings: priority(20)})
	s.wantPlain(t)
	qt.Assert(t, qt.IsTrue(s.drops(t))) // not counted
	got := next()
	qt.Check(t, qt.IsTrue(got.Interrupted))
	qt.Check(t, qt.Equals(got.Entries[0].Verdicts[hook.Aborted], 5))
	qt.Check(t, qt.Equals(got.Entries[1], dispatcher.Counts{}))
	qt.Assert(t, qt.IsTrue(s.watchOf(t) != 0 && s.watchOf(t) != watched))

	qt.Assert(t, qt.IsTrue(s.drops(t)))
	got = next()
	qt.Check(t, qt.IsFalse(got.Interrupted))
	qt.Check(t, qt.Equals(got.Entries[0].Verdicts[hook.Aborted], 10))
	qt.Check(t, qt.Equals(dropped(got.Entries[1]), 10))

	// Another program in a slot is no change of the chain.
	qt.Assert(t, qt.IsNil(link.Update(t.Context(), dispatcher.Program(testenv.NewTrace(t, port).Program(t, 2, testenv.XDPTX)))))
	qt.Assert(t, qt.IsTrue(s.drops(t)))
	got = next()
	qt.Check(t, qt.IsFalse(got.Interrupted))
	qt.Check(t, qt.Equals(got.Entries[1].Verdicts[hook.TX], 10))

	// Nor is there anything to clean up or to mend.
	found, err := dispatcher.Recover(t.Context(), dispatcher.RecoverOptions{BPFFS: s.bpffs})
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.HasLen(found, 0))
	qt.Check(t, qt.IsTrue(s.watchOf(t) != 0))
	qt.Check(t, qt.IsFalse(next().Interrupted))
	stop()
	s.wantPlain(t)
	s.clear(t)
}

// Of a long interval little is lost, and what was counted before a change and
// after it comes together.
func TestMeasureChangeSoon(t *testing.T) {
	for name, interval := range map[string]time.Duration{"none of it": time.Hour, "all of it": 500 * time.Millisecond} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t)
			s.attach(t, testenv.DropUDPPort(t, "ldt_drop", port), dispatcher.Options{Settings: priority(10)})
			started := make(chan struct{})
			o := dispatcher.MeasureOptions{
				ListOptions: dispatcher.ListOptions{BPFFS: s.bpffs}, Target: &s.target, Interval: interval, Started: func() { close(started) },
			}
			var counted, interrupted atomic.Uint64
			ctx, cancel := context.WithCancel(t.Context())
			var measuring sync.WaitGroup
			defer measuring.Wait()
			defer cancel()
			measuring.Go(func() {
				for samples, err := range dispatcher.Measure(ctx, o) {
					if err != nil {
						t.Error(err)
						return
					}
					counted.Add(dropped(samples[0].Entries[0]))
					if samples[0].Interrupted {
						interrupted.Add(1)
					}
				}
			})
			<-started
			qt.Assert(t, qt.IsTrue(s.drops(t)))
			for range 3 {
				watched := s.watchOf(t)
				s.attach(t, testenv.VerdictProgram(t, "ldt_pass", testenv.XDPPass), dispatcher.Options{Name: fmt.Sprint(watched)})
				soon(t, func() bool { now := s.watchOf(t); return now != 0 && now != watched })
				qt.Assert(t, qt.IsTrue(s.drops(t)))
			}
			if interval < time.Hour {
				soon(t, func() bool { return counted.Load() >= 40 })
				qt.Check(t, qt.IsTrue(interrupted.Load() > 0))
			}
			cancel()
			measuring.Wait()
			s.wantPlain(t)
			if interval < time.Hour {
				qt.Check(t, qt.Equals(counted.Load(), 40))
			}
		})
	}
}

// To be watched keeps nothing attached.
func TestMeasureKeepsNothing(t *testing.T) {
	s := newScene(t)
	link := s.attach(t, testenv.DropUDPPort(t, "ldt_drop", port), dispatcher.Options{})
	next, stop := s.measuring(t, s.target, nil)
	qt.Assert(t, qt.HasLen(next().Entries, 1))
	qt.Assert(t, qt.IsNil(link.Close()))
	soon(t, func() bool { return len(next().Entries) == 0 })
	s.wantFree(t)

	// And what comes then is counted.
	s.attach(t, testenv.DropUDPPort(t, "ldt_drop", port), dispatcher.Options{})
	soon(t, func() bool { return len(next().Entries) == 1 })
	qt.Assert(t, qt.IsTrue(s.drops(t)))
	qt.Assert(t, qt.Equals(dropped(next().Entries[0]), 10))
	stop()
	s.wantPlain(t)
}

// Several may watch, and come and go as they like.
func TestMeasureTogether(t *testing.T) {
	s := newScene(t)
	s.attach(t, testenv.DropUDPPort(t, "ldt_drop", port), dispatcher.Options{})
	drop := func() { qt.Assert(t, qt.IsTrue(s.drops(t))) }

	first, stopFirst := s.measuring(t, s.target, drop)
	qt.Assert(t, qt.Equals(dropped(first().Entries[0]), 10))
	watch := s.watchOf(t)
	second, stopSecond := s.measuring(t, s.target, drop)
	qt.Assert(t, qt.Equals(dropped(second().Entries[0]), 10))
	qt.Assert(t, qt.Equals(dropped(first().Entries[0]), 10))
	qt.Assert(t, qt.Equals(s.watchOf(t), watch))

	stopFirst()
	qt.Assert(t, qt.Equals(s.watchOf(t), watch))
	drop()
	got := second()
	qt.Assert(t, qt.IsFalse(got.Interrupted))
	qt.Assert(t, qt.Equals(dropped(got.Entries[0]), 10))
	stopSecond()
	s.wantPlain(t)
}

// A crowd watches, each for a while, and the chain is changed meanwhile.
func TestMeasureCrowd(t *testing.T) {
	s := newBusyScene(t)
	link := s.attach(t, testenv.DropUDPPort(t, "ldt_drop", port), dispatcher.Options{})
	s.attach(t, testenv.VerdictProgram(t, "ldt_pass", testenv.XDPPass), dispatcher.Options{})
	var crowd sync.WaitGroup
	for range 4 {
		a := newApp(t)
		crowd.Go(func() {
			for range 10 {
				if err := a.do(t, s.command(command{Op: "measure"})); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for i := range 20 {
		qt.Assert(t, qt.IsNil(link.Set(t.Context(), priority(40+20*(i%2)))))
		qt.Assert(t, qt.IsTrue(s.drops(t)))
	}
	crowd.Wait()
	s.wantPlain(t)
}

// The watcher is killed: packets meet the chain as before, and the next one who
// comes along mends it.
func TestMeasureKilled(t *testing.T) {
	for name, mend := range map[string]func(*testing.T, *scene){
		"doctor": func(t *testing.T, s *scene) {
			found := s.wantFindings(t, "watched drift")
			qt.Check(t, qt.StringContains(found[0].Text, "was killed"))
			mend(t, found[0])
		},
		"recover": func(t *testing.T, s *scene) {
			found, err := dispatcher.Recover(t.Context(), dispatcher.RecoverOptions{BPFFS: s.bpffs, DryRun: true})
			qt.Assert(t, qt.IsNil(err))
			qt.Assert(t, qt.HasLen(found, 1))
			qt.Assert(t, qt.IsTrue(s.watchOf(t) != 0))
			found, err = dispatcher.Recover(t.Context(), dispatcher.RecoverOptions{BPFFS: s.bpffs})
			qt.Assert(t, qt.IsNil(err))
			qt.Assert(t, qt.HasLen(found, 1))
			qt.Assert(t, qt.Equals(found[0].Target, s.ServerDev))
		},
		"set": func(t *testing.T, s *scene) {
			qt.Assert(t, qt.IsNil(s.open(t, "2").Set(t.Context(), priority(40))))
		},
		"update": func(t *testing.T, s *scene) { // which changes nothing but a slot
			qt.Assert(t, qt.IsNil(s.open(t, "2").Update(t.Context(), dispatcher.Program(s.tracer(t, 2, pass)))))
		},
		"watch": func(t *testing.T, s *scene) {
			got := s.sample(t, s.target, func() { s.wantRun(t, 2, 9) })
			qt.Assert(t, qt.Equals(dropped(got.Entries[1]), 1))
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t)
			with(2, 9)(t, s)
			victim := newApp(t)
			got := victim.try(t, s.command(command{Op: "measure", DieAt: 2}))
			qt.Assert(t, qt.Equals(got.Died, "watch: after"))
			qt.Assert(t, qt.IsTrue(s.watchOf(t) != 0))
			soon(t, func() bool { // before the kernel has emptied the watch and after it
				s.wantRun(t, 2, 9)
				return state.Abandoned(s.described(t))
			})
			s.wantRun(t, 2, 9)
			mend(t, s)
			s.wantPlain(t)
			s.wantRun(t, 2, 9)
			s.clear(t)
		})
	}
}

// A flood that is dropped is dropped while watchers come and go, in order or not.
func TestMeasureUnderFlood(t *testing.T) {
	eachMode(t, func(t *testing.T, s *scene, mode hook.Mode) {
		s.attach(t, testenv.VerdictProgram(t, "ldt_pass", testenv.XDPPass), dispatcher.Options{Settings: priority(10), Mode: mode})
		s.attach(t, testenv.DropUDPPort(t, "ldt_drop", port), dispatcher.Options{Settings: priority(20), Persistent: true})
		flood, counted := s.Flood(t, port, port+1), uint64(0)
		for i := range changes(t, rounds/10) {
			counted += dropped(s.sample(t, s.target, nil).Entries[1])
			if i%10 == 0 {
				victim := newApp(t)
				died := victim.try(t, s.command(command{Op: "measure", DieAt: 1 + i/10%4})).Died
				qt.Assert(t, qt.IsTrue(died != ""))
			}
		}
		wantClosed(t, flood)
		qt.Check(t, qt.IsTrue(counted > 1000), qt.Commentf("%d counted", counted))
		s.sample(t, s.target, nil)
		s.wantPlain(t)
		s.clear(t)
	})
}

// A chain that netlink carries is watched like others.
func TestMeasureUnprotected(t *testing.T) {
	s := newScene(t)
	all, checkAll := seen(t, "ldt_all", hook.XDP, testenv.XDPDrop)
	s.attachLegacy(t, all)

	// Before, there is a program without a link, of which the kernel tells less.
	got := s.sample(t, s.target, func() { qt.Assert(t, qt.IsTrue(s.drops(t))) })
	qt.Check(t, qt.Equals(got.Method, dispatcher.MethodKernel))
	checkAll(t, got.Entries[0].Runs, 10)
	qt.Check(t, qt.IsTrue(got.Entries[0].Time > 0))
	qt.Check(t, qt.Equals(got.Entries[0].Verdicts, [hook.Verdicts]uint64{}))

	link, err := dispatcher.Adopt(t.Context(), s.target, dispatcher.AdoptOptions{NoGap: true, Options: dispatcher.Options{BPFFS: s.bpffs}})
	qt.Assert(t, qt.IsNil(err))
	defer link.Close()
	got = s.sample(t, s.target, func() { qt.Assert(t, qt.IsTrue(s.drops(t))) })
	checkAll(t, dropped(got.Entries[0]), 10)
	s.wantPlain(t)
	s.clear(t)
}

// Links on TCX are measured by the kernel.
func TestMeasureTCX(t *testing.T) {
	testenv.Need(t, testenv.FeatureTCX)
	s := newScene(t)
	at := dispatcher.On(hook.TCXIngress, s.ServerDev).In(s.Server.Name)
	tcx := s.onDevice(at)
	first, checkFirst := seen(t, "ldt_first", hook.TCXIngress, testenv.TCNext)
	second, checkSecond := seen(t, "ldt_second", hook.TCXIngress, testenv.TCPass)
	tcx.attach(t, first, dispatcher.Options{Settings: priority(10)})
	tcx.attach(t, second, dispatcher.Options{Settings: priority(20)})
	got := s.sample(t, at, func() {
		s.Send(t, port, 30)
		s.Send(t, port+1, 20)
	})
	qt.Check(t, qt.Equals(got.Method, dispatcher.MethodKernel))
	qt.Check(t, qt.IsFalse(got.Whole.Known))
	checkFirst(t, got.Entries[0].Runs, 50)
	checkSecond(t, got.Entries[1].Runs, 50)
	for _, c := range got.Entries {
		qt.Check(t, qt.IsTrue(c.Known && c.Time > 0))
	}
}

// So are programs on a cgroup, whatever they are about.
func TestMeasureCgroup(t *testing.T) {
	s := newScene(t)
	cgroup := testenv.NewCgroup(t)
	at := dispatcher.On(hook.CgroupConnect4, cgroup.Path)
	prog, ran := testenv.CgroupProgram(t, "ldt_connect", hook.CgroupConnect4, testenv.CgroupAllow)
	s.onDevice(at).attach(t, prog, dispatcher.Options{})
	resident := cgroup.Enter(t, s.Client)
	to := netip.AddrPortFrom(testenv.ServerIPv4, port)
	s.Server.Listen(t, to)
	got := s.sample(t, at, func() {
		for range 7 {
			_, err := resident.Dial(t, "udp", to)
			qt.Assert(t, qt.IsNil(err))
		}
	})
	qt.Check(t, qt.Equals(ran(), 7))
	qt.Check(t, qt.Equals(counted(got.Entries[0]), dispatcher.Counts{Known: true, Runs: 7}))
}

// All of the machine at once.
func TestMeasureAll(t *testing.T) {
	s := newScene(t)
	s.attach(t, testenv.DropUDPPort(t, "ldt_drop", port), dispatcher.Options{})
	other := setUp(t)
	legacy, checkLegacy := seen(t, "ldt_legacy", hook.XDP, testenv.XDPDrop)
	other.attachLegacy(t, legacy)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	o := dispatcher.MeasureOptions{
		Interval: soonest, ListOptions: dispatcher.ListOptions{Hooks: []hook.Hook{hook.XDP}, BPFFS: s.bpffs},
		Started: func() {
			qt.Check(t, qt.IsTrue(s.drops(t)))
			qt.Check(t, qt.IsTrue(other.drops(t)))
		},
	}
	for samples, err := range dispatcher.Measure(ctx, o) {
		qt.Assert(t, qt.IsNil(err))
		of := func(pair *scene) dispatcher.Counts {
			i := slices.IndexFunc(samples, func(got dispatcher.Sample) bool { return got.Chain.NetNS.Name == pair.Server.Name })
			qt.Assert(t, qt.IsTrue(i >= 0))
			return samples[i].Entries[0]
		}
		qt.Check(t, qt.Equals(dropped(of(s)), 10))
		checkLegacy(t, of(other).Runs, 10)
		cancel()
	}
	s.wantPlain(t)
}

// Of a chain of libxdp only the whole is known: its members are no programs of
// their own once they are in the dispatcher.
func TestMeasureLibxdp(t *testing.T) {
	s := newScene(t)
	testenv.NeedFreplace(t)
	s.joinLibxdp(t, 1, pass, 10)
	s.joinLibxdp(t, 2, pass, 20)
	got := s.sample(t, s.target, func() { s.Send(t, port, 10) })
	qt.Check(t, qt.Equals(got.Method, dispatcher.MethodKernel))
	qt.Check(t, qt.IsTrue(got.Whole.Known && got.Whole.Runs >= 10))
	qt.Check(t, qt.DeepEquals(got.Entries, make([]dispatcher.Counts, 2)))
	s.clear(t)
}
