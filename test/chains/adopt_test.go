package chains

import (
	"fmt"
	"io/fs"
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
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

var noGap = map[string]bool{"with a gap": false, "without a gap": true}

// The program that has run for months goes on, with all that its maps have learnt; it only gets company.
func TestAdopt(t *testing.T) {
	for name, noGap := range noGap {
		t.Run(name, func(t *testing.T) {
			scene.EachMode(t, func(t *testing.T, s *scene.Scene, mode hook.Mode) {
				s.ClearAtEnd(t)
				prog, counted := testenv.CountProgram(t, "ldt_old", scene.Port, testenv.XDPPass)
				s.Occupy(t, prog, hook.KindLegacy, mode)
				s.Send(t, scene.Port, 10)

				old := s.Adopt(t, dispatcher.AdoptOptions{
					Priority: 30, ContinueOn: hook.SetOf(hook.Pass, hook.Drop), OnMissing: hook.MissingDrop, Owner: "old-app", NoGap: noGap,
				})

				m, err := old.Info(t.Context())
				qt.Assert(t, qt.IsNil(err))
				want := hook.Member{
					Name: "ldt_old", Owner: "old-app",
					Settings: hook.Settings{Priority: 30, ContinueOn: hook.SetOf(hook.Pass, hook.Drop), OnMissing: hook.MissingDrop},
					Kind:     hook.KindMember, State: hook.StateRunning,
					Program: scene.ProgramOf(t, prog), SlotID: m.SlotID,
				}
				want.Program.LoadedAt = m.Program.LoadedAt
				qt.Check(t, qt.DeepEquals(*m, want))

				c := s.Read(t)
				qt.Check(t, qt.Equals(c.Mode, mode))
				qt.Check(t, qt.Equals(c.Protected(), !noGap))
				qt.Check(t, qt.IsTrue(c.Ours()))

				s.Attach(t, s.Tracer(t, 1, testenv.XDPPass), dispatcher.Options{Priority: 1})
				s.Attach(t, s.Tracer(t, 2, testenv.XDPPass), dispatcher.Options{})
				s.WantChain(t, "ldt_trace_1 ldt_old ldt_trace_2")
				s.WantRun(t, 1, 2)
				qt.Check(t, qt.Equals(counted(), 11))

				intruder := testenv.VerdictProgram(t, "ldt_intruder", testenv.XDPPass)
				if err := s.SetXDP(t, intruder.FD(), scene.LegacyFlags[mode], 0); noGap {
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
	s := scene.New(t)
	s.ClearAtEnd(t)
	drop := testenv.DropUDPPort(t, "ldt_old", scene.Port)
	s.AttachLegacy(t, drop)
	flood := s.Flood(t, scene.Port, scene.Port+1)
	for range 50 {
		scene.Flow(t, flood)
		link := s.Adopt(t, dispatcher.AdoptOptions{NoGap: true})
		// Netlink exchanges programs without a gap, so the old one can come back for the next round.
		qt.Assert(t, qt.IsNil(s.SetXDP(t, drop.FD(), unix.XDP_FLAGS_DRV_MODE, 0)))
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
			s := scene.New(t)
			s.ClearAtEnd(t)
			s.AttachLegacy(t, testenv.DropUDPPort(t, "ldt_old", scene.Port))
			passed := map[string]int{}
			err := scene.AtEachStep(func() error {
				o := dispatcher.AdoptOptions{NoGap: noGap}
				o.BPFFS, o.Persistent = s.BPFFS, true
				link, err := dispatcher.Adopt(t.Context(), s.Target, o)
				if err == nil {
					err = link.Close()
				}
				return err
			}, func(step string) {
				if n := s.Passed(t, scene.Port, 10); n > 0 {
					passed[step] = n
				}
			})
			qt.Assert(t, qt.IsNil(err))
			want := map[string]int{}
			if !noGap {
				want["adopt: in the gap"] = 10
			}
			qt.Check(t, qt.DeepEquals(passed, want))
			qt.Assert(t, qt.IsTrue(s.Drops(t)))
			s.Clear(t)
		})
	}
}

// All work is done before the gap or after it: what is in it are the two system calls, and how long they take is in
// the log.
func TestAdoptGapIsShort(t *testing.T) {
	s := scene.New(t)
	s.ClearAtEnd(t)
	var steps []string
	var times []time.Time
	kernel.OnStep = func(step string) { steps, times = append(steps, step), append(times, time.Now()) }
	defer func() { kernel.OnStep = nil }()
	s.AttachLegacy(t, testenv.DropUDPPort(t, "ldt_old", scene.Port))
	s.Adopt(t, dispatcher.AdoptOptions{})
	qt.Assert(t, qt.DeepEquals(steps, []string{"adopt: before the gap", "adopt: in the gap", "adopt: attached"}))
	t.Logf("took the program off in %v, put the chain on in %v", times[1].Sub(times[0]), times[2].Sub(times[1]))
}

// A detached member keeps nothing on the device, though its Link is still open.
func TestDetachedLinkHoldsNothing(t *testing.T) {
	s := scene.New(t)
	gone := s.Attach(t, s.Tracer(t, 1, testenv.XDPPass), dispatcher.Options{})
	last := s.Attach(t, s.Tracer(t, 2, testenv.XDPPass), dispatcher.Options{})
	qt.Assert(t, qt.IsNil(gone.Detach(t.Context())))
	qt.Assert(t, qt.IsNil(last.Close()))
	s.WantFree(t)
	qt.Check(t, qt.IsNil(gone.Detach(t.Context()))) // gone already
	_, err := gone.Info(t.Context())
	qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
	_, err = gone.Program(t.Context())
	qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
	qt.Check(t, qt.ErrorIs(gone.Set(t.Context(), scene.Priority(1)), fs.ErrNotExist))
}

// Adopting is for what has no link. All else is refused, with a word on what is there.
func TestAdoptRefused(t *testing.T) {
	s := scene.New(t)
	adopt := func(noGap bool) error {
		o := dispatcher.AdoptOptions{NoGap: noGap}
		o.BPFFS = s.BPFFS
		link, err := dispatcher.Adopt(t.Context(), s.Target, o)
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

			link := s.Attach(t, testenv.DropUDPPort(t, "ldt_drop", scene.Port), dispatcher.Options{})
			err = adopt(noGap)
			qt.Check(t, qt.ErrorIs(err, fs.ErrExist))
			qt.Check(t, qt.ErrorMatches(err, `adopt xdp veth1: a chain of libdispatcher is there.*; attach adds members to it`))
			qt.Assert(t, qt.IsTrue(s.Drops(t)))
			qt.Assert(t, qt.IsNil(link.Close()))

			t.Run("foreign", func(t *testing.T) {
				id := s.Occupy(t, testenv.DropUDPPort(t, "ldt_foreign", scene.Port), hook.KindForeign, hook.ModeNative)
				err := adopt(noGap)
				qt.Check(t, qt.ErrorIs(err, dispatcher.ErrBusy))
				qt.Check(t, qt.ErrorMatches(err, fmt.Sprintf(`adopt xdp veth1: held by link %d \(program ldt_foreign, .*`, id)))
				qt.Assert(t, qt.IsTrue(s.Drops(t)))
			})
		})
	}

	s.ClearAtEnd(t)
	s.AttachLegacy(t, testenv.DropUDPPort(t, "ldt_old", scene.Port))
	for _, bad := range []dispatcher.AdoptOptions{
		{Name: strings.Repeat("x", 64)}, {Name: "a b"}, {Owner: "-x"}, {Priority: -1},
	} {
		_, err := dispatcher.Adopt(t.Context(), s.Target, bad)
		qt.Check(t, qt.ErrorIs(err, dispatcher.ErrUsage))
	}
	qt.Check(t, qt.Equals(s.Read(t).Members[0].Kind, hook.KindLegacy))
	s.Adopt(t, dispatcher.AdoptOptions{NoGap: true})
	qt.Check(t, qt.ErrorIs(adopt(true), fs.ErrExist)) // it is one already
	qt.Assert(t, qt.IsTrue(s.Drops(t)))
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
				s := scene.New(t)
				s.ClearAtEnd(t)
				s.AttachLegacy(t, testenv.DropUDPPort(t, "ldt_old", scene.Port, test.opts...))
				s.Adopt(t, dispatcher.AdoptOptions{NoGap: noGap})
				qt.Check(t, qt.Equals(s.Read(t).Frags, test.frags))
				same := s.Attach(t, testenv.DropUDPPort(t, "ldt_same", scene.Port+1, test.opts...), dispatcher.Options{})
				qt.Check(t, qt.Equals(s.Passed(t, scene.Port, 10), 0))
				qt.Check(t, qt.Equals(s.Passed(t, scene.Port+1, 10), 0))
				qt.Check(t, qt.Equals(s.Passed(t, scene.Port+2, 10), 10))
				qt.Assert(t, qt.IsNil(same.Close()))
			})
		}
	}
}

// A persistent member that was adopted outlives the process that adopted it.
func TestAdoptPersistent(t *testing.T) {
	for name, noGap := range noGap {
		t.Run(name, func(t *testing.T) {
			s := scene.New(t)
			s.ClearAtEnd(t)
			s.AttachLegacy(t, testenv.DropUDPPort(t, "ldt_old", scene.Port))
			o := dispatcher.AdoptOptions{NoGap: noGap}
			o.Persistent = true
			qt.Assert(t, qt.IsNil(s.Adopt(t, o).Close()))
			s.WantChain(t, "ldt_old*")
			qt.Assert(t, qt.IsTrue(s.Drops(t)))
			s.Attach(t, s.Tracer(t, 1, testenv.XDPPass), dispatcher.Options{Priority: 1}) // and a sweep
			qt.Assert(t, qt.IsTrue(s.Drops(t)))
			s.Clear(t)
			s.WantFree(t)
		})
	}
}

// A failed adoption leaves the old program where it was.
func TestAdoptUndone(t *testing.T) {
	for name, noGap := range noGap {
		t.Run(name, func(t *testing.T) {
			s := scene.New(t)
			s.ClearAtEnd(t)
			drop := testenv.DropUDPPort(t, "ldt_old", scene.Port)
			s.AttachLegacy(t, drop)
			before := s.Read(t)

			// Pinning is the last step, and fails.
			err := scene.AtEachStep(func() error {
				o := dispatcher.AdoptOptions{NoGap: noGap}
				o.BPFFS, o.Persistent = s.BPFFS, true
				_, err := dispatcher.Adopt(t.Context(), s.Target, o)
				return err
			}, func(step string) {
				if step == "adopt: attached" {
					qt.Assert(t, qt.IsNil(unix.Mount("", s.BPFFS, "", unix.MS_REMOUNT|unix.MS_RDONLY, "")))
				}
			})
			qt.Assert(t, qt.IsNil(unix.Mount("", s.BPFFS, "", unix.MS_REMOUNT, "")))
			qt.Check(t, qt.ErrorIs(err, unix.EROFS))
			qt.Check(t, qt.DeepEquals(s.Read(t), before))
			qt.Assert(t, qt.IsTrue(s.Drops(t)))
			s.WantNoPins(t)
		})
	}
}
