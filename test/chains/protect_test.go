package chains

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// Until it is protected, a chain without a link is a chain like any other for the library.
func TestUnprotectedChain(t *testing.T) {
	s := scene.New(t)
	s.ClearAtEnd(t)
	s.AttachLegacy(t, s.Tracer(t, 1, testenv.XDPPass))
	first := s.Adopt(t, dispatcher.AdoptOptions{NoGap: true})
	id := s.Read(t)
	qt.Check(t, qt.Equals(id.LinkID, 0))

	second := s.Attach(t, s.Tracer(t, 2, testenv.XDPPass), dispatcher.Options{Name: "second", Persistent: true})
	third := s.Attach(t, s.Tracer(t, 3, testenv.XDPPass), dispatcher.Options{Name: "third"})
	s.WantRun(t, 1, 2, 3)
	s.WantChain(t, "ldt_trace_1 second* third")
	qt.Check(t, qt.Equals(s.Read(t).LinkID, 0))

	qt.Assert(t, qt.IsNil(first.Update(t.Context(), dispatcher.Program(s.Tracer(t, 4, testenv.XDPPass)))))
	s.WantRun(t, 4, 2, 3)
	qt.Assert(t, qt.IsNil(third.Set(t.Context(), scene.Priority(1))))
	s.WantRun(t, 3, 4, 2)
	qt.Assert(t, qt.IsNil(scene.Second(third.Pin(t.Context()))))
	s.WantChain(t, "third* ldt_trace_1 second*")
	qt.Assert(t, qt.IsNil(third.Unpin(t.Context())))
	s.WantChain(t, "third ldt_trace_1 second*")

	// Persistent members stay, the others leave with their owner.
	qt.Assert(t, qt.IsNil(second.Close()))
	qt.Assert(t, qt.IsNil(third.Close()))
	s.WantRunSoon(t, 4, 2)
	again := s.Open(t, "second")
	qt.Assert(t, qt.IsNil(again.Update(t.Context(), dispatcher.Program(s.Tracer(t, 5, testenv.XDPPass)))))
	s.WantRun(t, 4, 5)
	s.Detach(t, "second")
	s.WantRun(t, 4)

	// With the last member the device is free, though no link goes.
	qt.Assert(t, qt.IsNil(first.Detach(t.Context())))
	s.WantFree(t)
}

// When its owners are gone, what is left of a chain without a link lets packets pass, and the next to attach begins anew.
func TestUnprotectedChainLeftBehind(t *testing.T) {
	s := scene.New(t)
	s.ClearAtEnd(t)
	s.AttachLegacy(t, testenv.DropUDPPort(t, "ldt_old", scene.Port))
	link := s.Adopt(t, dispatcher.AdoptOptions{NoGap: true})
	qt.Assert(t, qt.IsNil(link.Close()))
	scene.Soon(t, func() bool { return s.Passed(t, scene.Port, 10) == 10 })
	s.WantChain(t, "ldt_old(empty)")

	_, err := dispatcher.Open(t.Context(), s.Target, "ldt_old", s.Look())
	qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
	s.Attach(t, s.Tracer(t, 1, testenv.XDPPass), dispatcher.Options{})
	s.WantChain(t, "ldt_trace_1")
	s.WantRun(t, 1)
	s.Clear(t)
	s.WantFree(t)
}

// Protecting a chain later must lose no member, no pin and no handle.
func TestProtect(t *testing.T) {
	scene.EachMode(t, func(t *testing.T, s *scene.Scene, mode hook.Mode) {
		s.ClearAtEnd(t)
		s.Occupy(t, s.Tracer(t, 1, testenv.XDPPass), hook.KindLegacy, mode)
		first := s.Adopt(t, dispatcher.AdoptOptions{NoGap: true})
		second := s.Attach(t, s.Tracer(t, 2, testenv.XDPPass), dispatcher.Options{Name: "second", Persistent: true, Priority: 60})
		third := s.Attach(t, s.Tracer(t, 3, testenv.XDPPass), dispatcher.Options{Name: "third", Priority: 70})
		before := s.Read(t)
		qt.Assert(t, qt.HasLen(before.Pins, 1)) // the member; there is no root to pin

		protected := s.Adopt(t, dispatcher.AdoptOptions{})
		m, err := protected.Info(t.Context())
		qt.Assert(t, qt.IsNil(err))
		qt.Check(t, qt.Equals(m.Name, "ldt_trace_1"))
		after := s.Read(t)
		qt.Check(t, qt.IsTrue(after.Protected()))
		qt.Check(t, qt.Equals(after.Mode, mode))
		qt.Check(t, qt.DeepEquals(after.Members, before.Members))
		folder := fmt.Sprintf("%s/libdispatcher/xdp_%d", s.BPFFS, after.LinkID)
		qt.Check(t, qt.DeepEquals(after.Pins, []string{folder + "/member_second/slot", folder + "/root"}))
		qt.Check(t, qt.DeepEquals(s.Pins(t), []string{filepath.Base(folder)}))
		s.WantRun(t, 1, 2, 3)
		qt.Check(t, qt.ErrorIs(s.SetXDP(t, -1, scene.LegacyFlags[mode], 0), unix.EBUSY))

		// Processes that joined before it was protected go on working, and their members stay.
		qt.Check(t, qt.IsNil(third.Set(t.Context(), scene.Priority(1))))
		s.WantRun(t, 3, 1, 2)
		qt.Check(t, qt.IsNil(scene.Second(third.Pin(t.Context()))))
		qt.Check(t, qt.IsNil(third.Unpin(t.Context())))
		qt.Assert(t, qt.IsNil(protected.Close()))
		s.WantRun(t, 3, 1, 2)
		qt.Check(t, qt.IsTrue(s.Read(t).Protected()))
		qt.Assert(t, qt.IsNil(first.Detach(t.Context())))
		s.WantRun(t, 3, 2)
		qt.Assert(t, qt.IsNil(second.Unpin(t.Context())))
		s.WantRun(t, 3, 2)
		qt.Assert(t, qt.IsNil(second.Close()))
		s.WantRunSoon(t, 3)
		qt.Assert(t, qt.IsNil(third.Close()))
		s.WantFree(t)
	})
}

// A link that no process would hold must not take the device: the chain would go
// with it, and all its members.
func TestProtectForNobody(t *testing.T) {
	s := scene.New(t)
	s.AttachLegacy(t, testenv.DropUDPPort(t, "ldt_old", scene.Port))
	link := s.Adopt(t, dispatcher.AdoptOptions{NoGap: true})
	persistent := dispatcher.AdoptOptions{Persistent: true, BPFFS: s.BPFFS}
	_, err := dispatcher.Adopt(t.Context(), s.Target, persistent)
	qt.Assert(t, qt.ErrorIs(err, dispatcher.ErrUsage))
	qt.Check(t, qt.ErrorMatches(err, ".*nothing would hold the link.*--hold.*"))
	qt.Check(t, qt.IsTrue(s.Drops(t)))
	qt.Check(t, qt.IsFalse(s.Read(t).Protected()))

	qt.Assert(t, qt.IsNil(scene.Second(link.Pin(t.Context()))))
	protected, err := dispatcher.Adopt(t.Context(), s.Target, persistent)
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.IsNil(protected.Close()))
	qt.Assert(t, qt.IsNil(link.Close()))
	qt.Check(t, qt.IsTrue(s.Drops(t)))
	qt.Check(t, qt.IsTrue(s.Read(t).Protected()))
	s.Clear(t)
	s.WantFree(t)
}

// Without a link anyone may replace the chain. Handles then say so, pins go with the next change, and to newcomers the
// other program is an occupant like any other.
func TestUnprotectedChainReplaced(t *testing.T) {
	s := scene.New(t)
	s.ClearAtEnd(t)
	s.AttachLegacy(t, s.Tracer(t, 1, testenv.XDPPass))
	first := s.Adopt(t, dispatcher.AdoptOptions{NoGap: true})
	second := s.Attach(t, s.Tracer(t, 2, testenv.XDPPass), dispatcher.Options{Name: "second", Persistent: true})
	drop := testenv.DropUDPPort(t, "ldt_intruder", scene.Port)
	qt.Assert(t, qt.IsNil(s.SetXDP(t, drop.FD(), 0, 0)))

	for name, operation := range map[string]func() error{
		"info":   func() error { _, err := first.Info(t.Context()); return err },
		"chain":  func() error { _, err := second.Chain(t.Context()); return err },
		"set":    func() error { return first.Set(t.Context(), scene.Priority(1)) },
		"update": func() error { return first.Update(t.Context(), dispatcher.Program(s.Tracer(t, 3, testenv.XDPPass))) },
		"pin":    func() error { return scene.Second(first.Pin(t.Context())) },
		"unpin":  func() error { return second.Unpin(t.Context()) },
	} {
		err := operation()
		qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist), qt.Commentf("%s", name))
		qt.Check(t, qt.ErrorMatches(err, `.* xdp veth1: the chain.*: another program was put in its place`), qt.Commentf("%s", name))
	}
	_, err := dispatcher.Attach(t.Context(), s.Target, dispatcher.Program(s.Tracer(t, 4, testenv.XDPPass)), dispatcher.Options{BPFFS: s.BPFFS})
	qt.Check(t, qt.ErrorIs(err, dispatcher.ErrBusy))
	qt.Check(t, qt.ErrorMatches(err, `.*held by a program without a link \(program ldt_intruder, .*`))
	qt.Assert(t, qt.IsTrue(s.Drops(t)))
	qt.Check(t, qt.IsNil(first.Detach(t.Context()))) // gone already

	// When the intruder goes, too, nothing of the old chain is in the way.
	s.Free(t)
	_, err = second.Info(t.Context())
	qt.Check(t, qt.ErrorIs(err, dispatcher.ErrDefunct))
	qt.Assert(t, qt.IsNil(first.Close()))
	qt.Assert(t, qt.IsNil(second.Close()))
	scene.Soon(t, func() bool {
		l := s.Attach(t, s.Tracer(t, 5, testenv.XDPPass), dispatcher.Options{})
		s.WantRun(t, 5)
		qt.Assert(t, qt.IsNil(l.Detach(t.Context())))
		qt.Assert(t, qt.IsNil(l.Close()))
		entries, err := os.ReadDir(s.BPFFS + "/libdispatcher")
		return err == nil && len(entries) == 0
	})
	s.WantFree(t)
}

// A chain that could not be protected is as it was, and nothing of it stays open.
func TestProtectUndone(t *testing.T) {
	s := scene.New(t)
	s.ClearAtEnd(t)
	s.AttachLegacy(t, s.Tracer(t, 1, testenv.XDPPass))
	qt.Assert(t, qt.IsNil(s.Adopt(t, dispatcher.AdoptOptions{NoGap: true, Persistent: true}).Close()))
	before := s.Read(t)
	testenv.CheckFiles(t, func() {
		err := scene.AtEachStep(func() error {
			_, err := dispatcher.Adopt(t.Context(), s.Target, dispatcher.AdoptOptions{Persistent: true, BPFFS: s.BPFFS})
			return err
		}, func(step string) {
			if step == "adopt: in the gap" {
				qt.Assert(t, qt.IsNil(unix.Mount("", s.BPFFS, "", unix.MS_REMOUNT|unix.MS_RDONLY, "")))
			}
		})
		qt.Assert(t, qt.IsNil(unix.Mount("", s.BPFFS, "", unix.MS_REMOUNT, "")))
		qt.Check(t, qt.ErrorIs(err, unix.EROFS))
	})
	qt.Check(t, qt.DeepEquals(s.Read(t), before))
	s.WantRun(t, 1)
}
