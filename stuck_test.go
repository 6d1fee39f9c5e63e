package dispatcher_test

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// gone is what a list shows of members whose device is gone.
func (s *scene) gone(t testing.TB, h hook.Hook) string {
	t.Helper()
	list, err := dispatcher.List(t.Context(), dispatcher.ListOptions{BPFFS: s.bpffs, Hooks: []hook.Hook{h}})
	qt.Assert(t, qt.IsNil(err))
	words := ""
	for _, c := range list {
		for _, m := range c.Members {
			if m.State == hook.StateDefunct && m.Kind == hook.KindMember {
				words += fmt.Sprintf("%s(%s) ", m.Name, m.Detail)
			}
		}
	}
	return words
}

func (s *scene) recover(t testing.TB, o dispatcher.RecoverOptions) []hook.Leftover {
	t.Helper()
	o.BPFFS = s.bpffs
	found, err := dispatcher.Recover(t.Context(), o)
	qt.Assert(t, qt.IsNil(err))
	return found
}

func (s *scene) on() testenv.ProgramOption { return testenv.On(s.target.Hook) }

// goOn is the verdict after which the next member runs.
func (s *scene) goOn() int {
	switch {
	case s.target.Hook == hook.XDP:
		return testenv.XDPPass
	case s.target.Hook.OnCgroup():
		return testenv.CgroupAllow
	}
	return testenv.TCNext
}

// newDevice makes the pair of devices anew, as it was.
func (s *scene) newDevice(t testing.TB) {
	t.Helper()
	s.Client.IP(t, "link", "add", s.ClientDev, "address", "02:77:00:00:00:01", "type", "veth", "peer", "name", s.ServerDev,
		"address", "02:77:00:00:00:02", "netns", s.Server.Name)
	for _, ns := range []struct {
		ns                  *testenv.NetNS
		dev, own, peer, mac string
	}{
		{s.Client, s.ClientDev, "10.77.0.1/24", "10.77.0.2", "02:77:00:00:00:02"},
		{s.Server, s.ServerDev, "10.77.0.2/24", "10.77.0.1", "02:77:00:00:00:01"},
	} {
		ns.ns.IP(t, "address", "add", ns.own, "dev", ns.dev)
		ns.ns.IP(t, "link", "set", ns.dev, "up")
		ns.ns.IP(t, "neighbour", "add", ns.peer, "lladdr", ns.mac, "nud", "permanent", "dev", ns.dev)
	}
}

// A device goes, and one of its name comes: persistent members are back, in order and with all options, if that is asked for.
func TestReattach(t *testing.T) {
	for _, h := range []hook.Hook{hook.XDP, hook.TCXIngress} {
		t.Run(string(h), func(t *testing.T) {
			testenv.NeedHook(t, h)
			s := newScene(t)
			s.target.Hook = h
			settings := hook.Settings{Priority: 20}
			if h == hook.XDP {
				settings = hook.Settings{Priority: 20, ContinueOn: hook.SetOf(hook.Pass, hook.TX), OnMissing: hook.MissingDrop}
			}
			for i, set := range []hook.Settings{priority(10), settings, priority(30)} {
				l := s.attach(t, s.trace.Program(t, i+1, s.goOn(), s.on()), dispatcher.Options{Name: fmt.Sprint(i + 1), Settings: set, Persistent: true})
				qt.Assert(t, qt.IsNil(l.Close()))
			}
			s.wantRun(t, 1, 2, 3)
			before := s.read(t)

			s.Server.IP(t, "link", "del", s.ServerDev)
			soon(t, func() bool { return s.gone(t, h) != "" })
			qt.Check(t, qt.Equals(s.gone(t, h), "1(was on veth1) 2(was on veth1) 3(was on veth1) "))

			// There is no place yet: nothing is lost.
			for _, f := range s.recover(t, dispatcher.RecoverOptions{Reattach: true}) {
				qt.Check(t, qt.ErrorIs(f.Err, fs.ErrNotExist))
			}
			qt.Check(t, qt.IsTrue(len(s.recover(t, dispatcher.RecoverOptions{DryRun: true})) > 0))
			s.newDevice(t)
			for _, f := range s.recover(t, dispatcher.RecoverOptions{Reattach: true}) {
				qt.Check(t, qt.IsNil(f.Err))
				qt.Check(t, qt.IsTrue(f.Reattached))
			}
			soon(t, func() bool { return len(s.ran(t)) == 3 })
			s.wantRun(t, 1, 2, 3)
			after := s.read(t)
			qt.Assert(t, qt.HasLen(after.Members, len(before.Members)))
			for i, m := range after.Members {
				qt.Check(t, qt.Equals(m.Settings, before.Members[i].Settings))
				qt.Check(t, qt.Equals(m.Program.ID, before.Members[i].Program.ID))
				qt.Check(t, qt.IsTrue(m.Persistent))
			}
			qt.Check(t, qt.Equals(s.gone(t, h), ""))
			qt.Check(t, qt.HasLen(s.recover(t, dispatcher.RecoverOptions{Reattach: true}), 0)) // not twice

			// It is a hook like any other.
			qt.Assert(t, qt.IsNil(s.open(t, "3").Set(t.Context(), priority(5))))
			s.wantRun(t, 3, 1, 2)
			s.clear(t)
			s.wantRunSoon(t)
		})
	}
}

// What is gone for good is collected.
func TestRecoverCollects(t *testing.T) {
	for _, h := range []hook.Hook{hook.XDP, hook.TCXIngress} {
		t.Run(string(h), func(t *testing.T) {
			testenv.NeedHook(t, h)
			s := newScene(t)
			s.target.Hook = h
			l := s.attach(t, s.trace.Program(t, 1, s.goOn(), s.on()), dispatcher.Options{Name: "one", Persistent: true})
			qt.Assert(t, qt.IsNil(l.Close()))
			s.Server.IP(t, "link", "del", s.ServerDev)
			soon(t, func() bool { return s.gone(t, h) != "" })
			dry := s.recover(t, dispatcher.RecoverOptions{DryRun: true})
			qt.Assert(t, qt.HasLen(dry, 1))
			qt.Check(t, qt.DeepEquals(dry[0].Members, []string{"one"}))
			qt.Check(t, qt.Equals(dry[0].Target, s.ServerDev))
			qt.Check(t, qt.Not(qt.Equals(s.gone(t, h), "")))
			found := s.recover(t, dispatcher.RecoverOptions{})
			qt.Assert(t, qt.HasLen(found, 1))
			qt.Check(t, qt.IsNil(found[0].Err))
			qt.Check(t, qt.HasLen(s.recover(t, dispatcher.RecoverOptions{}), 0))
			soon(t, func() bool { return s.gone(t, h) == "" })
		})
	}
}

// A namespace in the place of another one is not it, whatever its number: what was there does not come back in it.
func TestReattachInAnotherNetNS(t *testing.T) {
	s := newScene(t)
	l := s.attach(t, s.tracer(t, 1, testenv.XDPPass), dispatcher.Options{Name: "one", Persistent: true})
	qt.Assert(t, qt.IsNil(l.Close()))
	qt.Assert(t, qt.IsNil(s.Server.Delete()))
	other := testenv.NewPair(t)
	soon(t, func() bool { return s.gone(t, hook.XDP) != "" })
	for _, f := range s.recover(t, dispatcher.RecoverOptions{Reattach: true}) {
		qt.Check(t, qt.ErrorIs(f.Err, fs.ErrNotExist))
	}
	c, err := dispatcher.Read(t.Context(), dispatcher.XDP(other.ServerDev).In(other.Server.Name), s.look())
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.HasLen(c.Members, 0))
	s.recover(t, dispatcher.RecoverOptions{})
}

// foreignLink attaches a program as another tool does, by a link that it holds.
func (s *scene) foreignLink(t *testing.T, prog *ebpf.Program) (l link.Link, id uint32) {
	t.Helper()
	s.Server.Do(t, func() {
		if s.target.Hook == hook.XDP {
			l = hold(t, prog, s.ServerIfindex)
			return
		}
		var err error
		l, err = link.AttachTCX(link.TCXOptions{Interface: s.ServerIfindex, Program: prog, Attach: ebpf.AttachTCXIngress})
		qt.Assert(t, qt.IsNil(err))
		t.Cleanup(func() { l.Close() })
	})
	info, err := l.Info()
	qt.Assert(t, qt.IsNil(err))
	return l, uint32(info.ID)
}

// A random app came first and keeps its link: it is told to let go, and lives.
func TestDetachLink(t *testing.T) {
	for _, h := range []hook.Hook{hook.XDP, hook.TCXIngress} {
		t.Run(string(h), func(t *testing.T) {
			testenv.NeedHook(t, h)
			s := newScene(t)
			s.target.Hook = h
			prog := s.trace.Program(t, 1, s.goOn(), s.on())
			theirs, id := s.foreignLink(t, prog)
			err := dispatcher.DetachLink(t.Context(), id, s.leave())
			qt.Assert(t, qt.ErrorIs(err, dispatcher.ErrBusy))
			s.wantRun(t, 1)
			qt.Assert(t, qt.IsNil(dispatcher.DetachLink(t.Context(), id, dispatcher.DetachOptions{BPFFS: s.bpffs, Force: true})))
			s.wantRun(t)
			qt.Check(t, qt.ErrorIs(theirs.Update(prog), unix.ENOLINK))
			ours := s.attach(t, s.trace.Program(t, 2, s.goOn(), s.on()), dispatcher.Options{Name: "ours"})
			s.wantRun(t, 2)
			qt.Assert(t, qt.IsNil(ours.Detach(t.Context())))
		})
	}
	testenv.CheckLeaks(t)
	qt.Check(t, qt.ErrorIs(dispatcher.DetachLink(t.Context(), 1<<31, dispatcher.DetachOptions{}), fs.ErrNotExist))
}

// What cannot be forced is refused with the reason.
func TestDetachLinkThatCannotBe(t *testing.T) {
	testenv.CheckLeaks(t)
	prog := testenv.Load(t, &ebpf.ProgramSpec{Name: "ldt_rawtp", Type: ebpf.RawTracepoint, License: "GPL", Instructions: testenv.VerdictSpec("ldt_x", 0).Instructions})
	l, err := link.AttachRawTracepoint(link.RawTracepointOptions{Name: "sched_process_exec", Program: prog})
	qt.Assert(t, qt.IsNil(err))
	defer l.Close()
	info, err := l.Info()
	qt.Assert(t, qt.IsNil(err))
	err = dispatcher.DetachLink(t.Context(), uint32(info.ID), dispatcher.DetachOptions{BPFFS: t.TempDir(), Force: true})
	qt.Check(t, qt.ErrorIs(err, ebpf.ErrNotSupported))
	qt.Check(t, qt.ErrorMatches(err, `.*cannot detach a link of type raw tracepoint.*holders --link \d+.*`))
	_, err = dispatcher.AdoptLink(t.Context(), uint32(info.ID), dispatcher.AdoptOptions{Options: dispatcher.Options{BPFFS: t.TempDir()}})
	qt.Check(t, qt.ErrorIs(err, ebpf.ErrNotSupported))
	qt.Check(t, qt.ErrorMatches(err, `.*link \d+ is of type raw tracepoint, on no hook that members can be on`))

	// Nor is it a member where the pin of one would be.
	pin := filepath.Join(testenv.BPFFS(t), "libdispatcher/cgroup_7/member_one/link")
	qt.Assert(t, qt.IsNil(os.MkdirAll(filepath.Dir(pin), 0o700)))
	qt.Assert(t, qt.IsNil(l.Pin(pin)))
	_, err = dispatcher.OpenPinned(t.Context(), pin)
	qt.Check(t, qt.ErrorMatches(err, `.*of type raw tracepoint, on no hook that members can be on`))
	qt.Assert(t, qt.IsNil(l.Unpin()))
}

// The chain takes the place of a random app's program in its link, without a packet that misses it; the app takes it back, and
// that is seen.
func TestAdoptLinkOnXDP(t *testing.T) {
	s := newScene(t)
	drop := testenv.DropUDPPort(t, "ldt_theirs", port)
	theirs, id := s.foreignLink(t, drop)
	flood := s.Flood(t, port, markerPort)
	adopted, err := dispatcher.AdoptLink(t.Context(), id, dispatcher.AdoptOptions{Options: dispatcher.Options{Name: "theirs", Persistent: true, BPFFS: s.bpffs}})
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { adopted.Close() })
	s.attach(t, s.tracer(t, 2, testenv.XDPPass), dispatcher.Options{Name: "ours", Settings: priority(60), Persistent: true})
	_, received := flood.Stop()
	_, marker := flood.Marker()
	qt.Check(t, qt.Equals(received, 0))
	qt.Check(t, qt.IsTrue(marker > 0))
	s.wantChain(t, "theirs* ours*")
	qt.Check(t, qt.Equals(s.read(t).LinkID, id))
	qt.Check(t, qt.IsTrue(s.read(t).Protected()))

	qt.Assert(t, qt.IsNil(theirs.Update(drop)))
	s.wantChain(t, "ldt_theirs(foreign) ours*(displaced) theirs*(displaced)")
	qt.Check(t, qt.IsTrue(s.drops(t)))
	_, err = adopted.Info(t.Context())
	qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))

	// Adopted again: nobody is lost.
	again, err := dispatcher.AdoptLink(t.Context(), id, dispatcher.AdoptOptions{Options: dispatcher.Options{Name: "theirs", Persistent: true, BPFFS: s.bpffs}})
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { again.Close() })
	s.wantChain(t, "theirs* ours*")
	qt.Check(t, qt.IsTrue(s.drops(t)))
	s.detach(t, "theirs")
	s.wantRun(t, 2)

	qt.Assert(t, qt.IsNil(theirs.Update(drop)))
	qt.Assert(t, qt.IsNil(dispatcher.DetachLink(t.Context(), id, dispatcher.DetachOptions{BPFFS: s.bpffs, Force: true})))
	qt.Check(t, qt.IsFalse(s.drops(t)))
	s.wantNoPins(t)
}

// On TCX a link becomes a member as it is; one whose name was lost with the registry gets it again.
func TestAdoptLinkOnTCX(t *testing.T) {
	testenv.Need(t, testenv.FeatureTCX)
	s := newScene(t)
	s.target.Hook = hook.TCXIngress
	ours := s.attach(t, s.trace.Program(t, 1, s.goOn(), s.on()), dispatcher.Options{Name: "ours", Settings: priority(30)})
	_, id := s.foreignLink(t, s.trace.Program(t, 2, s.goOn(), s.on()))
	adopted, err := dispatcher.AdoptLink(t.Context(), id, dispatcher.AdoptOptions{Options: dispatcher.Options{Name: "theirs", Persistent: true, BPFFS: s.bpffs}})
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { adopted.Close() })
	s.wantRun(t, 1, 2)
	s.wantChain(t, "ours theirs*")
	qt.Check(t, qt.Equals(s.read(t).Members[1].Priority, 50))
	_, err = dispatcher.AdoptLink(t.Context(), id, dispatcher.AdoptOptions{Options: dispatcher.Options{BPFFS: s.bpffs}})
	qt.Check(t, qt.ErrorIs(err, fs.ErrExist))
	qt.Assert(t, qt.IsNil(adopted.Detach(t.Context())))
	s.wantRun(t, 1)
	qt.Assert(t, qt.IsNil(ours.Detach(t.Context())))
}
