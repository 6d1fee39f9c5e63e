package dispatcher_test

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// twin is a second scene that shares all numbers with the first: names, ifindexes, and the bpffs.
func (s *scene) twin(t testing.TB) *scene {
	t.Helper()
	pair := testenv.NewPairOpts(t, testenv.PairOptions{ClientIfindex: s.ClientIfindex, ServerIfindex: s.ServerIfindex})
	return &scene{Pair: pair, target: dispatcher.XDP(pair.ServerDev).In(pair.Server.Name), bpffs: s.bpffs, trace: s.trace}
}

// Containers: the same device name and the same ifindex in every one of them. A chain must never be taken for its twin.
func TestTwins(t *testing.T) {
	eachMode(t, func(t *testing.T, a *scene, mode hook.Mode) {
		b := a.twin(t)
		qt.Assert(t, qt.Equals(a.ServerIfindex, b.ServerIfindex))
		prog := testenv.DropUDPPort(t, "ldt_drop", port)
		onA := a.attach(t, prog, dispatcher.Options{Name: "same", Mode: mode, Persistent: true})
		qt.Check(t, qt.IsTrue(a.drops(t)))
		qt.Check(t, qt.IsFalse(b.drops(t)))
		b.wantChain(t, "")

		onB := b.attach(t, prog, dispatcher.Options{Name: "same", Mode: mode, Persistent: true})
		onlyB := b.attach(t, b.tracer(t, 1, testenv.XDPPass), dispatcher.Options{Settings: priority(1)})
		a.wantChain(t, "same*")
		b.wantChain(t, "ldt_trace_1 same*")
		chainA, chainB := a.read(t), b.read(t)
		qt.Check(t, qt.Equals(chainA.Ifindex, chainB.Ifindex))
		qt.Check(t, qt.Not(qt.Equals(chainA.LinkID, chainB.LinkID)))
		qt.Check(t, qt.Not(qt.Equals(chainA.NetNS, chainB.NetNS)))
		for _, pin := range chainA.Pins {
			qt.Check(t, qt.IsFalse(slices.Contains(chainB.Pins, pin)))
		}

		// What is done to one is not done to the other.
		qt.Assert(t, qt.IsNil(onB.Set(t.Context(), priority(70))))
		qt.Check(t, qt.Equals(a.read(t).Members[0].Priority, 50))
		a.detach(t, "same")
		qt.Check(t, qt.IsFalse(a.drops(t)))
		a.wantChain(t, "")
		qt.Check(t, qt.IsTrue(b.drops(t)))
		b.wantChain(t, "ldt_trace_1 same*")
		qt.Check(t, qt.DeepEquals(b.read(t), chainBWith(chainB, b.read(t))))
		qt.Assert(t, qt.IsNil(onA.Close()))
		qt.Assert(t, qt.IsNil(onlyB.Detach(t.Context())))
		qt.Assert(t, qt.IsNil(onB.Close()))
		qt.Check(t, qt.IsTrue(b.drops(t)))
		b.clear(t)
		b.wantFree(t)
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
	a := newScene(t)
	b := a.twin(t)
	prog := testenv.DropUDPPort(t, "ldt_foreign", port)
	b.occupy(t, prog, hook.KindForeign, hook.ModeNative)
	a.wantChain(t, "")
	a.attach(t, a.tracer(t, 1, testenv.XDPPass), dispatcher.Options{})
	a.wantRun(t, 1)
	b.wantChain(t, "ldt_foreign(foreign)")

	// One foreign program on both: which of the links it is cannot be told, so none is named.
	c := a.twin(t)
	c.occupy(t, prog, hook.KindForeign, hook.ModeNative)
	_, err := c.tryJoin(t, dispatcher.Program(prog), dispatcher.Options{})
	var e *dispatcher.Error
	qt.Assert(t, qt.ErrorAs(err, &e))
	qt.Check(t, qt.Equals(e.Occupant.Kind, hook.KindForeign))
	qt.Check(t, qt.Equals(e.Occupant.LinkID, 0))
}

// replaceDevice deletes the pair's wire and puts in another of the same names and ifindexes, with packets arriving as before.
func (s *scene) replaceDevice(t testing.TB) {
	t.Helper()
	s.Server.IP(t, "link", "delete", s.ServerDev)
	const clientMAC, serverMAC = "02:77:00:00:00:03", "02:77:00:00:00:04"
	s.Client.IP(t, strings.Fields(fmt.Sprintf("link add name %s index %d address %s type veth peer name %s index %d address %s netns %s",
		s.ClientDev, s.ClientIfindex, clientMAC, s.ServerDev, s.ServerIfindex, serverMAC, s.Server.Name))...)
	for _, end := range []struct {
		ns                      *testenv.NetNS
		dev, own, peer, peerMAC string
	}{
		{s.Client, s.ClientDev, testenv.ClientIPv4.String(), testenv.ServerIPv4.String(), serverMAC},
		{s.Server, s.ServerDev, testenv.ServerIPv4.String(), testenv.ClientIPv4.String(), clientMAC},
	} {
		end.ns.IP(t, "link", "set", end.dev, "up")
		end.ns.IP(t, "address", "add", end.own+"/24", "dev", end.dev)
		end.ns.IP(t, "neighbour", "add", end.peer, "lladdr", end.peerMAC, "nud", "permanent", "dev", end.dev)
	}
	soon(t, func() bool { return s.Passed(t, port+100, 1) == 1 })
}

// A card is pulled out and put back in. Nothing hangs, those who held members are told, and the new device, though its
// name and ifindex are the old one's, begins with nothing.
func TestDeviceIsReplaced(t *testing.T) {
	eachMode(t, func(t *testing.T, s *scene, mode hook.Mode) {
		plain := s.attach(t, testenv.DropUDPPort(t, "ldt_plain", port), dispatcher.Options{Mode: mode})
		pinned := s.attach(t, testenv.DropUDPPort(t, "ldt_pinned", port), dispatcher.Options{Persistent: true})
		qt.Assert(t, qt.IsTrue(s.drops(t)))
		s.replaceDevice(t)
		s.wantChain(t, "")
		qt.Assert(t, qt.IsFalse(s.drops(t)))
		for name, operation := range map[string]func() error{
			"info":   func() error { _, err := plain.Info(t.Context()); return err },
			"chain":  func() error { _, err := pinned.Chain(t.Context()); return err },
			"set":    func() error { return plain.Set(t.Context(), priority(1)) },
			"update": func() error { return pinned.Update(t.Context(), dispatcher.Program(s.tracer(t, 3, testenv.XDPPass))) },
			"pin":    func() error { return plain.Pin(t.Context()) },
			"unpin":  func() error { return pinned.Unpin(t.Context()) },
		} {
			err := operation()
			qt.Check(t, qt.ErrorIs(err, dispatcher.ErrDefunct), qt.Commentf("%s", name))
		}
		_, err := dispatcher.Open(t.Context(), s.target, "ldt_pinned", s.look())
		qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))

		// A new chain is another one: neither the old handles nor the old pins have a part in it.
		again := s.attach(t, testenv.DropUDPPort(t, "ldt_plain", port), dispatcher.Options{Mode: mode})
		qt.Check(t, qt.ErrorIs(plain.Set(t.Context(), priority(1)), dispatcher.ErrDefunct))
		qt.Check(t, qt.IsNil(plain.Detach(t.Context())))
		qt.Assert(t, qt.IsNil(plain.Close()))
		qt.Check(t, qt.IsNil(pinned.Detach(t.Context()))) // its pins go
		qt.Assert(t, qt.IsNil(pinned.Close()))
		s.wantNoPins(t)
		s.wantChain(t, "ldt_plain")
		qt.Assert(t, qt.IsTrue(s.drops(t)))
		qt.Assert(t, qt.IsNil(again.Close()))
		s.wantFree(t)
	})
}

// What nobody holds any more of a device that is gone stays pinned, and is in nobody's way.
func TestPinsOfADeviceThatIsGone(t *testing.T) {
	s := newScene(t)
	qt.Assert(t, qt.IsNil(s.attach(t, testenv.DropUDPPort(t, "ldt_drop", port), dispatcher.Options{Persistent: true}).Close()))
	old := s.read(t).Pins
	s.replaceDevice(t)
	for range 2 {
		link := s.attach(t, testenv.DropUDPPort(t, "ldt_drop", port), dispatcher.Options{Persistent: true})
		s.wantChain(t, "ldt_drop*")
		for _, pin := range s.read(t).Pins {
			qt.Check(t, qt.IsFalse(slices.Contains(old, pin)))
		}
		qt.Assert(t, qt.IsNil(link.Detach(t.Context())))
		s.wantChain(t, "")
	}
	qt.Assert(t, qt.HasLen(s.pins(t), 1))
	_, err := dispatcher.OpenPinned(t.Context(), old[0])
	qt.Check(t, qt.ErrorIs(err, dispatcher.ErrDefunct))
}

// The other end of a wire is deleted, and this one with it, while its chain is in use.
func TestDeviceGoesUnderFlood(t *testing.T) {
	s := newScene(t)
	link := s.attach(t, testenv.DropUDPPort(t, "ldt_drop", port), dispatcher.Options{})
	flood := s.Flood(t, port)
	soon(t, func() bool { return flood.Sent() > 1000 })
	s.Client.IP(t, "link", "delete", s.ClientDev)
	qt.Check(t, qt.ErrorIs(link.Set(t.Context(), priority(1)), dispatcher.ErrDefunct))
	_, err := dispatcher.Read(t.Context(), s.target, s.look())
	qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
	qt.Check(t, qt.IsNil(link.Close()))
	_, received := flood.Stop()
	qt.Check(t, qt.Equals(received, 0))
}

// A container ends: its namespace and its devices must go, whoever still holds a member there.
func TestNetNSIsDeleted(t *testing.T) {
	for name, how := range map[string]func(*scene, *dispatcher.Options){
		"held":      func(*scene, *dispatcher.Options) {},
		"pinned":    func(_ *scene, o *dispatcher.Options) { o.Persistent = true },
		"by a path": func(s *scene, _ *dispatcher.Options) { s.target = s.target.In(s.Server.Path()) },
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t)
			o := dispatcher.Options{}
			how(s, &o)
			link := s.attach(t, testenv.DropUDPPort(t, "ldt_drop", port), o)
			qt.Assert(t, qt.IsNil(s.Server.Delete()))
			soon(t, func() bool { // its end of the wire goes, and the other with it
				_, err := s.Client.TryIP("link", "show", s.ClientDev)
				return err != nil
			})
			qt.Check(t, qt.ErrorIs(link.Set(t.Context(), priority(1)), dispatcher.ErrDefunct))
			_, err := link.Info(t.Context())
			qt.Check(t, qt.ErrorIs(err, dispatcher.ErrDefunct))
			_, err = dispatcher.Read(t.Context(), s.target, s.look())
			qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
			qt.Check(t, qt.IsNil(link.Detach(t.Context())))
			qt.Check(t, qt.IsNil(link.Close()))
			s.wantNoPins(t)
		})
	}
}

// The device has moved out of a namespace that is gone by now: the link finds it all the same.
func TestNetNSIsDeletedBehindADevice(t *testing.T) {
	s := newScene(t)
	link := s.attach(t, s.tracer(t, 1, testenv.XDPPass), dispatcher.Options{})
	s.Server.IP(t, "link", "set", s.ServerDev, "netns", s.Client.Name)
	qt.Assert(t, qt.IsNil(s.Server.Delete()))
	qt.Assert(t, qt.IsNil(link.Set(t.Context(), priority(7))))
	c, err := link.Chain(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(summary(c), "ldt_trace_1"))
	qt.Check(t, qt.Equals(c.Members[0].Priority, 7))
	qt.Check(t, qt.Equals(c.Target, s.ServerDev))
	qt.Check(t, qt.Equals(c.NetNS.Name, s.Client.Name))
	qt.Check(t, qt.Not(qt.Equals(c.Ifindex, 0)))
	moved := s.onDevice(dispatcher.XDP(s.ServerDev).In(s.Client.Name))
	moved.wantChain(t, "ldt_trace_1")
}

// All that is on the devices of a namespace, in one list: chains, programs of others, and nothing of other namespaces.
func TestList(t *testing.T) {
	s := newScene(t)
	b := s.twin(t)
	b.attach(t, b.tracer(t, 9, testenv.XDPPass), dispatcher.Options{})
	for _, dev := range []string{"a0", "b0", "c0", "d0"} {
		s.Server.IP(t, "link", "add", dev, "type", "veth", "peer", "name", dev+"p")
	}
	on := func(dev string) *scene { return s.onDevice(dispatcher.XDP(dev).In(s.Server.Name)) }
	s.attach(t, s.tracer(t, 1, testenv.XDPPass), dispatcher.Options{Persistent: true})
	on("a0").attach(t, s.tracer(t, 2, testenv.XDPPass), dispatcher.Options{Mode: hook.ModeGeneric})
	on("a0").attach(t, s.tracer(t, 3, testenv.XDPPass), dispatcher.Options{})
	legacy := s.pinned(t, testenv.VerdictProgram(t, "ldt_legacy", testenv.XDPPass))
	s.Server.IP(t, "link", "set", "dev", "b0", "xdp", "pinned", legacy)
	s.Server.Do(t, func() { hold(t, testenv.VerdictProgram(t, "ldt_foreign", testenv.XDPPass), ifindexOf(t, "c0")) })

	list, err := dispatcher.List(t.Context(), dispatcher.ListOptions{NetNS: s.Server.Name, BPFFS: s.bpffs})
	qt.Assert(t, qt.IsNil(err))
	var got []string
	for _, c := range list {
		got = append(got, c.Target+": "+summary(&c))
		one, err := dispatcher.Read(t.Context(), dispatcher.XDP(c.Target).In(s.Server.Name), s.look())
		qt.Assert(t, qt.IsNil(err))
		qt.Check(t, qt.DeepEquals(one, &c))
	}
	qt.Check(t, qt.ContentEquals(got, []string{
		"veth1: ldt_trace_1*", "a0: ldt_trace_2 ldt_trace_3", "b0: ldt_legacy(legacy)", "c0: ldt_foreign(foreign)",
	}))

	empty, err := dispatcher.List(t.Context(), dispatcher.ListOptions{NetNS: testenv.NewNetNS(t).Name, BPFFS: s.bpffs})
	qt.Check(t, qt.IsNil(err))
	qt.Check(t, qt.HasLen(empty, 0))
	s.clear(t)
}

// Names under which a device may be known.
func TestDeviceNames(t *testing.T) {
	s := newScene(t)
	long := "a-name-that-is-longer-than-fifteen-bytes." + strings.Repeat("x", 80)
	const short = "alt0"
	for _, name := range []string{short, long} {
		s.Server.IP(t, "link", "property", "add", "dev", s.ServerDev, "altname", name)
	}
	for i, name := range []string{s.ServerDev, short, long} {
		by := s.onDevice(dispatcher.XDP(name).In(s.Server.Name))
		by.attach(t, s.tracer(t, i, testenv.XDPPass), dispatcher.Options{})
		c := by.read(t)
		qt.Check(t, qt.Equals(c.Target, s.ServerDev)) // one device, one name
		qt.Check(t, qt.Equals(c.Ifindex, s.ServerIfindex))
	}
	s.wantRun(t, 0, 1, 2)
}

// Names that are none. A name that is cut short somewhere on the way would be another device's.
func TestBadDeviceNames(t *testing.T) {
	s := newScene(t)
	prog := dispatcher.Program(s.tracer(t, 1, testenv.XDPPass))
	for what, test := range map[string]struct {
		name  string
		cause error
	}{
		"empty":            {"", dispatcher.ErrUsage},
		"missing":          {"nosuch0", fs.ErrNotExist},
		"other case":       {"VETH1", fs.ErrNotExist},
		"15 bytes":         {strings.Repeat("v", 15), fs.ErrNotExist},
		"16 bytes":         {strings.Repeat("v", 16), fs.ErrNotExist},
		"200 bytes":        {strings.Repeat("v", 200), fs.ErrNotExist},
		"100000 bytes":     {strings.Repeat("v", 100000), fs.ErrNotExist},
		"a zero":           {"veth1\x00", fs.ErrNotExist},
		"a zero inside":    {"veth1\x00veth1", fs.ErrNotExist},
		"a zero in a long": {"veth1\x00" + strings.Repeat("v", 20), fs.ErrNotExist},
		"a slash":          {"../veth1", fs.ErrNotExist},
		"a space":          {"veth1 ", fs.ErrNotExist},
		"a number":         {fmt.Sprint(s.ServerIfindex), fs.ErrNotExist},
		"a pattern":        {"veth%d", fs.ErrNotExist},
	} {
		t.Run(what, func(t *testing.T) {
			target := dispatcher.XDP(test.name).In(s.Server.Name)
			_, err := dispatcher.Attach(t.Context(), target, prog, dispatcher.Options{BPFFS: s.bpffs})
			qt.Check(t, qt.ErrorIs(err, test.cause))
			_, err = dispatcher.Read(t.Context(), target, s.look())
			qt.Check(t, qt.ErrorIs(err, test.cause))
			if err != nil {
				qt.Check(t, qt.IsFalse(strings.Contains(err.Error(), "\x00")), qt.Commentf("%q", err.Error()))
			}
		})
	}
	_, err := dispatcher.Attach(t.Context(), dispatcher.Target{Device: s.ServerDev, NetNS: s.Server.Name}, prog, dispatcher.Options{})
	qt.Check(t, qt.ErrorIs(err, dispatcher.ErrUsage)) // no hook
	_, err = dispatcher.Read(t.Context(), dispatcher.Target{Hook: "nosuch", Device: s.ServerDev, NetNS: s.Server.Name}, s.look())
	qt.Check(t, qt.ErrorIs(err, dispatcher.ErrUsage))
	s.wantFree(t)
}

// A namespace is named as "ip netns" does, by a path, or by a process in it.
func TestNetNSNames(t *testing.T) {
	s := newScene(t)
	var inside *testenv.Proc
	s.Server.Do(t, func() { inside = testenv.StartHelper(t, "app") })
	for i, spec := range []string{s.Server.Name, s.Server.Path(), fmt.Sprint(inside.Pid), fmt.Sprintf("/proc/%d/ns/net", inside.Pid)} {
		by := s.onDevice(dispatcher.XDP(s.ServerDev).In(spec))
		by.attach(t, s.tracer(t, i, testenv.XDPPass), dispatcher.Options{})
		qt.Check(t, qt.DeepEquals(by.read(t), s.read(t)))
	}
	s.Server.Do(t, func() { // the caller's own
		own := s.onDevice(dispatcher.XDP(s.ServerDev))
		own.attach(t, s.tracer(t, 4, testenv.XDPPass), dispatcher.Options{})
		qt.Check(t, qt.DeepEquals(own.read(t), s.read(t)))
	})
	s.wantRun(t, 0, 1, 2, 3, 4)
}

func TestBadNetNS(t *testing.T) {
	s := newScene(t)
	dir := t.TempDir()
	file, pipe := filepath.Join(dir, "file"), filepath.Join(dir, "pipe")
	qt.Assert(t, qt.IsNil(os.WriteFile(file, nil, 0o600)))
	qt.Assert(t, qt.IsNil(unix.Mkfifo(pipe, 0o600)))
	for spec, cause := range map[string]error{
		"nosuch":                 fs.ErrNotExist,
		"4194999":                fs.ErrNotExist, // beyond the greatest process id
		"-1":                     fs.ErrNotExist,
		"/nosuch/path":           fs.ErrNotExist,
		strings.Repeat("n", 300): nil,
		"a\x00b":                 nil,
		file:                     dispatcher.ErrUsage,
		dir:                      dispatcher.ErrUsage,
		pipe:                     dispatcher.ErrUsage, // and no waiting for a writer
		"/dev/null":              dispatcher.ErrUsage,
		"/proc/self/ns/mnt":      dispatcher.ErrUsage,
		".":                      dispatcher.ErrUsage,
	} {
		_, err := dispatcher.Read(t.Context(), s.target.In(spec), s.look())
		qt.Check(t, qt.IsNotNil(err), qt.Commentf("%q", spec))
		if cause != nil {
			qt.Check(t, qt.ErrorIs(err, cause), qt.Commentf("%q", spec))
		}
		_, err = dispatcher.List(t.Context(), dispatcher.ListOptions{NetNS: spec, BPFFS: s.bpffs})
		qt.Check(t, qt.IsNotNil(err), qt.Commentf("%q", spec))
	}
}
