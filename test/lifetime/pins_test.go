package lifetime

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// What is pinned shall outlive the command that attached it.
func TestPersistent(t *testing.T) {
	s := scene.New(t)
	owner := s.AttachIn(t, s.Tracer(t, 1, scene.Drop), dispatcher.Options{Name: "guard", Persistent: true})
	qt.Assert(t, qt.IsNil(owner.Stop()))
	s.WantChain(t, "guard*")
	qt.Assert(t, qt.IsTrue(s.Drops(t)))

	// An administrator without any tool: rm.
	c := s.Read(t)
	qt.Assert(t, qt.HasLen(c.Pins, 2), qt.Commentf("%q", c.Pins))
	pin := filepath.Join(s.BPFFS, "libdispatcher", s.Pins(t)[0], "member_guard", "slot")
	qt.Assert(t, qt.SliceContains(c.Pins, pin))
	qt.Assert(t, qt.IsNil(os.Remove(pin)))
	s.WantRunSoon(t)
	qt.Assert(t, qt.IsFalse(s.Drops(t)))
	s.WantChain(t, "guard*(empty)")

	// The next change removes the rest.
	next := s.Attach(t, s.Tracer(t, 2, scene.Pass), dispatcher.Options{Name: "next"})
	s.WantChain(t, "next")
	s.WantRun(t, 2)
	qt.Assert(t, qt.IsNil(next.Set(t.Context(), scene.Priority(7))))
	s.WantNoPins(t)
	qt.Assert(t, qt.IsNil(next.Close()))
	s.WantFree(t)
}

// rm -r of the whole folder is what an administrator in need will do.
func TestRemovedFolder(t *testing.T) {
	s := scene.New(t)
	s.Attach(t, s.Tracer(t, 1, scene.Drop), dispatcher.Options{Name: "one", Persistent: true}).Close()
	s.Attach(t, s.Tracer(t, 2, scene.Drop), dispatcher.Options{Name: "two", Persistent: true}).Close()
	s.WantChain(t, "one* two*")
	qt.Assert(t, qt.IsNil(os.RemoveAll(filepath.Join(s.BPFFS, "libdispatcher"))))
	s.WantFree(t)
	qt.Assert(t, qt.IsFalse(s.Drops(t)))
	s.Attach(t, s.Tracer(t, 3, scene.Pass), dispatcher.Options{Name: "one", Persistent: true})
	s.WantRun(t, 3)
	s.Clear(t)
}

// When the pin of its slot was removed by hand, a persistent member comes back under its
// name, whatever is left of its pins.
func TestAttachAgainAfterRemovedPin(t *testing.T) {
	s := scene.New(t)
	attach := func() {
		link, err := dispatcher.Attach(t.Context(), s.Target, dispatcher.Spec(scene.CountingOn(hook.XDP), dispatcher.LoadOptions{}),
			dispatcher.Options{Name: "counter", Persistent: true, BPFFS: s.BPFFS, OnMissing: hook.MissingDrop})
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.IsNil(link.Close()))
	}
	attach()
	qt.Assert(t, qt.IsNil(os.Remove(filepath.Join(s.BPFFS, "libdispatcher", s.Pins(t)[0], "member_counter", "slot"))))
	scene.Soon(t, func() bool { return s.Passed(t, scene.Port, 1) == 0 })
	s.WantChain(t, "counter*(empty)")
	attach()
	s.WantChain(t, "counter*")
	qt.Assert(t, qt.IsFalse(s.Drops(t)))
	s.Clear(t)
	s.WantFree(t)
}

// Somebody removed the root's pin only: a member that is pinned afterwards
// must outlive its process all the same.
func TestPinAfterRemovedRoot(t *testing.T) {
	s := scene.New(t)
	one := s.Attach(t, s.Tracer(t, 1, scene.Pass), dispatcher.Options{Name: "one", Persistent: true})
	qt.Assert(t, qt.IsNil(os.Remove(filepath.Join(s.BPFFS, "libdispatcher", s.Pins(t)[0], "root"))))
	s.Attach(t, s.Tracer(t, 2, scene.Pass), dispatcher.Options{Name: "two", Persistent: true}).Close()
	s.WantRun(t, 1, 2)
	qt.Assert(t, qt.IsNil(one.Close()))
	s.WantChain(t, "one* two*")
	s.WantRun(t, 1, 2)
	s.Clear(t)
	s.WantFree(t)

	// Pinning again repairs it for a member that has its own pin still.
	again := s.Attach(t, s.Tracer(t, 3, scene.Pass), dispatcher.Options{Name: "three", Persistent: true})
	root := filepath.Join(s.BPFFS, "libdispatcher", s.Pins(t)[0], "root")
	qt.Assert(t, qt.IsNil(os.Remove(root)))
	qt.Assert(t, qt.IsNil(scene.Second(again.Pin(t.Context()))))
	_, err := os.Lstat(root)
	qt.Check(t, qt.IsNil(err))
	s.Clear(t)
}

// With pins that cannot be changed, an operation either changes nothing, or says that it is in effect.
func TestReadOnlyPins(t *testing.T) {
	for _, h := range []hook.Hook{hook.XDP, hook.TCXIngress, hook.CgroupConnect4} {
		t.Run(string(h), func(t *testing.T) {
			s := scene.NewOn(t, h)
			attach := func(name string, number int) (*dispatcher.Link, error) {
				return s.TryJoin(t, dispatcher.Program(s.Tracer(t, number)), dispatcher.Options{Name: name, Persistent: true})
			}
			_, err := attach("one", 1)
			qt.Assert(t, qt.IsNil(err))
			qt.Assert(t, qt.IsNil(unix.Mount("", s.BPFFS, "", unix.MS_REMOUNT|unix.MS_RDONLY, "")))
			c, readErr := dispatcher.Read(t.Context(), s.Target, s.Look())
			_, err = attach("two", 2)
			qt.Assert(t, qt.IsNil(unix.Mount("", s.BPFFS, "", unix.MS_REMOUNT, "")))
			qt.Assert(t, qt.IsNil(readErr))
			qt.Check(t, qt.Equals(scene.Summary(c), "one*"))
			qt.Check(t, qt.ErrorIs(err, unix.EROFS))
			s.WantRun(t, 1)

			// The mount alone is read-only.
			pins := s.BPFFS
			s.BPFFS = t.TempDir()
			qt.Assert(t, qt.IsNil(unix.Mount(pins, s.BPFFS, "", unix.MS_BIND, "")))
			ro := s.BPFFS
			t.Cleanup(func() { unix.Unmount(ro, unix.MNT_DETACH) }) // if it is still there
			qt.Assert(t, qt.IsNil(unix.Mount("", s.BPFFS, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, "")))

			_, err = attach("two", 2)
			qt.Check(t, qt.ErrorIs(err, unix.EROFS))
			s.WantRun(t, 1)
			one := s.Open(t, "one")
			before := s.Read(t)
			qt.Check(t, qt.ErrorIs(one.Unpin(t.Context()), unix.EROFS))
			qt.Check(t, qt.DeepEquals(s.Read(t).Members, before.Members))
			next := dispatcher.Spec(scene.CountingOn(h), dispatcher.LoadOptions{})
			was := s.Read(t).Member("one").Program.ID
			err = one.Update(t.Context(), next)
			qt.Check(t, qt.ErrorIs(err, dispatcher.ErrPins))
			qt.Check(t, qt.ErrorIs(err, unix.EROFS))
			qt.Check(t, qt.ErrorMatches(err, ".*the new program runs, but its maps are not pinned: .*; make .* writable, .*"))
			qt.Check(t, qt.Not(qt.Equals(s.Read(t).Member("one").Program.ID, was)))

			if err = one.Detach(t.Context()); h == hook.XDP {
				qt.Check(t, qt.ErrorIs(err, dispatcher.ErrPins))
				qt.Check(t, qt.ErrorMatches(err, ".*the member is detached, but its pins are left: .*"))
				qt.Check(t, qt.HasLen(s.Read(t).Members, 0))
			} else {
				qt.Check(t, qt.ErrorIs(err, unix.EROFS))
				qt.Check(t, qt.Not(qt.ErrorIs(err, dispatcher.ErrPins)))
				qt.Check(t, qt.HasLen(s.Read(t).Members, 1))
			}
			s.BPFFS = pins
			qt.Check(t, qt.IsNil(unix.Unmount(ro, unix.MNT_DETACH)))
			if h != hook.XDP {
				s.Detach(t, "one")
			}
			s.Recover(t, dispatcher.RecoverOptions{})
			qt.Check(t, qt.HasLen(s.Pins(t), 0))
		})
	}
}

// A program that decides at run time whether it shall outlive itself.
func TestPinAndUnpin(t *testing.T) {
	s := scene.New(t)
	owner := s.AttachIn(t, s.Tracer(t, 1, scene.Pass), dispatcher.Options{Name: "one"})
	s.WantChain(t, "one")
	s.WantNoPins(t)

	for range 2 { // pinning twice is no error
		qt.Assert(t, qt.IsNil(owner.Do(t, scene.Command{Op: "pin"})))
		s.WantChain(t, "one*")
		qt.Assert(t, qt.HasLen(s.Pins(t), 1))
	}
	for range 2 {
		qt.Assert(t, qt.IsNil(owner.Do(t, scene.Command{Op: "unpin"})))
		s.WantChain(t, "one")
		s.WantNoPins(t)
	}
	qt.Assert(t, qt.IsNil(owner.Do(t, scene.Command{Op: "pin"})))
	owner.Kill()
	s.WantChain(t, "one*")
	s.WantRun(t, 1)

	// Another process unpins it: then it is the only owner.
	heir := s.Open(t, "one")
	qt.Assert(t, qt.IsNil(heir.Unpin(t.Context())))
	s.WantChain(t, "one")
	s.WantRun(t, 1)
	qt.Assert(t, qt.IsNil(heir.Close()))
	s.WantFree(t)
}

// A pin is an address, too.
func TestOpenPinned(t *testing.T) {
	s := scene.New(t)
	s.Attach(t, s.Tracer(t, 1, scene.Pass), dispatcher.Options{Name: "one", Persistent: true}).Close()
	folder := filepath.Join(s.BPFFS, "libdispatcher", s.Pins(t)[0], "member_one")
	for _, path := range []string{folder, filepath.Join(folder, "slot")} {
		link, err := dispatcher.OpenPinned(t.Context(), path)
		qt.Assert(t, qt.IsNil(err))
		m, err := link.Info(t.Context())
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.Equals(m.Name, "one"))
		qt.Assert(t, qt.Equals(m.State, hook.StateRunning))
		qt.Assert(t, qt.IsNil(link.Set(t.Context(), scene.Priority(7))))
		qt.Assert(t, qt.IsNil(link.Close()))
	}
	for _, path := range []string{folder + "x", filepath.Join(s.BPFFS, "libdispatcher/xdp_1/member_one")} {
		_, err := dispatcher.OpenPinned(t.Context(), path)
		qt.Assert(t, qt.ErrorIs(err, fs.ErrNotExist))
	}
	_, err := dispatcher.OpenPinned(t.Context(), s.BPFFS)
	qt.Assert(t, qt.ErrorIs(err, dispatcher.ErrUsage))
	s.Clear(t)
	s.WantFree(t)
}

// The truth is in the kernel: a process that cannot see the pins sees the same members.
func TestReadFromElsewhere(t *testing.T) {
	s := scene.New(t)
	s.Attach(t, s.Tracer(t, 1, scene.Pass), dispatcher.Options{Name: "one", Persistent: true})
	s.Attach(t, s.Tracer(t, 2, scene.Pass), dispatcher.Options{Name: "two", Owner: "me", Priority: 7, ContinueOn: hook.SetOf(hook.Pass, hook.TX), OnMissing: hook.MissingDrop})
	s.Attach(t, s.Tracer(t, 3, scene.Pass), dispatcher.Options{Name: "three"}).Close()
	s.WantRunSoon(t, 2, 1)
	want := s.Read(t)
	qt.Assert(t, qt.Equals(scene.Summary(want), "two one* three(empty)"))
	qt.Assert(t, qt.HasLen(want.Pins, 2))
	want.Pins = []string{}

	qt.Check(t, qt.DeepEquals(s.WithoutBPFFS(t).Read(t), want))
	scene.InOwnMountNS(t, func() error {
		if err := unix.Unmount(s.BPFFS, 0); err != nil {
			return err
		}
		got, err := dispatcher.Read(t.Context(), s.Target, s.Look())
		qt.Check(t, qt.DeepEquals(got, want))
		return err
	})
	qt.Assert(t, qt.HasLen(s.Pins(t), 1))
	s.Clear(t)
}

// The library needs a bpffs for what must outlive processes, and else none.
func TestWithoutBPFFS(t *testing.T) {
	s := scene.New(t).WithoutBPFFS(t)
	one := s.Attach(t, s.Tracer(t, 1, scene.Pass), dispatcher.Options{Name: "one"})
	s.Attach(t, s.Tracer(t, 2, scene.Pass), dispatcher.Options{Name: "two"})
	qt.Assert(t, qt.IsNil(one.Set(t.Context(), scene.Priority(60))))
	qt.Assert(t, qt.IsNil(one.Update(t.Context(), dispatcher.Program(s.Tracer(t, 3, scene.Pass)))))
	s.WantRun(t, 2, 3)
	qt.Assert(t, qt.IsNil(s.Open(t, "one").Unpin(t.Context())))
	s.Detach(t, "two")
	s.WantRun(t, 3)

	const refusal = `.*: a persistent member is pinned, and there is no bpffs at .*; mount one with "(mkdir .* && )?mount -t bpf .*"`
	err := scene.Second(one.Pin(t.Context()))
	qt.Assert(t, qt.ErrorIs(err, fs.ErrNotExist))
	qt.Assert(t, qt.ErrorMatches(err, refusal))
	_, err = dispatcher.Attach(t.Context(), s.Target, dispatcher.Program(s.Tracer(t, 4, scene.Pass)),
		dispatcher.Options{Name: "four", Persistent: true, BPFFS: s.BPFFS})
	qt.Assert(t, qt.ErrorIs(err, fs.ErrNotExist))
	qt.Assert(t, qt.ErrorMatches(err, refusal))

	s.WantChain(t, "one")
	s.Clear(t)
	s.WantFree(t)
}

// The process that detaches may not see the pins: they are in another container's bpffs.
// They must not bring the member back, and go with the next change there.
func TestDetachWithoutSeeingPins(t *testing.T) {
	s := scene.New(t)
	s.Attach(t, s.Tracer(t, 1, scene.Drop), dispatcher.Options{Name: "one", Persistent: true}).Close()
	s.Attach(t, s.Tracer(t, 2, scene.Pass), dispatcher.Options{Name: "two", Persistent: true}).Close()
	blind := s.WithoutBPFFS(t)
	blind.Detach(t, "one")
	blind.WantChain(t, "two*")
	s.WantRun(t, 2)
	qt.Assert(t, qt.HasLen(s.Read(t).Pins, 3)) // root, and both members

	s.Attach(t, s.Tracer(t, 3, scene.Pass), dispatcher.Options{Name: "three"})
	qt.Assert(t, qt.HasLen(s.Read(t).Pins, 2))
	blind.Clear(t)
	s.WantRun(t)
	s.Clear(t)
	s.WantFree(t)
}
