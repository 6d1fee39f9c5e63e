package dispatcher_test

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// adopt makes a legacy program a member, which leaves with the test at the latest.
func (s *scene) adopt(t testing.TB, o dispatcher.AdoptOptions) *dispatcher.Link {
	t.Helper()
	o.BPFFS = s.bpffs
	link, err := dispatcher.Adopt(t.Context(), s.target, o)
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { link.Close() })
	return link
}

// clearAtEnd takes what is on the device off at the end of the test: nothing else ends a chain without a link.
func (s *scene) clearAtEnd(t testing.TB) {
	t.Cleanup(func() { s.free(t) })
}

// atEachStep calls at for each step that an operation comes to (kernel.Step), while the operation waits.
func atEachStep(operation func() error, at func(step string)) error {
	steps, next, done := make(chan string), make(chan bool), make(chan error, 1)
	kernel.OnStep = func(step string) { steps <- step; <-next }
	defer func() { kernel.OnStep = nil }()
	go func() { done <- operation() }()
	for {
		select {
		case step := <-steps:
			at(step)
			next <- true
		case err := <-done:
			return err
		}
	}
}

var noGap = map[string]bool{"with a gap": false, "without a gap": true}

// The program that has run for months goes on, with all that its maps have learnt; it only gets company.
func TestAdopt(t *testing.T) {
	for name, noGap := range noGap {
		t.Run(name, func(t *testing.T) {
			eachMode(t, func(t *testing.T, s *scene, mode hook.Mode) {
				s.clearAtEnd(t)
				prog, counted := testenv.CountProgram(t, "ldt_old", port, testenv.XDPPass)
				s.occupy(t, prog, hook.KindLegacy, mode)
				s.Send(t, port, 10)

				o := dispatcher.AdoptOptions{NoGap: noGap}
				o.Settings = hook.Settings{Priority: 30, ContinueOn: hook.SetOf(hook.Pass, hook.Drop), OnMissing: hook.MissingDrop}
				o.Owner = "old-app"
				o.Mode = hook.ModeNative + hook.ModeGeneric - mode // to be ignored
				old := s.adopt(t, o)

				m, err := old.Info(t.Context())
				qt.Assert(t, qt.IsNil(err))
				want := hook.Member{
					Name: "ldt_old", Settings: o.Settings, Owner: "old-app", Kind: hook.KindMember, State: hook.StateRunning,
					Program: programOf(t, prog), SlotID: m.SlotID,
				}
				want.Program.LoadedAt = m.Program.LoadedAt
				qt.Check(t, qt.Equals(*m, want))

				c := s.read(t)
				qt.Check(t, qt.Equals(c.Mode, mode))
				qt.Check(t, qt.Equals(c.Protected(), !noGap))
				qt.Check(t, qt.IsTrue(c.Ours()))

				s.attach(t, s.tracer(t, 1, testenv.XDPPass), dispatcher.Options{Settings: priority(1)})
				s.attach(t, s.tracer(t, 2, testenv.XDPPass), dispatcher.Options{})
				s.wantChain(t, "ldt_trace_1 ldt_old ldt_trace_2")
				s.wantRun(t, 1, 2)
				qt.Check(t, qt.Equals(counted(), 11))

				intruder := testenv.VerdictProgram(t, "ldt_intruder", testenv.XDPPass)
				if err := s.setXDP(t, intruder.FD(), legacyFlags[mode], 0); noGap {
					qt.Check(t, qt.IsNil(err)) // that is what not protected means
				} else {
					qt.Check(t, qt.ErrorIs(err, unix.EBUSY))
				}
			})
		})
	}
}

// The promise of NoGap: not one packet that the old program would have dropped gets through.
func TestAdoptNoGap(t *testing.T) {
	s := newScene(t)
	s.clearAtEnd(t)
	drop := testenv.DropUDPPort(t, "ldt_old", port)
	s.attachLegacy(t, drop)
	flood := s.Flood(t, port, port+1)
	for range 50 {
		link := s.adopt(t, dispatcher.AdoptOptions{NoGap: true})
		// Netlink exchanges programs without a gap, so the old one can come back for the next round.
		qt.Assert(t, qt.IsNil(s.setXDP(t, drop.FD(), unix.XDP_FLAGS_DRV_MODE, 0)))
		qt.Assert(t, qt.IsNil(link.Close()))
	}
	sent, received := flood.Stop()
	_, marker := flood.Marker()
	t.Logf("%d adopted, %d packets sent, marker %d", 50, sent, marker)
	qt.Check(t, qt.Equals(received, 0))
	qt.Check(t, qt.IsTrue(sent > 1000 && marker > 10))
}

// The control for the test above, and the reason for NoGap: what is sent between the two system calls of the other way
// passes. All work is done outside of that gap.
func TestAdoptWithGap(t *testing.T) {
	for name, noGap := range noGap {
		t.Run(name, func(t *testing.T) {
			s := newScene(t)
			s.clearAtEnd(t)
			s.attachLegacy(t, testenv.DropUDPPort(t, "ldt_old", port))
			passed := map[string]int{}
			err := atEachStep(func() error {
				o := dispatcher.AdoptOptions{NoGap: noGap}
				o.BPFFS, o.Persistent = s.bpffs, true
				link, err := dispatcher.Adopt(t.Context(), s.target, o)
				if err == nil {
					err = link.Close()
				}
				return err
			}, func(step string) {
				if n := s.Passed(t, port, 10); n > 0 {
					passed[step] = n
				}
			})
			qt.Assert(t, qt.IsNil(err))
			want := map[string]int{}
			if !noGap {
				want["adopt: in the gap"] = 10
			}
			qt.Check(t, qt.DeepEquals(passed, want))
			qt.Assert(t, qt.IsTrue(s.drops(t)))
			s.clear(t)
		})
	}
}

// All work is done before the gap or after it: what is in it are the two system calls, and how long they take is in
// the log.
func TestAdoptGapIsShort(t *testing.T) {
	s := newScene(t)
	s.clearAtEnd(t)
	var steps []string
	var times []time.Time
	kernel.OnStep = func(step string) { steps, times = append(steps, step), append(times, time.Now()) }
	defer func() { kernel.OnStep = nil }()
	s.attachLegacy(t, testenv.DropUDPPort(t, "ldt_old", port))
	s.adopt(t, dispatcher.AdoptOptions{})
	qt.Assert(t, qt.DeepEquals(steps, []string{"adopt: before the gap", "adopt: in the gap", "adopt: attached"}))
	t.Logf("took the program off in %v, put the chain on in %v", times[1].Sub(times[0]), times[2].Sub(times[1]))
}

// Until somebody protects it, a chain without a link is a chain like any other to those who use the library.
func TestUnprotectedChain(t *testing.T) {
	s := newScene(t)
	s.clearAtEnd(t)
	s.attachLegacy(t, s.tracer(t, 1, testenv.XDPPass))
	first := s.adopt(t, dispatcher.AdoptOptions{NoGap: true})
	id := s.read(t)
	qt.Check(t, qt.Equals(id.LinkID, 0))

	second := s.attach(t, s.tracer(t, 2, testenv.XDPPass), dispatcher.Options{Name: "second", Persistent: true})
	third := s.attach(t, s.tracer(t, 3, testenv.XDPPass), dispatcher.Options{Name: "third"})
	s.wantRun(t, 1, 2, 3)
	s.wantChain(t, "ldt_trace_1 second* third")
	qt.Check(t, qt.Equals(s.read(t).LinkID, 0))

	qt.Assert(t, qt.IsNil(first.Update(t.Context(), dispatcher.Program(s.tracer(t, 4, testenv.XDPPass)))))
	s.wantRun(t, 4, 2, 3)
	qt.Assert(t, qt.IsNil(third.Set(t.Context(), priority(1))))
	s.wantRun(t, 3, 4, 2)
	qt.Assert(t, qt.IsNil(third.Pin(t.Context())))
	s.wantChain(t, "third* ldt_trace_1 second*")
	qt.Assert(t, qt.IsNil(third.Unpin(t.Context())))
	s.wantChain(t, "third ldt_trace_1 second*")

	// Persistent members stay, the others leave with their owner.
	qt.Assert(t, qt.IsNil(second.Close()))
	qt.Assert(t, qt.IsNil(third.Close()))
	s.wantRunSoon(t, 4, 2)
	again := s.open(t, "second")
	qt.Assert(t, qt.IsNil(again.Update(t.Context(), dispatcher.Program(s.tracer(t, 5, testenv.XDPPass)))))
	s.wantRun(t, 4, 5)
	s.detach(t, "second")
	s.wantRun(t, 4)

	// With the last member the device is free, though no link goes.
	qt.Assert(t, qt.IsNil(first.Detach(t.Context())))
	s.wantFree(t)
}

// When its owners are gone, what is left of a chain without a link lets packets pass, and whoever comes next begins anew.
func TestUnprotectedChainLeftBehind(t *testing.T) {
	s := newScene(t)
	s.clearAtEnd(t)
	s.attachLegacy(t, testenv.DropUDPPort(t, "ldt_old", port))
	link := s.adopt(t, dispatcher.AdoptOptions{NoGap: true})
	qt.Assert(t, qt.IsNil(link.Close()))
	soon(t, func() bool { return s.Passed(t, port, 10) == 10 })
	s.wantChain(t, "ldt_old(empty)")

	_, err := dispatcher.Open(t.Context(), s.target, "ldt_old", s.look())
	qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
	s.attach(t, s.tracer(t, 1, testenv.XDPPass), dispatcher.Options{})
	s.wantChain(t, "ldt_trace_1")
	s.wantRun(t, 1)
	s.clear(t)
	s.wantFree(t)
}

// Protecting a chain later must lose no member, no pin and no handle.
func TestProtect(t *testing.T) {
	eachMode(t, func(t *testing.T, s *scene, mode hook.Mode) {
		s.clearAtEnd(t)
		s.occupy(t, s.tracer(t, 1, testenv.XDPPass), hook.KindLegacy, mode)
		first := s.adopt(t, dispatcher.AdoptOptions{NoGap: true})
		second := s.attach(t, s.tracer(t, 2, testenv.XDPPass), dispatcher.Options{Name: "second", Persistent: true, Settings: priority(60)})
		third := s.attach(t, s.tracer(t, 3, testenv.XDPPass), dispatcher.Options{Name: "third", Settings: priority(70)})
		before := s.read(t)
		qt.Assert(t, qt.HasLen(before.Pins, 1)) // the member; there is no root to pin

		protected := s.adopt(t, dispatcher.AdoptOptions{})
		m, err := protected.Info(t.Context())
		qt.Assert(t, qt.IsNil(err))
		qt.Check(t, qt.Equals(m.Name, "ldt_trace_1"))
		after := s.read(t)
		qt.Check(t, qt.IsTrue(after.Protected()))
		qt.Check(t, qt.Equals(after.Mode, mode))
		qt.Check(t, qt.DeepEquals(after.Members, before.Members))
		folder := fmt.Sprintf("%s/libdispatcher/xdp_%d", s.bpffs, after.LinkID)
		qt.Check(t, qt.DeepEquals(after.Pins, []string{folder + "/member_second/slot", folder + "/root"}))
		qt.Check(t, qt.DeepEquals(s.pins(t), []string{filepath.Base(folder)}))
		s.wantRun(t, 1, 2, 3)
		qt.Check(t, qt.ErrorIs(s.setXDP(t, -1, legacyFlags[mode], 0), unix.EBUSY))

		// Those who joined before it was protected go on working, and their members stay.
		qt.Check(t, qt.IsNil(third.Set(t.Context(), priority(1))))
		s.wantRun(t, 3, 1, 2)
		qt.Check(t, qt.IsNil(third.Pin(t.Context())))
		qt.Check(t, qt.IsNil(third.Unpin(t.Context())))
		qt.Assert(t, qt.IsNil(protected.Close()))
		s.wantRun(t, 3, 1, 2)
		qt.Check(t, qt.IsTrue(s.read(t).Protected()))
		qt.Assert(t, qt.IsNil(first.Detach(t.Context())))
		s.wantRun(t, 3, 2)
		qt.Assert(t, qt.IsNil(second.Unpin(t.Context())))
		s.wantRun(t, 3, 2)
		qt.Assert(t, qt.IsNil(second.Close()))
		s.wantRunSoon(t, 3)
		qt.Assert(t, qt.IsNil(third.Close()))
		s.wantFree(t)
	})
}

// A link that nobody would hold must not take the device: the chain would go
// with it, and all members whose owners are idle.
func TestProtectForNobody(t *testing.T) {
	s := newScene(t)
	s.attachLegacy(t, testenv.DropUDPPort(t, "ldt_old", port))
	link := s.adopt(t, dispatcher.AdoptOptions{NoGap: true})
	persistent := dispatcher.AdoptOptions{Options: dispatcher.Options{Persistent: true, BPFFS: s.bpffs}}
	_, err := dispatcher.Adopt(t.Context(), s.target, persistent)
	qt.Assert(t, qt.ErrorIs(err, dispatcher.ErrUsage))
	qt.Check(t, qt.ErrorMatches(err, ".*nothing would hold the link.*--hold.*"))
	qt.Check(t, qt.IsTrue(s.drops(t)))
	qt.Check(t, qt.IsFalse(s.read(t).Protected()))

	qt.Assert(t, qt.IsNil(link.Pin(t.Context())))
	protected, err := dispatcher.Adopt(t.Context(), s.target, persistent)
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.IsNil(protected.Close()))
	qt.Assert(t, qt.IsNil(link.Close()))
	qt.Check(t, qt.IsTrue(s.drops(t)))
	qt.Check(t, qt.IsTrue(s.read(t).Protected()))
	s.clear(t)
	s.wantFree(t)
}

// Who has detached its member keeps nothing on the device, though its Link is still open.
func TestDetachedLinkHoldsNothing(t *testing.T) {
	s := newScene(t)
	gone := s.attach(t, s.tracer(t, 1, testenv.XDPPass), dispatcher.Options{})
	last := s.attach(t, s.tracer(t, 2, testenv.XDPPass), dispatcher.Options{})
	qt.Assert(t, qt.IsNil(gone.Detach(t.Context())))
	qt.Assert(t, qt.IsNil(last.Close()))
	s.wantFree(t)
	qt.Check(t, qt.IsNil(gone.Detach(t.Context()))) // gone already
	_, err := gone.Info(t.Context())
	qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
	_, err = gone.Program()
	qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
	qt.Check(t, qt.ErrorIs(gone.Set(t.Context(), priority(1)), fs.ErrNotExist))
}

// Adopting is for what has no link. All else is refused, with a word on what is there.
func TestAdoptRefused(t *testing.T) {
	s := newScene(t)
	adopt := func(noGap bool) error {
		o := dispatcher.AdoptOptions{NoGap: noGap}
		o.BPFFS = s.bpffs
		link, err := dispatcher.Adopt(t.Context(), s.target, o)
		if err == nil {
			link.Close()
		}
		return err
	}
	for name, noGap := range noGap {
		t.Run(name, func(t *testing.T) {
			err := adopt(noGap)
			qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
			qt.Check(t, qt.ErrorMatches(err, `adopt xdp veth1: .*nothing is attached.*`))

			link := s.attach(t, testenv.DropUDPPort(t, "ldt_drop", port), dispatcher.Options{})
			err = adopt(noGap)
			qt.Check(t, qt.ErrorIs(err, fs.ErrExist))
			qt.Check(t, qt.ErrorMatches(err, `adopt xdp veth1: a chain of libdispatcher is there.*; attach adds members to it`))
			qt.Assert(t, qt.IsTrue(s.drops(t)))
			qt.Assert(t, qt.IsNil(link.Close()))

			t.Run("foreign", func(t *testing.T) {
				id := s.occupy(t, testenv.DropUDPPort(t, "ldt_foreign", port), hook.KindForeign, hook.ModeNative)
				err := adopt(noGap)
				qt.Check(t, qt.ErrorIs(err, dispatcher.ErrBusy))
				qt.Check(t, qt.ErrorMatches(err, fmt.Sprintf(`adopt xdp veth1: held by link %d \(program ldt_foreign, .*`, id)))
				qt.Assert(t, qt.IsTrue(s.drops(t)))
			})
		})
	}

	s.clearAtEnd(t)
	s.attachLegacy(t, testenv.DropUDPPort(t, "ldt_old", port))
	for _, bad := range []dispatcher.Options{
		{Name: strings.Repeat("x", 64)}, {Name: "a b"}, {Owner: "-x"}, {Settings: priority(-1)},
	} {
		_, err := dispatcher.Adopt(t.Context(), s.target, dispatcher.AdoptOptions{Options: bad})
		qt.Check(t, qt.ErrorIs(err, dispatcher.ErrUsage))
	}
	qt.Check(t, qt.Equals(s.read(t).Members[0].Kind, hook.KindLegacy))
	s.adopt(t, dispatcher.AdoptOptions{NoGap: true})
	qt.Check(t, qt.ErrorIs(adopt(true), fs.ErrExist)) // it is one already
	qt.Assert(t, qt.IsTrue(s.drops(t)))
}

// A program that another loader loaded in another way still becomes a chain, of its own kind.
func TestAdoptOtherKinds(t *testing.T) {
	for _, test := range []struct {
		name  string
		opts  []testenv.ProgramOption
		frags bool
	}{
		{"attach type 0", []testenv.ProgramOption{testenv.ExpectedAttachType(ebpf.AttachNone)}, false},
		{"frags", []testenv.ProgramOption{testenv.Frags()}, true},
		{"both", []testenv.ProgramOption{testenv.ExpectedAttachType(ebpf.AttachNone), testenv.Frags()}, true},
	} {
		for way, noGap := range noGap {
			t.Run(test.name+" "+way, func(t *testing.T) {
				if test.frags {
					testenv.Need(t, testenv.FeatureFrags)
				}
				s := newScene(t)
				s.clearAtEnd(t)
				s.attachLegacy(t, testenv.DropUDPPort(t, "ldt_old", port, test.opts...))
				s.adopt(t, dispatcher.AdoptOptions{NoGap: noGap})
				qt.Check(t, qt.Equals(s.read(t).Frags, test.frags))
				same := s.attach(t, testenv.DropUDPPort(t, "ldt_same", port+1, test.opts...), dispatcher.Options{})
				qt.Check(t, qt.Equals(s.Passed(t, port, 10), 0))
				qt.Check(t, qt.Equals(s.Passed(t, port+1, 10), 0))
				qt.Check(t, qt.Equals(s.Passed(t, port+2, 10), 10))
				qt.Assert(t, qt.IsNil(same.Close()))
			})
		}
	}
}

// A persistent member that was adopted outlives the process that adopted it.
func TestAdoptPersistent(t *testing.T) {
	for name, noGap := range noGap {
		t.Run(name, func(t *testing.T) {
			s := newScene(t)
			s.clearAtEnd(t)
			s.attachLegacy(t, testenv.DropUDPPort(t, "ldt_old", port))
			o := dispatcher.AdoptOptions{NoGap: noGap}
			o.Persistent = true
			qt.Assert(t, qt.IsNil(s.adopt(t, o).Close()))
			s.wantChain(t, "ldt_old*")
			qt.Assert(t, qt.IsTrue(s.drops(t)))
			s.attach(t, s.tracer(t, 1, testenv.XDPPass), dispatcher.Options{Settings: priority(1)}) // and a sweep
			qt.Assert(t, qt.IsTrue(s.drops(t)))
			s.clear(t)
			s.wantFree(t)
		})
	}
}

// A failed adoption leaves the old program where it was.
func TestAdoptUndone(t *testing.T) {
	for name, noGap := range noGap {
		t.Run(name, func(t *testing.T) {
			s := newScene(t)
			s.clearAtEnd(t)
			drop := testenv.DropUDPPort(t, "ldt_old", port)
			s.attachLegacy(t, drop)
			before := s.read(t)

			// Pinning is the last step, and fails.
			err := atEachStep(func() error {
				o := dispatcher.AdoptOptions{NoGap: noGap}
				o.BPFFS, o.Persistent = s.bpffs, true
				_, err := dispatcher.Adopt(t.Context(), s.target, o)
				return err
			}, func(step string) {
				if step == "adopt: attached" {
					qt.Assert(t, qt.IsNil(unix.Mount("", s.bpffs, "", unix.MS_REMOUNT|unix.MS_RDONLY, "")))
				}
			})
			qt.Assert(t, qt.IsNil(unix.Mount("", s.bpffs, "", unix.MS_REMOUNT, "")))
			qt.Check(t, qt.ErrorIs(err, unix.EROFS))
			qt.Check(t, qt.DeepEquals(s.read(t), before))
			qt.Assert(t, qt.IsTrue(s.drops(t)))
			s.wantNoPins(t)
		})
	}
}

// Without a link anyone may replace the chain. Handles then say so, pins go with the next change, and to newcomers the
// other program is an occupant like any other.
func TestUnprotectedChainReplaced(t *testing.T) {
	s := newScene(t)
	s.clearAtEnd(t)
	s.attachLegacy(t, s.tracer(t, 1, testenv.XDPPass))
	first := s.adopt(t, dispatcher.AdoptOptions{NoGap: true})
	second := s.attach(t, s.tracer(t, 2, testenv.XDPPass), dispatcher.Options{Name: "second", Persistent: true})
	drop := testenv.DropUDPPort(t, "ldt_intruder", port)
	qt.Assert(t, qt.IsNil(s.setXDP(t, drop.FD(), 0, 0)))

	for name, operation := range map[string]func() error{
		"info":   func() error { _, err := first.Info(t.Context()); return err },
		"chain":  func() error { _, err := second.Chain(t.Context()); return err },
		"set":    func() error { return first.Set(t.Context(), priority(1)) },
		"update": func() error { return first.Update(t.Context(), dispatcher.Program(s.tracer(t, 3, testenv.XDPPass))) },
		"pin":    func() error { return first.Pin(t.Context()) },
		"unpin":  func() error { return second.Unpin(t.Context()) },
	} {
		err := operation()
		qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist), qt.Commentf("%s", name))
		qt.Check(t, qt.ErrorMatches(err, `.* xdp veth1: the chain.*: another program was put in its place`), qt.Commentf("%s", name))
	}
	_, err := dispatcher.Attach(t.Context(), s.target, dispatcher.Program(s.tracer(t, 4, testenv.XDPPass)), dispatcher.Options{BPFFS: s.bpffs})
	qt.Check(t, qt.ErrorIs(err, dispatcher.ErrBusy))
	qt.Check(t, qt.ErrorMatches(err, `.*held by a program without a link \(program ldt_intruder, .*`))
	qt.Assert(t, qt.IsTrue(s.drops(t)))
	qt.Check(t, qt.IsNil(first.Detach(t.Context()))) // gone already

	// When the intruder goes, too, nothing of the old chain is in the way.
	s.free(t)
	_, err = second.Info(t.Context())
	qt.Check(t, qt.ErrorIs(err, dispatcher.ErrDefunct))
	qt.Assert(t, qt.IsNil(first.Close()))
	qt.Assert(t, qt.IsNil(second.Close()))
	soon(t, func() bool {
		l := s.attach(t, s.tracer(t, 5, testenv.XDPPass), dispatcher.Options{})
		s.wantRun(t, 5)
		qt.Assert(t, qt.IsNil(l.Detach(t.Context())))
		qt.Assert(t, qt.IsNil(l.Close()))
		entries, err := os.ReadDir(s.bpffs + "/libdispatcher")
		return err == nil && len(entries) == 0
	})
	s.wantFree(t)
}
