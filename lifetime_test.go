package dispatcher_test

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

const (
	drop = testenv.XDPDrop
	pass = testenv.XDPPass
)

// A program that goes on running after its owner closed it would go on
// dropping packets that nobody wants dropped.
func TestCloseEmptiesOnlyItsSlot(t *testing.T) {
	s := newScene(t)
	s.attach(t, s.tracer(t, 1, pass), dispatcher.Options{Name: "first", Settings: priority(10)})
	dropper := s.attach(t, s.tracer(t, 2, drop), dispatcher.Options{Name: "dropper", Settings: priority(20)})
	s.attach(t, s.tracer(t, 3, pass), dispatcher.Options{Name: "last", Settings: priority(30)})
	s.wantChain(t, "first dropper last")
	s.wantRun(t, 1, 2)
	qt.Assert(t, qt.IsTrue(s.drops(t)))

	qt.Assert(t, qt.IsNil(dropper.Close()))
	s.wantRunSoon(t, 1, 3)
	qt.Assert(t, qt.IsFalse(s.drops(t)))
	s.wantChain(t, "first dropper(empty) last")

	// The empty place goes with the next change of structure.
	s.attach(t, s.tracer(t, 4, pass), dispatcher.Options{Name: "new"})
	s.wantChain(t, "first last new")
	s.wantRun(t, 1, 3, 4)
}

// The device must be free for others once nobody wants to be on it.
func TestLastOwnerFreesTheDevice(t *testing.T) {
	s := newScene(t)
	one := s.attach(t, s.tracer(t, 1, drop), dispatcher.Options{Name: "one"})
	two := s.attach(t, s.tracer(t, 2, pass), dispatcher.Options{Name: "two", Settings: priority(99)})
	qt.Assert(t, qt.IsNil(one.Close()))
	s.wantRunSoon(t, 2)
	s.wantChain(t, "one(empty) two")
	qt.Assert(t, qt.IsNil(two.Close()))
	s.wantFree(t)
	qt.Assert(t, qt.IsFalse(s.drops(t)))
}

// A filter that shall rather stop all traffic than let it pass unfiltered.
func TestClosedDoor(t *testing.T) {
	for _, missing := range []hook.OnMissing{hook.MissingDrop, hook.MissingAborted} {
		t.Run(missing.String(), func(t *testing.T) {
			s := newScene(t)
			s.attach(t, s.tracer(t, 1, pass), dispatcher.Options{Name: "first", Settings: priority(10)})
			door := hook.Settings{Priority: 20, OnMissing: missing}
			owner := s.attachIn(t, s.tracer(t, 2, pass), dispatcher.Options{Name: "door", Settings: door})
			s.attach(t, s.tracer(t, 3, pass), dispatcher.Options{Name: "last", Settings: priority(30)})
			s.wantRun(t, 1, 2, 3)

			owner.Kill()
			s.wantRunSoon(t, 1)
			s.wantChain(t, "first door(empty) last")
			qt.Assert(t, qt.IsTrue(s.drops(t)))

			// It stays closed while others come and go.
			other := s.attach(t, s.tracer(t, 4, pass), dispatcher.Options{Name: "other", Settings: priority(15)})
			s.wantChain(t, "first other door(empty) last")
			s.wantRun(t, 1, 4)
			qt.Assert(t, qt.IsNil(other.Close()))
			s.wantRunSoon(t, 1)

			// Its owner comes back, under its name.
			s.attach(t, s.tracer(t, 5, pass), dispatcher.Options{Name: "door", Settings: door})
			s.wantChain(t, "first door last")
			s.wantRun(t, 1, 5, 3)
		})
	}
}

// A closed door that nobody comes back to open must not need a reboot.
func TestDetachClosedDoor(t *testing.T) {
	s := newScene(t)
	s.attach(t, s.tracer(t, 1, pass), dispatcher.Options{Name: "first"})
	door := s.attach(t, s.tracer(t, 2, pass), dispatcher.Options{Name: "door", Settings: hook.Settings{OnMissing: hook.MissingDrop}})
	qt.Assert(t, qt.IsNil(door.Close()))
	s.wantRunSoon(t, 1)
	qt.Assert(t, qt.IsTrue(s.drops(t)))

	_, err := dispatcher.Open(t.Context(), s.target, "door", s.look())
	qt.Assert(t, qt.ErrorIs(err, fs.ErrNotExist))
	s.detach(t, "door")
	s.wantChain(t, "first")
	qt.Assert(t, qt.IsFalse(s.drops(t)))
}

// An owner that crashes takes its own member along and nothing else.
func TestKilledOwner(t *testing.T) {
	s := newScene(t)
	s.attachIn(t, s.tracer(t, 1, pass), dispatcher.Options{Name: "one"})
	victim := s.attachIn(t, s.tracer(t, 2, pass), dispatcher.Options{Name: "victim"})
	last := s.attachIn(t, s.tracer(t, 3, pass), dispatcher.Options{Name: "three"})
	s.attach(t, s.tracer(t, 4, pass), dispatcher.Options{Name: "four", Persistent: true})
	s.wantRun(t, 1, 2, 3, 4)

	victim.Kill()
	s.wantRunSoon(t, 1, 3, 4)
	s.wantChain(t, "one victim(empty) three four*")
	last.Kill()
	s.wantRunSoon(t, 1, 4)
	s.wantChain(t, "one victim(empty) three(empty) four*")
	s.clear(t)
	s.wantFree(t)
}

// What is pinned shall outlive the command that attached it.
func TestPersistent(t *testing.T) {
	s := newScene(t)
	owner := s.attachIn(t, s.tracer(t, 1, drop), dispatcher.Options{Name: "guard", Persistent: true})
	qt.Assert(t, qt.IsNil(owner.Stop()))
	s.wantChain(t, "guard*")
	qt.Assert(t, qt.IsTrue(s.drops(t)))

	// An administrator without any tool: rm.
	c := s.read(t)
	qt.Assert(t, qt.HasLen(c.Pins, 2), qt.Commentf("%q", c.Pins))
	pin := filepath.Join(s.bpffs, "libdispatcher", s.pins(t)[0], "member_guard", "slot")
	qt.Assert(t, qt.SliceContains(c.Pins, pin))
	qt.Assert(t, qt.IsNil(os.Remove(pin)))
	s.wantRunSoon(t)
	qt.Assert(t, qt.IsFalse(s.drops(t)))
	s.wantChain(t, "guard*(empty)")

	// The next change removes the rest.
	next := s.attach(t, s.tracer(t, 2, pass), dispatcher.Options{Name: "next"})
	s.wantChain(t, "next")
	s.wantRun(t, 2)
	qt.Assert(t, qt.IsNil(next.Set(t.Context(), priority(7))))
	s.wantNoPins(t)
	qt.Assert(t, qt.IsNil(next.Close()))
	s.wantFree(t)
}

// rm -r of the whole folder is what an administrator in need will do.
func TestRemovedFolder(t *testing.T) {
	s := newScene(t)
	s.attach(t, s.tracer(t, 1, drop), dispatcher.Options{Name: "one", Persistent: true}).Close()
	s.attach(t, s.tracer(t, 2, drop), dispatcher.Options{Name: "two", Persistent: true}).Close()
	s.wantChain(t, "one* two*")
	qt.Assert(t, qt.IsNil(os.RemoveAll(filepath.Join(s.bpffs, "libdispatcher"))))
	s.wantFree(t)
	qt.Assert(t, qt.IsFalse(s.drops(t)))
	s.attach(t, s.tracer(t, 3, pass), dispatcher.Options{Name: "one", Persistent: true})
	s.wantRun(t, 3)
	s.clear(t)
}

// A persistent member whose slot was unpinned by hand comes back under its
// name, whatever is left of its pins.
func TestAttachAgainAfterRemovedPin(t *testing.T) {
	s := newScene(t)
	attach := func() {
		link, err := dispatcher.Attach(t.Context(), s.target, dispatcher.Spec(countingSpec(), dispatcher.LoadOptions{}),
			dispatcher.Options{Name: "counter", Persistent: true, BPFFS: s.bpffs, Settings: hook.Settings{OnMissing: hook.MissingDrop}})
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.IsNil(link.Close()))
	}
	attach()
	qt.Assert(t, qt.IsNil(os.Remove(filepath.Join(s.bpffs, "libdispatcher", s.pins(t)[0], "member_counter", "slot"))))
	soon(t, func() bool { return s.Passed(t, port, 1) == 0 })
	s.wantChain(t, "counter*(empty)")
	attach()
	s.wantChain(t, "counter*")
	qt.Assert(t, qt.IsFalse(s.drops(t)))
	s.clear(t)
	s.wantFree(t)
}

// Somebody removed the root's pin only: a member that is pinned afterwards
// must outlive its process all the same.
func TestPinAfterRemovedRoot(t *testing.T) {
	s := newScene(t)
	one := s.attach(t, s.tracer(t, 1, pass), dispatcher.Options{Name: "one", Persistent: true})
	qt.Assert(t, qt.IsNil(os.Remove(filepath.Join(s.bpffs, "libdispatcher", s.pins(t)[0], "root"))))
	s.attach(t, s.tracer(t, 2, pass), dispatcher.Options{Name: "two", Persistent: true}).Close()
	s.wantRun(t, 1, 2)
	qt.Assert(t, qt.IsNil(one.Close()))
	s.wantChain(t, "one* two*")
	s.wantRun(t, 1, 2)
	s.clear(t)
	s.wantFree(t)

	// Pinning again repairs it for a member that has its own pin still.
	again := s.attach(t, s.tracer(t, 3, pass), dispatcher.Options{Name: "three", Persistent: true})
	root := filepath.Join(s.bpffs, "libdispatcher", s.pins(t)[0], "root")
	qt.Assert(t, qt.IsNil(os.Remove(root)))
	qt.Assert(t, qt.IsNil(again.Pin(t.Context())))
	_, err := os.Lstat(root)
	qt.Check(t, qt.IsNil(err))
	s.clear(t)
}

// A program that decides at run time whether it shall outlive itself.
func TestPinAndUnpin(t *testing.T) {
	s := newScene(t)
	owner := s.attachIn(t, s.tracer(t, 1, pass), dispatcher.Options{Name: "one"})
	s.wantChain(t, "one")
	s.wantNoPins(t)

	for range 2 { // pinning twice is no error
		qt.Assert(t, qt.IsNil(owner.do(t, command{Op: "pin"})))
		s.wantChain(t, "one*")
		qt.Assert(t, qt.HasLen(s.pins(t), 1))
	}
	for range 2 {
		qt.Assert(t, qt.IsNil(owner.do(t, command{Op: "unpin"})))
		s.wantChain(t, "one")
		s.wantNoPins(t)
	}
	qt.Assert(t, qt.IsNil(owner.do(t, command{Op: "pin"})))
	owner.Kill()
	s.wantChain(t, "one*")
	s.wantRun(t, 1)

	// Another process unpins it: then it is the only owner.
	heir := s.open(t, "one")
	qt.Assert(t, qt.IsNil(heir.Unpin(t.Context())))
	s.wantChain(t, "one")
	s.wantRun(t, 1)
	qt.Assert(t, qt.IsNil(heir.Close()))
	s.wantFree(t)
}

// A restart without a gap: the new process opens the member before the old one ends.
func TestCoOwners(t *testing.T) {
	s := newScene(t)
	old := s.attachIn(t, s.tracer(t, 1, drop), dispatcher.Options{Name: "one"})
	s.attach(t, s.tracer(t, 2, pass), dispatcher.Options{Name: "two"})
	heir := s.open(t, "one")
	old.Kill()
	s.wantRun(t, 1)
	s.wantChain(t, "one two")

	qt.Assert(t, qt.IsNil(heir.Update(t.Context(), dispatcher.Program(s.tracer(t, 3, pass)))))
	s.wantRun(t, 3, 2)
	qt.Assert(t, qt.IsNil(heir.Close()))
	s.wantRunSoon(t, 2)
	s.wantChain(t, "one(empty) two")
}

// A pin is an address, too.
func TestOpenPinned(t *testing.T) {
	s := newScene(t)
	s.attach(t, s.tracer(t, 1, pass), dispatcher.Options{Name: "one", Persistent: true}).Close()
	folder := filepath.Join(s.bpffs, "libdispatcher", s.pins(t)[0], "member_one")
	for _, path := range []string{folder, filepath.Join(folder, "slot")} {
		link, err := dispatcher.OpenPinned(t.Context(), path)
		qt.Assert(t, qt.IsNil(err))
		m, err := link.Info(t.Context())
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.Equals(m.Name, "one"))
		qt.Assert(t, qt.Equals(m.State, hook.StateRunning))
		qt.Assert(t, qt.IsNil(link.Set(t.Context(), priority(7))))
		qt.Assert(t, qt.IsNil(link.Close()))
	}
	for _, path := range []string{folder + "x", filepath.Join(s.bpffs, "libdispatcher/xdp_1/member_one")} {
		_, err := dispatcher.OpenPinned(t.Context(), path)
		qt.Assert(t, qt.ErrorIs(err, fs.ErrNotExist))
	}
	_, err := dispatcher.OpenPinned(t.Context(), s.bpffs)
	qt.Assert(t, qt.ErrorIs(err, dispatcher.ErrUsage))
	s.clear(t)
	s.wantFree(t)
}

// An owner must learn that its program is not in the way of packets any more.
func TestDetachedByAnother(t *testing.T) {
	for name, companions := range map[string]int{"one of several": 1, "the last": 0} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t)
			link := s.attach(t, s.tracer(t, 1, drop), dispatcher.Options{Name: "one"})
			for range companions {
				s.attach(t, s.tracer(t, 2, pass), dispatcher.Options{Name: "two"})
			}
			qt.Assert(t, qt.IsNil(newApp(t).do(t, s.command(command{Op: "detach", Member: "one"}))))
			qt.Assert(t, qt.IsFalse(s.drops(t)))
			s.wantGone(t, link, fs.ErrNotExist)
			s.clear(t)
			s.wantFree(t)
		})
	}
}

// wantGone checks what the methods of a link to a member say that is no more.
func (s *scene) wantGone(t *testing.T, link *dispatcher.Link, cause error) {
	t.Helper()
	ctx := t.Context()
	qt.Check(t, qt.ErrorIs(link.Update(ctx, dispatcher.Program(s.tracer(t, 9, pass))), cause))
	qt.Check(t, qt.ErrorIs(link.Set(ctx, priority(7)), cause))
	qt.Check(t, qt.ErrorIs(link.Pin(ctx), cause))
	qt.Check(t, qt.ErrorIs(link.Unpin(ctx), cause))
	_, err := link.Info(ctx)
	qt.Check(t, qt.ErrorIs(err, cause))
	qt.Check(t, qt.IsNil(link.Detach(ctx)))
	qt.Check(t, qt.IsNil(link.Close()))
	s.wantNoPins(t)
}

func TestClosedLink(t *testing.T) {
	s := newScene(t)
	link := s.attach(t, s.tracer(t, 1, pass), dispatcher.Options{Name: "one"})
	qt.Assert(t, qt.IsNil(link.Close()))
	qt.Assert(t, qt.IsNil(link.Close()))

	ctx := t.Context()
	qt.Check(t, qt.ErrorIs(link.Update(ctx, dispatcher.Program(s.tracer(t, 2, pass))), fs.ErrClosed))
	qt.Check(t, qt.ErrorIs(link.Set(ctx, priority(7)), fs.ErrClosed))
	qt.Check(t, qt.ErrorIs(link.Pin(ctx), fs.ErrClosed))
	qt.Check(t, qt.ErrorIs(link.Unpin(ctx), fs.ErrClosed))
	qt.Check(t, qt.ErrorIs(link.Detach(ctx), fs.ErrClosed))
	_, err := link.Info(ctx)
	qt.Check(t, qt.ErrorIs(err, fs.ErrClosed))
	_, err = link.Chain(ctx)
	qt.Check(t, qt.ErrorIs(err, fs.ErrClosed))
	_, err = link.Program()
	qt.Check(t, qt.ErrorIs(err, fs.ErrClosed))
}

// The name of a device is not its identity, and neither is its namespace.
func TestDeviceIsRenamedAndMoves(t *testing.T) {
	s := newScene(t)
	one := s.attach(t, s.tracer(t, 1, pass), dispatcher.Options{Name: "one"})
	two := s.attach(t, s.tracer(t, 2, pass), dispatcher.Options{Name: "two", Persistent: true})

	s.Server.IP(t, "link", "set", s.ServerDev, "down")
	s.Server.IP(t, "link", "set", s.ServerDev, "name", "renamed")
	c, err := one.Chain(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.Equals(c.Target, "renamed"))
	renamed := s.onDevice(dispatcher.XDP("renamed").In(s.Server.Name))
	renamed.changeAround(t, one, two)

	elsewhere := testenv.NewNetNS(t)
	s.Server.IP(t, "link", "set", "renamed", "netns", elsewhere.Name)
	moved := s.onDevice(dispatcher.XDP("renamed").In(elsewhere.Name))
	c, err = one.Chain(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.Equals(c.NetNS.Name, elsewhere.Name))
	qt.Assert(t, qt.Equals(c.Target, "renamed"))
	qt.Assert(t, qt.Not(qt.Equals(c.Ifindex, 0)))
	moved.changeAround(t, one, two)

	_, err = dispatcher.Read(t.Context(), s.target, s.look())
	qt.Assert(t, qt.ErrorIs(err, fs.ErrNotExist))
	qt.Assert(t, qt.IsNil(one.Detach(t.Context())))
	moved.wantChain(t, "two*")
	qt.Assert(t, qt.IsNil(two.Detach(t.Context())))
	moved.wantFree(t)
}

// changeAround changes a chain of two through their links, wherever the device is.
func (s *scene) changeAround(t *testing.T, one, two *dispatcher.Link) {
	t.Helper()
	ctx := t.Context()
	s.wantChain(t, "one two*")
	qt.Assert(t, qt.IsNil(one.Set(ctx, priority(60))))
	s.wantChain(t, "two* one")
	next := s.tracer(t, 3, pass)
	qt.Assert(t, qt.IsNil(two.Update(ctx, dispatcher.Program(next))))
	qt.Assert(t, qt.Equals(s.read(t).Member("two").Program.ID, uint32(idOf(t, next))))
	qt.Assert(t, qt.IsNil(one.Pin(ctx)))
	s.wantChain(t, "two* one*")
	qt.Assert(t, qt.IsNil(one.Unpin(ctx)))
	qt.Assert(t, qt.IsNil(one.Set(ctx, priority(40))))
	s.wantChain(t, "one two*")
}

// When the device is gone, its chain shall not be in the way, and say so.
func TestDeviceIsGone(t *testing.T) {
	s := newScene(t)
	one := s.attach(t, s.tracer(t, 1, pass), dispatcher.Options{Name: "one", Persistent: true})
	two := s.attach(t, s.tracer(t, 2, pass), dispatcher.Options{Name: "two", Persistent: true})
	three := s.attach(t, s.tracer(t, 3, pass), dispatcher.Options{Name: "three"})
	s.Server.IP(t, "link", "delete", s.ServerDev)

	_, err := dispatcher.Read(t.Context(), s.target, s.look())
	qt.Assert(t, qt.ErrorIs(err, fs.ErrNotExist))
	_, err = dispatcher.Attach(t.Context(), s.target, dispatcher.Program(s.tracer(t, 4, pass)), dispatcher.Options{BPFFS: s.bpffs})
	qt.Assert(t, qt.ErrorIs(err, fs.ErrNotExist))
	qt.Assert(t, qt.HasLen(s.pins(t), 1)) // see Recover

	for _, link := range []*dispatcher.Link{one, two, three} {
		qt.Check(t, qt.ErrorIs(link.Set(t.Context(), priority(7)), dispatcher.ErrDefunct))
	}
	qt.Assert(t, qt.IsNil(one.Detach(t.Context())))
	qt.Assert(t, qt.HasLen(s.pins(t), 1))
	qt.Assert(t, qt.IsNil(two.Detach(t.Context())))
	s.wantNoPins(t)
	s.wantGone(t, three, dispatcher.ErrDefunct)
}

// The truth is in the kernel: who cannot see the pins sees the same members.
func TestReadFromElsewhere(t *testing.T) {
	s := newScene(t)
	s.attach(t, s.tracer(t, 1, pass), dispatcher.Options{Name: "one", Persistent: true})
	s.attach(t, s.tracer(t, 2, pass), dispatcher.Options{Name: "two", Owner: "me", Settings: hook.Settings{
		Priority: 7, ContinueOn: hook.SetOf(hook.Pass, hook.TX), OnMissing: hook.MissingDrop,
	}})
	s.attach(t, s.tracer(t, 3, pass), dispatcher.Options{Name: "three"}).Close()
	s.wantRunSoon(t, 2, 1)
	want := s.read(t)
	qt.Assert(t, qt.Equals(summary(want), "two one* three(empty)"))
	qt.Assert(t, qt.HasLen(want.Pins, 2))
	want.Pins = []string{}

	qt.Check(t, qt.DeepEquals(s.withoutBPFFS(t).read(t), want))
	inOwnMountNS(t, func() error {
		if err := unix.Unmount(s.bpffs, 0); err != nil {
			return err
		}
		got, err := dispatcher.Read(t.Context(), s.target, s.look())
		qt.Check(t, qt.DeepEquals(got, want))
		return err
	})
	qt.Assert(t, qt.HasLen(s.pins(t), 1))
	s.clear(t)
}

// The library needs a bpffs for what must outlive processes, and else none.
func TestWithoutBPFFS(t *testing.T) {
	s := newScene(t).withoutBPFFS(t)
	one := s.attach(t, s.tracer(t, 1, pass), dispatcher.Options{Name: "one"})
	s.attach(t, s.tracer(t, 2, pass), dispatcher.Options{Name: "two"})
	qt.Assert(t, qt.IsNil(one.Set(t.Context(), priority(60))))
	qt.Assert(t, qt.IsNil(one.Update(t.Context(), dispatcher.Program(s.tracer(t, 3, pass)))))
	s.wantRun(t, 2, 3)
	qt.Assert(t, qt.IsNil(s.open(t, "one").Unpin(t.Context())))
	s.detach(t, "two")
	s.wantRun(t, 3)

	const refusal = `.*: a persistent member is pinned, and there is no bpffs at .*; mount one with "mount -t bpf bpffs .*"`
	err := one.Pin(t.Context())
	qt.Assert(t, qt.ErrorIs(err, fs.ErrNotExist))
	qt.Assert(t, qt.ErrorMatches(err, refusal))
	_, err = dispatcher.Attach(t.Context(), s.target, dispatcher.Program(s.tracer(t, 4, pass)),
		dispatcher.Options{Name: "four", Persistent: true, BPFFS: s.bpffs})
	qt.Assert(t, qt.ErrorIs(err, fs.ErrNotExist))
	qt.Assert(t, qt.ErrorMatches(err, refusal))

	s.wantChain(t, "one")
	s.clear(t)
	s.wantFree(t)
}

// Who detaches may not see the pins: they are in another container's bpffs.
// They must not bring the member back, and go with the next change there.
func TestDetachWithoutSeeingPins(t *testing.T) {
	s := newScene(t)
	s.attach(t, s.tracer(t, 1, drop), dispatcher.Options{Name: "one", Persistent: true}).Close()
	s.attach(t, s.tracer(t, 2, pass), dispatcher.Options{Name: "two", Persistent: true}).Close()
	blind := s.withoutBPFFS(t)
	blind.detach(t, "one")
	blind.wantChain(t, "two*")
	s.wantRun(t, 2)
	qt.Assert(t, qt.HasLen(s.read(t).Pins, 3)) // root, and both members

	s.attach(t, s.tracer(t, 3, pass), dispatcher.Options{Name: "three"})
	qt.Assert(t, qt.HasLen(s.read(t).Pins, 2))
	blind.clear(t)
	s.wantRun(t)
	s.clear(t)
	s.wantFree(t)
}

// The lock is a courtesy: a process that is stopped while it has it must not
// stop all others for good.
func TestStoppedWithTheLock(t *testing.T) {
	s := newScene(t)
	s.attach(t, s.tracer(t, 1, pass), dispatcher.Options{Name: "one"})
	folder, err := os.Open(filepath.Join(s.bpffs, "libdispatcher"))
	qt.Assert(t, qt.IsNil(err))
	defer folder.Close()
	qt.Assert(t, qt.IsNil(unix.Flock(int(folder.Fd()), unix.LOCK_EX)))

	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err = dispatcher.Attach(ctx, s.target, dispatcher.Program(s.tracer(t, 2, pass)), dispatcher.Options{Name: "two", BPFFS: s.bpffs})
	qt.Assert(t, qt.ErrorIs(err, context.DeadlineExceeded))
	s.wantChain(t, "one") // and to read needs no lock

	s.attach(t, s.tracer(t, 2, pass), dispatcher.Options{Name: "two", Persistent: true})
	s.wantRun(t, 1, 2)
	qt.Assert(t, qt.IsNil(folder.Close()))
	s.clear(t)
	s.wantFree(t)
}

// Who gives up must have changed nothing.
func TestCanceled(t *testing.T) {
	s := newScene(t)
	link := s.attach(t, s.tracer(t, 1, pass), dispatcher.Options{Name: "one"})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	next := dispatcher.Program(s.tracer(t, 2, pass))
	_, err := dispatcher.Attach(ctx, s.target, next, dispatcher.Options{Name: "two", BPFFS: s.bpffs})
	for what, err := range map[string]error{
		"attach":     err,
		"update":     link.Update(ctx, next),
		"set":        link.Set(ctx, priority(7)),
		"pin":        link.Pin(ctx),
		"unpin":      link.Unpin(ctx),
		"detach":     dispatcher.Detach(ctx, s.target, "one", s.leave()),
		"detach all": dispatcher.DetachAll(ctx, s.target, s.leave()),
		"link":       link.Detach(ctx),
	} {
		qt.Check(t, qt.ErrorIs(err, context.Canceled), qt.Commentf("%s", what))
	}
	s.wantChain(t, "one")
	s.wantRun(t, 1)
	s.wantNoPins(t)
}
