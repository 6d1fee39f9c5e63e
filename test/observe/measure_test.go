package observe

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
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
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// soonest is an interval for tests that count what happens, and not how fast.
const soonest = 20 * time.Millisecond

// measuring begins to measure a target and returns what takes a sample. The
// test must stop it.
func measuring(t testing.TB, s *scene.Scene, target dispatcher.Target, started func()) (next func() hook.Sample, stop func()) {
	t.Helper()
	pull, stop := iter.Pull2(dispatcher.Measure(t.Context(), dispatcher.MeasureOptions{
		BPFFS: s.BPFFS, Target: &target, Interval: soonest, Started: started,
	}))
	t.Cleanup(stop)
	return func() hook.Sample {
		t.Helper()
		samples, err, ok := pull()
		qt.Assert(t, qt.IsTrue(ok))
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.HasLen(samples, 1))
		return samples[0]
	}, stop
}

// sample measures what happens while fn runs.
func sample(t testing.TB, s *scene.Scene, target dispatcher.Target, fn func()) hook.Sample {
	t.Helper()
	next, stop := measuring(t, s, target, fn)
	defer stop()
	got := next()
	qt.Assert(t, qt.IsNil(got.Err))
	return got
}

// watchOf returns by what the chain is watched, 0 for a plain dispatcher.
func watchOf(t testing.TB, s *scene.Scene) uint32 {
	t.Helper()
	return described(t, s).Watch
}

// described is what the dispatcher says of the chain.
func described(t testing.TB, s *scene.Scene) *state.Chain {
	t.Helper()
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(s.Read(t).DispatcherID))
	for errors.Is(err, fs.ErrNotExist) { // a watcher has exchanged it just now
		prog, err = ebpf.NewProgramFromID(ebpf.ProgramID(s.Read(t).DispatcherID))
	}
	qt.Assert(t, qt.IsNil(err))
	defer prog.Close()
	c, err := state.Find(prog)
	qt.Assert(t, qt.IsNil(err))
	return c
}

func wantPlain(t testing.TB, s *scene.Scene) {
	t.Helper()
	qt.Assert(t, qt.Equals(watchOf(t, s), 0))
}

// said are the counts of an entry without its time.
func counted(c hook.Counts) hook.Counts {
	c.Time = 0
	return c
}

// dropped is how many packets were dropped: there are some, and none of those that
// IPv6 sends now and then is among them.
func dropped(c hook.Counts) uint64 { return c.Verdicts[hook.Drop] }

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
	scene.EachMode(t, func(t *testing.T, s *scene.Scene, mode hook.Mode) {
		all, checkAll := seen(t, "ldt_all", hook.XDP, testenv.XDPPass)
		s.Attach(t, all, dispatcher.Options{Priority: 10, Mode: mode})
		s.Attach(t, testenv.DropUDPPort(t, "ldt_drop", scene.Port), dispatcher.Options{Priority: 20})
		s.Attach(t, testenv.NewTrace(t, scene.Port+1).Program(t, 1, testenv.XDPTX), dispatcher.Options{Priority: 30})
		s.Attach(t, testenv.NewTrace(t, scene.Port+2).Program(t, 2, testenv.XDPAborted), dispatcher.Options{Priority: 40, ContinueOn: hook.SetOf(hook.Pass, hook.Aborted)})
		door := s.Attach(t, testenv.VerdictProgram(t, "ldt_door", testenv.XDPPass), dispatcher.Options{Priority: 50, OnMissing: hook.MissingDrop})
		s.Attach(t, testenv.VerdictProgram(t, "ldt_last", testenv.XDPPass), dispatcher.Options{Priority: 60})
		plain := s.Read(t).DispatcherID

		send := func() {
			for i, n := range []int{100, 70, 30, 50} {
				s.Send(t, scene.Port+i, n)
			}
		}
		got := sample(t, s, s.Target, func() {
			qt.Assert(t, qt.IsTrue(watchOf(t, s) != 0))
			send()
		})
		wantPlain(t, s)
		qt.Check(t, qt.IsTrue(s.Read(t).DispatcherID != plain))

		qt.Check(t, qt.Equals(got.Method, hook.MethodChain))
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
			qt.Check(t, qt.Equals(counted(c), hook.Counts{Known: true, Runs: runs, Verdicts: want}), name)
			// A run takes some time, and not much: the clock, and a call or two.
			qt.Check(t, qt.IsTrue(c.Time > 0 && c.PerRun() < time.Millisecond), name)
		}
		qt.Check(t, qt.IsTrue(got.Clock > 0 && got.Clock < 10*time.Microsecond), qt.Commentf("%v", got.Clock))

		// An empty slot with a closed door.
		qt.Assert(t, qt.IsNil(door.Close()))
		scene.Soon(t, func() bool {
			return s.Read(t).Member("ldt_door").State == hook.StateEmpty && s.Passed(t, scene.Port, 10) == 0
		})
		got = sample(t, s, s.Target, send)
		noise = got.Whole.Runs - 250
		qt.Check(t, qt.Equals(counted(got.Entries[4]), hook.Counts{Known: true, Empty: 80 + noise}))
		qt.Check(t, qt.Equals(counted(got.Entries[5]), hook.Counts{Known: true}))
	})
}

// A chain that is full is counted to its last member, with packets.
func TestMeasureFullChain(t *testing.T) {
	s := scene.New(t)
	pass := testenv.VerdictProgram(t, "ldt_pass", testenv.XDPPass)
	for i := range hook.MaxMembers - 1 {
		s.Attach(t, pass, dispatcher.Options{Name: fmt.Sprint(i)})
	}
	s.Attach(t, testenv.DropUDPPort(t, "ldt_drop", scene.Port), dispatcher.Options{})
	got := sample(t, s, s.Target, func() { qt.Assert(t, qt.IsTrue(s.Drops(t))) })
	qt.Check(t, qt.Equals(dropped(got.Entries[hook.MaxMembers-1]), 10))
	qt.Check(t, qt.IsTrue(s.Drops(t)))
}

// Somebody changes the chain while it is watched: it is done at once, and the
// counting goes on.
func TestMeasureChange(t *testing.T) {
	s := scene.New(t)
	// Each datagram to the port is aborted, and that goes on.
	s.Attach(t, testenv.NewTrace(t, scene.Port).Program(t, 1, testenv.XDPAborted), dispatcher.Options{Persistent: true, Priority: 10, ContinueOn: hook.SetOf(hook.Pass, hook.Aborted)})
	next, stop := measuring(t, s, s.Target, nil)
	next()
	s.Send(t, scene.Port, 5)
	watched := watchOf(t, s)

	link := s.Attach(t, testenv.DropUDPPort(t, "ldt_drop", scene.Port), dispatcher.Options{Priority: 20})
	wantPlain(t, s)
	qt.Assert(t, qt.IsTrue(s.Drops(t))) // not counted
	got := next()
	qt.Check(t, qt.IsTrue(got.Interrupted))
	qt.Check(t, qt.Equals(got.Entries[0].Verdicts[hook.Aborted], 5))
	qt.Check(t, qt.Equals(got.Entries[1], hook.Counts{}))
	qt.Assert(t, qt.IsTrue(watchOf(t, s) != 0 && watchOf(t, s) != watched))

	qt.Assert(t, qt.IsTrue(s.Drops(t)))
	got = next()
	qt.Check(t, qt.IsFalse(got.Interrupted))
	qt.Check(t, qt.Equals(got.Entries[0].Verdicts[hook.Aborted], 10))
	qt.Check(t, qt.Equals(dropped(got.Entries[1]), 10))

	// Another program in a slot is no change of the chain.
	qt.Assert(t, qt.IsNil(link.Update(t.Context(), dispatcher.Program(testenv.NewTrace(t, scene.Port).Program(t, 2, testenv.XDPTX)))))
	qt.Assert(t, qt.IsTrue(s.Drops(t)))
	got = next()
	qt.Check(t, qt.IsFalse(got.Interrupted))
	qt.Check(t, qt.Equals(got.Entries[1].Verdicts[hook.TX], 10))

	// Nor is there anything to clean up or to mend.
	found, err := dispatcher.Recover(t.Context(), dispatcher.RecoverOptions{BPFFS: s.BPFFS})
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.HasLen(found, 0))
	qt.Check(t, qt.IsTrue(watchOf(t, s) != 0))
	qt.Check(t, qt.IsFalse(next().Interrupted))
	stop()
	wantPlain(t, s)
	s.Clear(t)
}

// Of a long interval little is lost, and what was counted before a change and
// after it comes together.
func TestMeasureChangeSoon(t *testing.T) {
	for name, interval := range map[string]time.Duration{"none of it": time.Hour, "all of it": 500 * time.Millisecond} {
		t.Run(name, func(t *testing.T) {
			s := scene.New(t)
			s.Attach(t, testenv.DropUDPPort(t, "ldt_drop", scene.Port), dispatcher.Options{Priority: 10})
			started := make(chan struct{})
			o := dispatcher.MeasureOptions{
				BPFFS: s.BPFFS, Target: &s.Target, Interval: interval, Started: func() { close(started) },
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
			qt.Assert(t, qt.IsTrue(s.Drops(t)))
			for range 3 {
				watched := watchOf(t, s)
				s.Attach(t, testenv.VerdictProgram(t, "ldt_pass", testenv.XDPPass), dispatcher.Options{Name: fmt.Sprint(watched)})
				scene.Soon(t, func() bool { now := watchOf(t, s); return now != 0 && now != watched })
				qt.Assert(t, qt.IsTrue(s.Drops(t)))
			}
			if interval < time.Hour {
				scene.Soon(t, func() bool { return counted.Load() >= 40 })
				qt.Check(t, qt.IsTrue(interrupted.Load() > 0))
			}
			cancel()
			measuring.Wait()
			wantPlain(t, s)
			if interval < time.Hour {
				qt.Check(t, qt.Equals(counted.Load(), 40))
			}
		})
	}
}

// To be watched keeps nothing attached.
func TestMeasureKeepsNothing(t *testing.T) {
	s := scene.New(t)
	link := s.Attach(t, testenv.DropUDPPort(t, "ldt_drop", scene.Port), dispatcher.Options{})
	next, stop := measuring(t, s, s.Target, nil)
	qt.Assert(t, qt.HasLen(next().Entries, 1))
	qt.Assert(t, qt.IsNil(link.Close()))
	scene.Soon(t, func() bool { return len(next().Entries) == 0 })
	s.WantFree(t)

	// And what comes then is counted.
	s.Attach(t, testenv.DropUDPPort(t, "ldt_drop", scene.Port), dispatcher.Options{})
	scene.Soon(t, func() bool { return len(next().Entries) == 1 })
	qt.Assert(t, qt.IsTrue(s.Drops(t)))
	qt.Assert(t, qt.Equals(dropped(next().Entries[0]), 10))
	stop()
	wantPlain(t, s)
}

// Several may watch, and come and go as they like.
func TestMeasureTogether(t *testing.T) {
	s := scene.New(t)
	s.Attach(t, testenv.DropUDPPort(t, "ldt_drop", scene.Port), dispatcher.Options{})
	drop := func() { qt.Assert(t, qt.IsTrue(s.Drops(t))) }

	first, stopFirst := measuring(t, s, s.Target, drop)
	qt.Assert(t, qt.Equals(dropped(first().Entries[0]), 10))
	watch := watchOf(t, s)
	second, stopSecond := measuring(t, s, s.Target, drop)
	qt.Assert(t, qt.Equals(dropped(second().Entries[0]), 10))
	qt.Assert(t, qt.Equals(dropped(first().Entries[0]), 10))
	qt.Assert(t, qt.Equals(watchOf(t, s), watch))

	stopFirst()
	qt.Assert(t, qt.Equals(watchOf(t, s), watch))
	drop()
	got := second()
	qt.Assert(t, qt.IsFalse(got.Interrupted))
	qt.Assert(t, qt.Equals(dropped(got.Entries[0]), 10))
	stopSecond()
	wantPlain(t, s)
}

// A crowd watches, each for a while, and the chain is changed meanwhile.
func TestMeasureCrowd(t *testing.T) {
	s := scene.New(t)
	link := s.Attach(t, testenv.DropUDPPort(t, "ldt_drop", scene.Port), dispatcher.Options{})
	s.Attach(t, testenv.VerdictProgram(t, "ldt_pass", testenv.XDPPass), dispatcher.Options{})
	var crowd sync.WaitGroup
	for range 4 {
		a := scene.NewApp(t)
		crowd.Go(func() {
			for range 10 {
				if err := a.Do(t, s.Command(scene.Command{Op: "measure"})); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for i := range 20 {
		qt.Assert(t, qt.IsNil(link.Set(t.Context(), scene.Priority(40+20*(i%2)))))
		qt.Assert(t, qt.IsTrue(s.Drops(t)))
	}
	crowd.Wait()
	wantPlain(t, s)
}

// The watcher is killed: packets meet the chain as before, and the next one that
// comes along mends it.
func TestMeasureKilled(t *testing.T) {
	for name, mend := range map[string]func(*testing.T, *scene.Scene){
		"doctor": func(t *testing.T, s *scene.Scene) {
			found := wantFindings(t, s, "watched drift")
			qt.Check(t, qt.StringContains(found[0].Text, "was killed"))
			mend(t, found[0])
		},
		"recover": func(t *testing.T, s *scene.Scene) {
			found, err := dispatcher.Recover(t.Context(), dispatcher.RecoverOptions{BPFFS: s.BPFFS, DryRun: true})
			qt.Assert(t, qt.IsNil(err))
			qt.Assert(t, qt.HasLen(found, 1))
			qt.Assert(t, qt.IsTrue(watchOf(t, s) != 0))
			found, err = dispatcher.Recover(t.Context(), dispatcher.RecoverOptions{BPFFS: s.BPFFS})
			qt.Assert(t, qt.IsNil(err))
			qt.Assert(t, qt.HasLen(found, 1))
			qt.Assert(t, qt.Equals(found[0].Target, s.ServerDev))
		},
		"set": func(t *testing.T, s *scene.Scene) {
			qt.Assert(t, qt.IsNil(s.Open(t, "2").Set(t.Context(), scene.Priority(40))))
		},
		"update": func(t *testing.T, s *scene.Scene) { // which changes nothing but a slot
			qt.Assert(t, qt.IsNil(s.Open(t, "2").Update(t.Context(), dispatcher.Program(s.Tracer(t, 2, scene.Pass)))))
		},
		"watch": func(t *testing.T, s *scene.Scene) {
			got := sample(t, s, s.Target, func() { s.WantRun(t, 2, 9) })
			qt.Assert(t, qt.Equals(dropped(got.Entries[1]), 1))
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := scene.New(t)
			s.Member(t, 2)
			s.Member(t, 9)
			victim := scene.NewApp(t)
			got := victim.Try(t, s.Command(scene.Command{Op: "measure", DieAt: 2}))
			qt.Assert(t, qt.Equals(got.Died, "watch: after"))
			qt.Assert(t, qt.IsTrue(watchOf(t, s) != 0))
			scene.Soon(t, func() bool { // before the kernel has emptied the watch and after it
				s.WantRun(t, 2, 9)
				return state.Abandoned(described(t, s))
			})
			s.WantRun(t, 2, 9)
			mend(t, s)
			wantPlain(t, s)
			s.WantRun(t, 2, 9)
			s.Clear(t)
		})
	}
}

// A flood that is dropped is dropped while watchers come and go, in order or not.
func TestMeasureUnderFlood(t *testing.T) {
	scene.EachMode(t, func(t *testing.T, s *scene.Scene, mode hook.Mode) {
		s.Attach(t, testenv.VerdictProgram(t, "ldt_pass", testenv.XDPPass), dispatcher.Options{Priority: 10, Mode: mode})
		s.Attach(t, testenv.DropUDPPort(t, "ldt_drop", scene.Port), dispatcher.Options{Priority: 20, Persistent: true})
		flood, counted := s.Flood(t, scene.Port, scene.Port+1), uint64(0)
		for i := range scene.Changes(t, scene.Rounds/10) {
			counted += dropped(sample(t, s, s.Target, nil).Entries[1])
			if i%10 == 0 {
				victim := scene.NewApp(t)
				died := victim.Try(t, s.Command(scene.Command{Op: "measure", DieAt: 1 + i/10%4})).Died
				qt.Assert(t, qt.IsTrue(died != ""))
			}
		}
		scene.WantClosed(t, flood)
		qt.Check(t, qt.IsTrue(counted > 1000), qt.Commentf("%d counted", counted))
		sample(t, s, s.Target, nil)
		wantPlain(t, s)
		s.Clear(t)
	})
}
