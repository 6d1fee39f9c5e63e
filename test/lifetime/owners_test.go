package lifetime

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// A program that goes on running after its owner closed it would go on
// dropping packets that nobody wants dropped.
func TestCloseEmptiesOnlyItsSlot(t *testing.T) {
	s := scene.New(t)
	s.Attach(t, s.Tracer(t, 1, scene.Pass), dispatcher.Options{Name: "first", Priority: 10})
	dropper := s.Attach(t, s.Tracer(t, 2, scene.Drop), dispatcher.Options{Name: "dropper", Priority: 20})
	s.Attach(t, s.Tracer(t, 3, scene.Pass), dispatcher.Options{Name: "last", Priority: 30})
	s.WantChain(t, "first dropper last")
	s.WantRun(t, 1, 2)
	qt.Assert(t, qt.IsTrue(s.Drops(t)))

	qt.Assert(t, qt.IsNil(dropper.Close()))
	s.WantRunSoon(t, 1, 3)
	qt.Assert(t, qt.IsFalse(s.Drops(t)))
	s.WantChain(t, "first dropper(empty) last")

	// The empty place goes with the next change of structure.
	s.Attach(t, s.Tracer(t, 4, scene.Pass), dispatcher.Options{Name: "new"})
	s.WantChain(t, "first last new")
	s.WantRun(t, 1, 3, 4)
}

// The device must be free for others once the last member has left.
func TestLastOwnerFreesTheDevice(t *testing.T) {
	s := scene.New(t)
	one := s.Attach(t, s.Tracer(t, 1, scene.Drop), dispatcher.Options{Name: "one"})
	two := s.Attach(t, s.Tracer(t, 2, scene.Pass), dispatcher.Options{Name: "two", Priority: 99})
	qt.Assert(t, qt.IsNil(one.Close()))
	s.WantRunSoon(t, 2)
	s.WantChain(t, "one(empty) two")
	qt.Assert(t, qt.IsNil(two.Close()))
	s.WantFree(t)
	qt.Assert(t, qt.IsFalse(s.Drops(t)))
}

// A filter that shall rather stop all traffic than let it pass unfiltered.
func TestClosedDoor(t *testing.T) {
	for _, missing := range []hook.OnMissing{hook.MissingDrop, hook.MissingAborted} {
		t.Run(missing.String(), func(t *testing.T) {
			s := scene.New(t)
			s.Attach(t, s.Tracer(t, 1, scene.Pass), dispatcher.Options{Name: "first", Priority: 10})
			door := hook.Settings{Priority: 20, OnMissing: missing}
			owner := s.AttachIn(t, s.Tracer(t, 2, scene.Pass), dispatcher.Options{Name: "door", Priority: door.Priority, ContinueOn: door.ContinueOn, OnMissing: door.OnMissing})
			s.Attach(t, s.Tracer(t, 3, scene.Pass), dispatcher.Options{Name: "last", Priority: 30})
			s.WantRun(t, 1, 2, 3)

			owner.Kill()
			s.WantRunSoon(t, 1)
			s.WantChain(t, "first door(empty) last")
			qt.Assert(t, qt.IsTrue(s.Drops(t)))

			// It stays closed while others come and go.
			other := s.Attach(t, s.Tracer(t, 4, scene.Pass), dispatcher.Options{Name: "other", Priority: 15})
			s.WantChain(t, "first other door(empty) last")
			s.WantRun(t, 1, 4)
			qt.Assert(t, qt.IsNil(other.Close()))
			s.WantRunSoon(t, 1)

			// Its owner comes back, under its name.
			s.Attach(t, s.Tracer(t, 5, scene.Pass), dispatcher.Options{Name: "door", Priority: door.Priority, ContinueOn: door.ContinueOn, OnMissing: door.OnMissing})
			s.WantChain(t, "first door last")
			s.WantRun(t, 1, 5, 3)
		})
	}
}

// A closed door must be opened without a reboot, even if its owner never comes back.
func TestDetachClosedDoor(t *testing.T) {
	s := scene.New(t)
	s.Attach(t, s.Tracer(t, 1, scene.Pass), dispatcher.Options{Name: "first"})
	door := s.Attach(t, s.Tracer(t, 2, scene.Pass), dispatcher.Options{Name: "door", OnMissing: hook.MissingDrop})
	qt.Assert(t, qt.IsNil(door.Close()))
	s.WantRunSoon(t, 1)
	qt.Assert(t, qt.IsTrue(s.Drops(t)))

	_, err := dispatcher.Open(t.Context(), s.Target, "door", s.Look())
	qt.Assert(t, qt.ErrorIs(err, fs.ErrNotExist))
	s.Detach(t, "door")
	s.WantChain(t, "first")
	qt.Assert(t, qt.IsFalse(s.Drops(t)))
}

// An owner that crashes takes its own member along and nothing else.
func TestKilledOwner(t *testing.T) {
	s := scene.New(t)
	s.AttachIn(t, s.Tracer(t, 1, scene.Pass), dispatcher.Options{Name: "one"})
	victim := s.AttachIn(t, s.Tracer(t, 2, scene.Pass), dispatcher.Options{Name: "victim"})
	last := s.AttachIn(t, s.Tracer(t, 3, scene.Pass), dispatcher.Options{Name: "three"})
	s.Attach(t, s.Tracer(t, 4, scene.Pass), dispatcher.Options{Name: "four", Persistent: true})
	s.WantRun(t, 1, 2, 3, 4)

	victim.Kill()
	s.WantRunSoon(t, 1, 3, 4)
	s.WantChain(t, "one victim(empty) three four*")
	last.Kill()
	s.WantRunSoon(t, 1, 4)
	s.WantChain(t, "one victim(empty) three(empty) four*")
	s.Clear(t)
	s.WantFree(t)
}

// A restart without a gap: the new process opens the member before the old one ends.
func TestCoOwners(t *testing.T) {
	s := scene.New(t)
	old := s.AttachIn(t, s.Tracer(t, 1, scene.Drop), dispatcher.Options{Name: "one"})
	s.Attach(t, s.Tracer(t, 2, scene.Pass), dispatcher.Options{Name: "two"})
	heir := s.Open(t, "one")
	old.Kill()
	s.WantRun(t, 1)
	s.WantChain(t, "one two")

	qt.Assert(t, qt.IsNil(heir.Update(t.Context(), dispatcher.Program(s.Tracer(t, 3, scene.Pass)))))
	s.WantRun(t, 3, 2)
	qt.Assert(t, qt.IsNil(heir.Close()))
	s.WantRunSoon(t, 2)
	s.WantChain(t, "one(empty) two")
}

// An owner must learn that its program is not in the way of packets any more.
func TestDetachedByAnother(t *testing.T) {
	for name, companions := range map[string]int{"one of several": 1, "the last": 0} {
		t.Run(name, func(t *testing.T) {
			s := scene.New(t)
			link := s.Attach(t, s.Tracer(t, 1, scene.Drop), dispatcher.Options{Name: "one"})
			for range companions {
				s.Attach(t, s.Tracer(t, 2, scene.Pass), dispatcher.Options{Name: "two"})
			}
			qt.Assert(t, qt.IsNil(scene.NewApp(t).Do(t, s.Command(scene.Command{Op: "detach", Member: "one"}))))
			qt.Assert(t, qt.IsFalse(s.Drops(t)))
			wantGone(t, s, link, fs.ErrNotExist)
			s.Clear(t)
			s.WantFree(t)
		})
	}
}

// wantGone checks what the methods of a link to a member say that is no more.
func wantGone(t *testing.T, s *scene.Scene, link *dispatcher.Link, cause error) {
	t.Helper()
	ctx := t.Context()
	qt.Check(t, qt.ErrorIs(link.Update(ctx, dispatcher.Program(s.Tracer(t, 9, scene.Pass))), cause))
	qt.Check(t, qt.ErrorIs(link.Set(ctx, scene.Priority(7)), cause))
	qt.Check(t, qt.ErrorIs(scene.Second(link.Pin(ctx)), cause))
	qt.Check(t, qt.ErrorIs(link.Unpin(ctx), cause))
	_, err := link.Info(ctx)
	qt.Check(t, qt.ErrorIs(err, cause))
	qt.Check(t, qt.IsNil(link.Detach(ctx)))
	qt.Check(t, qt.IsNil(link.Close()))
	s.WantNoPins(t)
}

func TestClosedLink(t *testing.T) {
	s := scene.New(t)
	link := s.Attach(t, s.Tracer(t, 1, scene.Pass), dispatcher.Options{Name: "one"})
	qt.Assert(t, qt.IsNil(link.Close()))
	qt.Assert(t, qt.IsNil(link.Close()))

	ctx := t.Context()
	qt.Check(t, qt.ErrorIs(link.Update(ctx, dispatcher.Program(s.Tracer(t, 2, scene.Pass))), fs.ErrClosed))
	qt.Check(t, qt.ErrorIs(link.Set(ctx, scene.Priority(7)), fs.ErrClosed))
	qt.Check(t, qt.ErrorIs(scene.Second(link.Pin(ctx)), fs.ErrClosed))
	qt.Check(t, qt.ErrorIs(link.Unpin(ctx), fs.ErrClosed))
	qt.Check(t, qt.ErrorIs(link.Detach(ctx), fs.ErrClosed))
	_, err := link.Info(ctx)
	qt.Check(t, qt.ErrorIs(err, fs.ErrClosed))
	_, err = link.Chain(ctx)
	qt.Check(t, qt.ErrorIs(err, fs.ErrClosed))
	_, err = link.Program(t.Context())
	qt.Check(t, qt.ErrorIs(err, fs.ErrClosed))
}

// The lock is a courtesy: a process that is stopped while it has it must not
// stop all others for good.
func TestStoppedWithTheLock(t *testing.T) {
	s := scene.New(t)
	s.Attach(t, s.Tracer(t, 1, scene.Pass), dispatcher.Options{Name: "one"})
	folder, err := os.Open(filepath.Join(s.BPFFS, "libdispatcher"))
	qt.Assert(t, qt.IsNil(err))
	defer folder.Close()
	qt.Assert(t, qt.IsNil(unix.Flock(int(folder.Fd()), unix.LOCK_EX)))

	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err = dispatcher.Attach(ctx, s.Target, dispatcher.Program(s.Tracer(t, 2, scene.Pass)), dispatcher.Options{Name: "two", BPFFS: s.BPFFS})
	qt.Assert(t, qt.ErrorIs(err, context.DeadlineExceeded))
	qt.Check(t, qt.StringContains(err.Error(), fmt.Sprintf("libdispatcher (pid %d ", os.Getpid())))
	s.WantChain(t, "one") // and to read needs no lock
	found, err := dispatcher.Doctor(t.Context(), s.Look())
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.IsTrue(slices.ContainsFunc(found, func(f hook.Finding) bool { return f.Check == "lock" && f.Level == hook.LevelDrift })))

	s.Attach(t, s.Tracer(t, 2, scene.Pass), dispatcher.Options{Name: "two", Persistent: true})
	s.WantRun(t, 1, 2)
	qt.Assert(t, qt.IsNil(folder.Close()))
	s.Clear(t)
	s.WantFree(t)
}

// A call that gives up must have changed nothing.
func TestCanceled(t *testing.T) {
	s := scene.New(t)
	link := s.Attach(t, s.Tracer(t, 1, scene.Pass), dispatcher.Options{Name: "one"})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	next := dispatcher.Program(s.Tracer(t, 2, scene.Pass))
	_, err := dispatcher.Attach(ctx, s.Target, next, dispatcher.Options{Name: "two", BPFFS: s.BPFFS})
	for what, err := range map[string]error{
		"attach":     err,
		"update":     link.Update(ctx, next),
		"set":        link.Set(ctx, scene.Priority(7)),
		"pin":        scene.Second(link.Pin(ctx)),
		"unpin":      link.Unpin(ctx),
		"detach":     dispatcher.Detach(ctx, s.Target, "one", s.Leave()),
		"detach all": dispatcher.DetachAll(ctx, s.Target, s.Leave()),
		"link":       link.Detach(ctx),
	} {
		qt.Check(t, qt.ErrorIs(err, context.Canceled), qt.Commentf("%s", what))
	}
	s.WantChain(t, "one")
	s.WantRun(t, 1)
	s.WantNoPins(t)
}

// Who has just gone counts no more: not for the room in a chain, and not for a name, even if it died before it pinned itself.
// Whoever looks at the chain keeps it a moment longer.
func TestGoneOwnersDoNotCount(t *testing.T) {
	s := scene.New(t)
	leave := func(name string) { // looks at the member, and lets it go in a while
		t.Helper()
		m, err := ebpf.NewMapFromID(ebpf.MapID(s.Read(t).Member(name).SlotID))
		qt.Assert(t, qt.IsNil(err))
		time.AfterFunc(30*time.Millisecond, func() { m.Close() })
	}
	prog := s.Tracer(t, 1, scene.Pass)
	died := s.Attach(t, prog, dispatcher.Options{Name: "kept", Persistent: true})
	leave("kept")
	pin, err := died.Pin(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.IsNil(os.RemoveAll(filepath.Dir(pin)))) // as one that died before it had its pin
	qt.Assert(t, qt.IsNil(died.Close()))
	kept, err := dispatcher.Attach(t.Context(), s.Target, dispatcher.Program(prog), dispatcher.Options{Name: "kept", Persistent: true, BPFFS: s.BPFFS})
	qt.Assert(t, qt.IsNil(err))
	defer kept.Close()

	var last *dispatcher.Link
	for i := range hook.MaxMembers - 1 {
		last = s.Attach(t, prog, dispatcher.Options{Name: fmt.Sprint("m", i)})
	}
	leave("m30")
	qt.Assert(t, qt.IsNil(last.Close()))
	s.Attach(t, prog, dispatcher.Options{Name: "next"})
	qt.Check(t, qt.HasLen(s.Read(t).Members, hook.MaxMembers))
	s.Clear(t)
}
