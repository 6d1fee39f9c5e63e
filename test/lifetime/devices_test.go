package lifetime

import (
	"io/fs"
	"slices"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// Containers: the same device name and the same ifindex in every one of them. A chain must never be taken for its twin.
func TestTwins(t *testing.T) {
	scene.EachMode(t, func(t *testing.T, a *scene.Scene, mode hook.Mode) {
		b := a.Twin(t)
		qt.Assert(t, qt.Equals(a.ServerIfindex, b.ServerIfindex))
		prog := testenv.DropUDPPort(t, "ldt_drop", scene.Port)
		onA := a.Attach(t, prog, dispatcher.Options{Name: "same", Mode: mode, Persistent: true})
		qt.Check(t, qt.IsTrue(a.Drops(t)))
		qt.Check(t, qt.IsFalse(b.Drops(t)))
		b.WantChain(t, "")

		onB := b.Attach(t, prog, dispatcher.Options{Name: "same", Mode: mode, Persistent: true})
		onlyB := b.Attach(t, b.Tracer(t, 1, testenv.XDPPass), dispatcher.Options{Priority: 1})
		a.WantChain(t, "same*")
		b.WantChain(t, "ldt_trace_1 same*")
		chainA, chainB := a.Read(t), b.Read(t)
		qt.Check(t, qt.Equals(chainA.Ifindex, chainB.Ifindex))
		qt.Check(t, qt.Not(qt.Equals(chainA.LinkID, chainB.LinkID)))
		qt.Check(t, qt.Not(qt.Equals(chainA.NetNS, chainB.NetNS)))
		for _, pin := range chainA.Pins {
			qt.Check(t, qt.IsFalse(slices.Contains(chainB.Pins, pin)))
		}

		// What is done to one is not done to the other.
		qt.Assert(t, qt.IsNil(onB.Set(t.Context(), scene.Priority(70))))
		qt.Check(t, qt.Equals(a.Read(t).Members[0].Priority, 50))
		a.Detach(t, "same")
		qt.Check(t, qt.IsFalse(a.Drops(t)))
		a.WantChain(t, "")
		qt.Check(t, qt.IsTrue(b.Drops(t)))
		b.WantChain(t, "ldt_trace_1 same*")
		qt.Check(t, qt.DeepEquals(b.Read(t), chainBWith(chainB, b.Read(t))))
		qt.Assert(t, qt.IsNil(onA.Close()))
		qt.Assert(t, qt.IsNil(onlyB.Detach(t.Context())))
		qt.Assert(t, qt.IsNil(onB.Close()))
		qt.Check(t, qt.IsTrue(b.Drops(t)))
		b.Clear(t)
		b.WantFree(t)
	})
}

// chainBWith is a chain with what a Set has changed: the dispatcher and a priority.
func chainBWith(c, now *hook.Chain) *hook.Chain {
	want := *c
	want.DispatcherID = now.DispatcherID
	want.Members = slices.Clone(c.Members)
	want.Members[1].Priority = 70
	return &want
}

// A foreign link on the twin is not on this device. Link info tells the ifindex but not the namespace.
func TestForeignTwin(t *testing.T) {
	a := scene.New(t)
	b := a.Twin(t)
	prog := testenv.DropUDPPort(t, "ldt_foreign", scene.Port)
	b.Occupy(t, prog, hook.KindForeign, hook.ModeNative)
	a.WantChain(t, "")
	a.Attach(t, a.Tracer(t, 1, testenv.XDPPass), dispatcher.Options{})
	a.WantRun(t, 1)
	b.WantChain(t, "ldt_foreign(foreign)")

	// One foreign program on both: which of the links it is cannot be told, so none is named.
	c := a.Twin(t)
	c.Occupy(t, prog, hook.KindForeign, hook.ModeNative)
	_, err := c.TryJoin(t, dispatcher.Program(prog), dispatcher.Options{})
	var e *dispatcher.Error
	qt.Assert(t, qt.ErrorAs(err, &e))
	qt.Check(t, qt.Equals(e.Occupant.Kind, hook.KindForeign))
	qt.Check(t, qt.Equals(e.Occupant.LinkID, 0))
}

// A card is pulled out and put back in. Nothing hangs, Links to members say that they are gone, and the new device, though its
// name and ifindex are the old one's, begins with nothing.
func TestDeviceIsReplaced(t *testing.T) {
	scene.EachMode(t, func(t *testing.T, s *scene.Scene, mode hook.Mode) {
		plain := s.Attach(t, testenv.DropUDPPort(t, "ldt_plain", scene.Port), dispatcher.Options{Mode: mode})
		pinned := s.Attach(t, testenv.DropUDPPort(t, "ldt_pinned", scene.Port), dispatcher.Options{Persistent: true})
		qt.Assert(t, qt.IsTrue(s.Drops(t)))
		s.ReplaceDevice(t)
		s.WantChain(t, "")
		qt.Assert(t, qt.IsFalse(s.Drops(t)))
		for name, operation := range map[string]func() error{
			"info":   func() error { _, err := plain.Info(t.Context()); return err },
			"chain":  func() error { _, err := pinned.Chain(t.Context()); return err },
			"set":    func() error { return plain.Set(t.Context(), scene.Priority(1)) },
			"update": func() error { return pinned.Update(t.Context(), dispatcher.Program(s.Tracer(t, 3, testenv.XDPPass))) },
			"pin":    func() error { return scene.Second(plain.Pin(t.Context())) },
			"unpin":  func() error { return pinned.Unpin(t.Context()) },
		} {
			err := operation()
			qt.Check(t, qt.ErrorIs(err, dispatcher.ErrDefunct), qt.Commentf("%s", name))
		}
		_, err := dispatcher.Open(t.Context(), s.Target, "ldt_pinned", s.Look())
		qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))

		// A new chain is another one: neither the old handles nor the old pins have a part in it.
		again := s.Attach(t, testenv.DropUDPPort(t, "ldt_plain", scene.Port), dispatcher.Options{Mode: mode})
		qt.Check(t, qt.ErrorIs(plain.Set(t.Context(), scene.Priority(1)), dispatcher.ErrDefunct))
		qt.Check(t, qt.IsNil(plain.Detach(t.Context())))
		qt.Assert(t, qt.IsNil(plain.Close()))
		qt.Check(t, qt.IsNil(pinned.Detach(t.Context()))) // its pins go
		qt.Assert(t, qt.IsNil(pinned.Close()))
		s.WantNoPins(t)
		s.WantChain(t, "ldt_plain")
		qt.Assert(t, qt.IsTrue(s.Drops(t)))
		qt.Assert(t, qt.IsNil(again.Close()))
		s.WantFree(t)
	})
}

// Pins of a device that is gone stay, and are in nobody's way.
func TestPinsOfADeviceThatIsGone(t *testing.T) {
	s := scene.New(t)
	qt.Assert(t, qt.IsNil(s.Attach(t, testenv.DropUDPPort(t, "ldt_drop", scene.Port), dispatcher.Options{Persistent: true}).Close()))
	old := s.Read(t).Pins
	s.ReplaceDevice(t)
	for range 2 {
		link := s.Attach(t, testenv.DropUDPPort(t, "ldt_drop", scene.Port), dispatcher.Options{Persistent: true})
		s.WantChain(t, "ldt_drop*")
		for _, pin := range s.Read(t).Pins {
			qt.Check(t, qt.IsFalse(slices.Contains(old, pin)))
		}
		qt.Assert(t, qt.IsNil(link.Detach(t.Context())))
		s.WantChain(t, "")
	}
	qt.Assert(t, qt.HasLen(s.Pins(t), 1))
	_, err := dispatcher.OpenPinned(t.Context(), old[0])
	qt.Check(t, qt.ErrorIs(err, dispatcher.ErrDefunct))
}

// A container ends: its namespace and its devices must go, even while processes hold members there.
func TestNetNSIsDeleted(t *testing.T) {
	for name, how := range map[string]func(*scene.Scene, *dispatcher.Options){
		"held":      func(*scene.Scene, *dispatcher.Options) {},
		"pinned":    func(_ *scene.Scene, o *dispatcher.Options) { o.Persistent = true },
		"by a path": func(s *scene.Scene, _ *dispatcher.Options) { s.Target = s.Target.In(s.Server.Path()) },
	} {
		t.Run(name, func(t *testing.T) {
			s := scene.New(t)
			o := dispatcher.Options{}
			how(s, &o)
			link := s.Attach(t, testenv.DropUDPPort(t, "ldt_drop", scene.Port), o)
			qt.Assert(t, qt.IsNil(s.Server.Delete()))
			scene.Soon(t, func() bool { // its end of the wire goes, and the other with it
				_, err := s.Client.TryIP("link", "show", s.ClientDev)
				return err != nil
			})
			qt.Check(t, qt.ErrorIs(link.Set(t.Context(), scene.Priority(1)), dispatcher.ErrDefunct))
			_, err := link.Info(t.Context())
			qt.Check(t, qt.ErrorIs(err, dispatcher.ErrDefunct))
			_, err = dispatcher.Read(t.Context(), s.Target, s.Look())
			qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
			qt.Check(t, qt.IsNil(link.Detach(t.Context())))
			qt.Check(t, qt.IsNil(link.Close()))
			s.WantNoPins(t)
		})
	}
}

// The device has moved out of a namespace that is gone by now: the link finds it all the same.
func TestNetNSIsDeletedBehindADevice(t *testing.T) {
	s := scene.New(t)
	link := s.Attach(t, s.Tracer(t, 1, testenv.XDPPass), dispatcher.Options{})
	s.Server.IP(t, "link", "set", s.ServerDev, "netns", s.Client.Name)
	qt.Assert(t, qt.IsNil(s.Server.Delete()))
	qt.Assert(t, qt.IsNil(link.Set(t.Context(), scene.Priority(7))))
	c, err := link.Chain(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(scene.Summary(c), "ldt_trace_1"))
	qt.Check(t, qt.Equals(c.Members[0].Priority, 7))
	qt.Check(t, qt.Equals(c.Target, s.ServerDev))
	qt.Check(t, qt.Equals(c.NetNS.Name, s.Client.Name))
	qt.Check(t, qt.Not(qt.Equals(c.Ifindex, 0)))
	moved := s.OnDevice(dispatcher.XDP(s.ServerDev).In(s.Client.Name))
	moved.WantChain(t, "ldt_trace_1")
}

// The name of a device is not its identity, and neither is its namespace.
func TestDeviceIsRenamedAndMoves(t *testing.T) {
	s := scene.New(t)
	one := s.Attach(t, s.Tracer(t, 1, scene.Pass), dispatcher.Options{Name: "one"})
	two := s.Attach(t, s.Tracer(t, 2, scene.Pass), dispatcher.Options{Name: "two", Persistent: true})

	s.Server.IP(t, "link", "set", s.ServerDev, "down")
	s.Server.IP(t, "link", "set", s.ServerDev, "name", "renamed")
	c, err := one.Chain(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.Equals(c.Target, "renamed"))
	renamed := s.OnDevice(dispatcher.XDP("renamed").In(s.Server.Name))
	changeAround(t, renamed, one, two)

	elsewhere := testenv.NewNetNS(t)
	s.Server.IP(t, "link", "set", "renamed", "netns", elsewhere.Name)
	moved := s.OnDevice(dispatcher.XDP("renamed").In(elsewhere.Name))
	c, err = one.Chain(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.Equals(c.NetNS.Name, elsewhere.Name))
	qt.Assert(t, qt.Equals(c.Target, "renamed"))
	qt.Assert(t, qt.Not(qt.Equals(c.Ifindex, 0)))
	changeAround(t, moved, one, two)

	_, err = dispatcher.Read(t.Context(), s.Target, s.Look())
	qt.Assert(t, qt.ErrorIs(err, fs.ErrNotExist))
	qt.Assert(t, qt.IsNil(one.Detach(t.Context())))
	moved.WantChain(t, "two*")
	qt.Assert(t, qt.IsNil(two.Detach(t.Context())))
	moved.WantFree(t)
}

// changeAround changes a chain of two through their links, wherever the device is.
func changeAround(t *testing.T, s *scene.Scene, one, two *dispatcher.Link) {
	t.Helper()
	ctx := t.Context()
	s.WantChain(t, "one two*")
	qt.Assert(t, qt.IsNil(one.Set(ctx, scene.Priority(60))))
	s.WantChain(t, "two* one")
	next := s.Tracer(t, 3, scene.Pass)
	qt.Assert(t, qt.IsNil(two.Update(ctx, dispatcher.Program(next))))
	qt.Assert(t, qt.Equals(s.Read(t).Member("two").Program.ID, uint32(scene.ID(t, next))))
	qt.Assert(t, qt.IsNil(scene.Second(one.Pin(ctx))))
	s.WantChain(t, "two* one*")
	qt.Assert(t, qt.IsNil(one.Unpin(ctx)))
	qt.Assert(t, qt.IsNil(one.Set(ctx, scene.Priority(40))))
	s.WantChain(t, "one two*")
}

// When the device is gone, its chain shall not be in the way, and say so.
func TestDeviceIsGone(t *testing.T) {
	s := scene.New(t)
	one := s.Attach(t, s.Tracer(t, 1, scene.Pass), dispatcher.Options{Name: "one", Persistent: true})
	two := s.Attach(t, s.Tracer(t, 2, scene.Pass), dispatcher.Options{Name: "two", Persistent: true})
	three := s.Attach(t, s.Tracer(t, 3, scene.Pass), dispatcher.Options{Name: "three"})
	s.Server.IP(t, "link", "delete", s.ServerDev)

	_, err := dispatcher.Read(t.Context(), s.Target, s.Look())
	qt.Assert(t, qt.ErrorIs(err, fs.ErrNotExist))
	_, err = dispatcher.Attach(t.Context(), s.Target, dispatcher.Program(s.Tracer(t, 4, scene.Pass)), dispatcher.Options{BPFFS: s.BPFFS})
	qt.Assert(t, qt.ErrorIs(err, fs.ErrNotExist))
	qt.Assert(t, qt.HasLen(s.Pins(t), 1)) // see Recover

	for _, link := range []*dispatcher.Link{one, two, three} {
		qt.Check(t, qt.ErrorIs(link.Set(t.Context(), scene.Priority(7)), dispatcher.ErrDefunct))
	}
	qt.Assert(t, qt.IsNil(one.Detach(t.Context())))
	qt.Assert(t, qt.HasLen(s.Pins(t), 1))
	qt.Assert(t, qt.IsNil(two.Detach(t.Context())))
	s.WantNoPins(t)
	wantGone(t, s, three, dispatcher.ErrDefunct)
}
