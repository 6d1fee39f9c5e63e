package libxdp

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// Members join, move, are replaced and leave; packets see each chain.
func TestChange(t *testing.T) {
	needsFreplace(t)
	for version := uint8(1); version <= MaxVersion; version++ {
		t.Run("version "+string('0'+rune(version)), func(t *testing.T) {
			s := newScene(t)
			o := at(50)
			o.Version = version
			c := s.join(t, 5, o)
			qt.Assert(t, qt.Equals(c.Config.Version, version))
			qt.Assert(t, qt.Equals(c.Mode, hook.ModeNative))
			s.wantRun(t, 5)
			s.join(t, 3, at(30))
			s.wantRun(t, 3, 5)
			c = s.join(t, 4, at(40))
			s.wantRun(t, 3, 4, 5)
			qt.Assert(t, qt.DeepEquals(s.read(t), c))
			qt.Assert(t, qt.Equals(c.Config.Version, version))

			// Of equal priority the name decides, whoever came first.
			s.join(t, 2, at(40))
			s.wantRun(t, 3, 2, 4, 5)
			qt.Assert(t, qt.IsNil(s.Set(t.Context(), "ldt_trace_5", hook.Settings{Priority: 1})))
			s.wantRun(t, 5, 3, 2, 4)
			qt.Assert(t, qt.IsNil(s.Set(t.Context(), "ldt_trace_3", hook.Settings{ContinueOn: hook.SetOf(hook.Drop)})))
			s.wantTrace(t, 5, 3)
			qt.Assert(t, qt.IsNil(s.Set(t.Context(), "ldt_trace_3", hook.Settings{ContinueOn: hook.SetOf(hook.Pass, hook.TX)})))
			s.wantRun(t, 5, 3, 2, 4)
			m, err := s.read(t).Find("ldt_trace_3")
			qt.Assert(t, qt.IsNil(err))
			qt.Assert(t, qt.Equals(m.Priority, 30))
			qt.Assert(t, qt.Equals(m.ContinueOn, hook.SetOf(hook.Pass, hook.TX)))

			qt.Assert(t, qt.IsNil(s.Replace(t.Context(), "ldt_trace_2", s.source(t, 7))))
			s.wantRun(t, 5, 3, 4, 7)
			qt.Assert(t, qt.IsNil(s.Detach(t.Context(), "ldt_trace_3")))
			s.wantRun(t, 5, 4, 7)
			qt.Assert(t, qt.IsNil(s.Detach(t.Context(), hook.ProgramRef(s.read(t).Members[0].Program.ID))))
			s.wantRun(t, 4, 7)
			qt.Assert(t, qt.ErrorIs(s.Detach(t.Context(), "ldt_trace_3"), fs.ErrNotExist))
			s.wantRun(t, 4, 7)
			qt.Assert(t, qt.IsNil(s.Detach(t.Context(), "ldt_trace_7")))
			s.wantRun(t, 4)
			qt.Assert(t, qt.IsNil(s.Detach(t.Context(), "ldt_trace_4")))
			s.wantRun(t)
			qt.Assert(t, qt.IsNil(s.read(t)))
		})
	}
}

// All of several or none.
func TestAttachAll(t *testing.T) {
	needsFreplace(t)
	s := newScene(t)
	var many []Source
	for n := range MaxMembers {
		many = append(many, s.source(t, n))
	}
	c, ids, err := s.AttachAll(t.Context(), many[:8], AttachOptions{Start: true})
	qt.Assert(t, qt.IsNil(err))
	for n, m := range c.Members {
		qt.Assert(t, qt.Equals(m.Program.ID, uint32(ids[n])))
		qt.Assert(t, qt.Equals(m.Priority, DefaultPriority))
	}
	s.wantRun(t, 0, 1, 2, 3, 4, 5, 6, 7)
	_, _, err = s.AttachAll(t.Context(), many[7:], AttachOptions{})
	qt.Assert(t, qt.ErrorIs(err, hook.ErrChainFull))

	// The kernel refuses one.
	bad := s.spec(9, pass, "ldt_bad")
	bad.Programs["ldt_bad"].Instructions = typed("ldt_bad", asm.Instructions{asm.LoadMem(asm.R0, asm.R1, 4000, asm.Word), asm.Return()})
	src, err := FromSpec(bad, "ldt_bad", ebpf.CollectionOptions{})
	qt.Assert(t, qt.IsNil(err))
	_, _, err = s.AttachAll(t.Context(), []Source{many[8], src}, AttachOptions{})
	qt.Assert(t, qt.ErrorIs(err, hook.ErrIncompatible))
	s.wantRun(t, 0, 1, 2, 3, 4, 5, 6, 7)

	_, _, err = s.AttachAll(t.Context(), many[8:], AttachOptions{})
	qt.Assert(t, qt.IsNil(err))
	s.wantRun(t, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
	qt.Assert(t, qt.IsNil(s.DetachAll(t.Context())))
	s.wantRun(t)
}

// The kernel cuts names at 15 characters, where these are alike; a chain has them
// whole.
func TestLongNames(t *testing.T) {
	needsFreplace(t)
	s := newScene(t)
	for _, name := range []string{"ldt_a_long_name_that_is_cut_2", "ldt_a_long_name_that_is_cut_1"} {
		_, _, err := s.Attach(t.Context(), s.sourceOf(t, 1, pass, name), at(50))
		qt.Assert(t, qt.IsNil(err))
	}
	c := s.read(t)
	qt.Assert(t, qt.DeepEquals(names(c), []string{"ldt_a_long_name_that_is_cut_1", "ldt_a_long_name_that_is_cut_2"}))
	qt.Assert(t, qt.IsNil(s.Detach(t.Context(), "ldt_a_long_name_that_is_cut_2")))
	qt.Assert(t, qt.DeepEquals(names(s.read(t)), []string{"ldt_a_long_name_that_is_cut_1"}))
	qt.Assert(t, qt.IsNil(s.DetachAll(t.Context())))
}

// Verdicts are libxdp's: of one program its own, of several PASS where the last
// one's goes on.
func TestVerdicts(t *testing.T) {
	needsFreplace(t)
	s := newScene(t)
	onDrop := at(10)
	onDrop.ContinueOn = hook.SetOf(hook.Drop)
	attach := func(n int) {
		_, _, err := s.Attach(t.Context(), s.sourceOf(t, n, drop, tracerName(n)), onDrop)
		qt.Assert(t, qt.IsNil(err))
	}
	attach(1)
	qt.Assert(t, qt.Equals(s.Passed(t, port, 5), 0))
	attach(2)
	s.wantRun(t, 1, 2)
	qt.Assert(t, qt.Equals(s.Passed(t, port, 5), 5))
	qt.Assert(t, qt.IsNil(s.Set(t.Context(), "ldt_trace_2", hook.Settings{ContinueOn: hook.SetOf(hook.Pass)})))
	qt.Assert(t, qt.Equals(s.Passed(t, port, 5), 0))
	qt.Assert(t, qt.IsNil(s.DetachAll(t.Context())))
	qt.Assert(t, qt.Equals(s.Passed(t, port, 5), 5))
}

// A mode is asked for when a chain is started, and kept.
func TestModes(t *testing.T) {
	needsFreplace(t)
	for _, mode := range []hook.Mode{hook.ModeNative, hook.ModeGeneric} {
		s := newScene(t)
		o := at(1)
		o.Mode = mode
		qt.Assert(t, qt.Equals(s.join(t, 1, o).Mode, mode))
		qt.Assert(t, qt.Equals(s.join(t, 2, at(2)).Mode, mode))
		s.join(t, 3, o)
		o.Mode = hook.ModeNative + hook.ModeGeneric - mode
		_, _, err := s.Attach(t.Context(), s.source(t, 4), o)
		qt.Assert(t, qt.ErrorIs(err, hook.ErrIncompatible))
		s.wantRun(t, 1, 3, 2)
		qt.Assert(t, qt.IsNil(s.Detach(t.Context(), "ldt_trace_2")))
		qt.Assert(t, qt.Equals(s.read(t).Mode, mode))
		qt.Assert(t, qt.IsNil(s.DetachAll(t.Context())))
	}
}

// A dispatcher takes multi-buffer packets when all its members do.
func TestFrags(t *testing.T) {
	needsFreplace(t)
	s := newScene(t)
	frags := testenv.Frags()
	c := s.join(t, 1, at(1), frags)
	supported := c.Config.Frags // Linux 5.18
	if !supported {
		if p, err := ebpf.NewProgram(testenv.VerdictSpec("ldt_frags", pass, frags)); err == nil {
			p.Close()
			t.Fatal("this kernel has frags, and the dispatcher does not use them")
		}
	}
	qt.Assert(t, qt.Equals(s.join(t, 2, at(2), frags).Config.Frags, supported))
	c = s.join(t, 3, at(3))
	qt.Assert(t, qt.IsFalse(c.Config.Frags))
	qt.Assert(t, qt.IsTrue(c.Members[0].Frags))
	qt.Assert(t, qt.IsFalse(c.Members[2].Frags))
	qt.Assert(t, qt.DeepEquals(s.read(t), c))
	s.wantRun(t, 1, 2, 3)
	qt.Assert(t, qt.IsNil(s.Detach(t.Context(), "ldt_trace_3")))
	qt.Assert(t, qt.Equals(s.read(t).Config.Frags, supported))
	s.wantRun(t, 1, 2)
	qt.Assert(t, qt.IsNil(s.DetachAll(t.Context())))
}

// infoOfLinks tells whether links say what they are attached to (Linux 5.13).
func infoOfLinks(t *testing.T, c *Chain) bool {
	t.Helper()
	l, err := link.LoadPinnedLink(filepath.Join(c.Folder, linkPin(0)), nil)
	qt.Assert(t, qt.IsNil(err))
	defer l.Close()
	info, err := l.Info()
	qt.Assert(t, qt.IsNil(err))
	return info.Tracing().TargetObjectId != 0
}

// Members are found by their links where pins are missing.
func TestHalfThePins(t *testing.T) {
	needsFreplace(t)
	s := newScene(t)
	s.join(t, 1, at(1))
	s.join(t, 2, at(2))
	c := s.join(t, 3, at(3))
	byLink := infoOfLinks(t, c)

	// A program's pin is gone: its link still runs it.
	qt.Assert(t, qt.IsNil(os.Remove(filepath.Join(c.Folder, progPin(0)))))
	s.wantTrace(t, 1, 2, 3)
	qt.Assert(t, qt.DeepEquals(s.read(t).Members, c.Members))

	// A link's pin is gone, and with it the link; the program is linked again by
	// the next change.
	qt.Assert(t, qt.IsNil(os.Remove(filepath.Join(c.Folder, linkPin(1)))))
	s.waitForTrace(t, 1, 3)
	got := s.read(t)
	qt.Assert(t, qt.IsTrue(got.Members[1].Missing))
	qt.Assert(t, qt.Equals(got.Members[1].Program.ID, c.Members[1].Program.ID))
	s.join(t, 4, at(4))
	s.wantRun(t, 1, 2, 3, 4)

	// Both are gone.
	c = s.read(t)
	qt.Assert(t, qt.IsNil(os.Remove(filepath.Join(c.Folder, progPin(3)))))
	held, err := link.LoadPinnedLink(filepath.Join(c.Folder, linkPin(3)), nil)
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.IsNil(os.Remove(filepath.Join(c.Folder, linkPin(3)))))
	s.wantTrace(t, 1, 2, 3, 4)
	qt.Assert(t, qt.Equals(s.read(t).Members[3].Missing, !byLink))
	held.Close()
	s.waitForTrace(t, 1, 2, 3)
	got = s.read(t)
	qt.Assert(t, qt.IsTrue(got.Members[3].Missing))
	qt.Assert(t, qt.Equals(got.Members[3].Name, ""))
	qt.Assert(t, qt.Equals(got.Members[3].Priority, 4))
	qt.Assert(t, qt.IsNil(s.Set(t.Context(), "ldt_trace_3", hook.Settings{Priority: 1})))
	s.wantRun(t, 1, 3, 2)
	qt.Assert(t, qt.IsNil(s.DetachAll(t.Context())))
	s.wantRun(t)
}

// waitForTrace waits until the kernel has let go of a link.
func (s *scene) waitForTrace(t *testing.T, numbers ...int) {
	t.Helper()
	for range 100 {
		s.trace.Reset(t)
		s.Send(t, port, 1)
		if len(s.trace.Last(t)) == len(numbers) {
			break
		}
	}
	s.wantTrace(t, numbers...)
}

// A chain whose pins are in another bpffs is shown, but only taken off as a whole.
func TestPinsElsewhere(t *testing.T) {
	needsFreplace(t)
	s := newScene(t)
	c := s.join(t, 1, at(1))
	byLink := infoOfLinks(t, c)
	other := *s
	other.BPFFS = testenv.BPFFS(t)
	seen := other.read(t)
	qt.Assert(t, qt.Equals(seen.Folder, ""))
	if !byLink {
		t.Log("links of this kernel do not say what they are attached to")
		qt.Assert(t, qt.IsTrue(seen.Members[0].Missing))
	} else {
		qt.Assert(t, qt.DeepEquals(seen.Members, c.Members))
		_, _, err := other.Attach(t.Context(), s.source(t, 2), AttachOptions{})
		qt.Assert(t, qt.ErrorIs(err, hook.ErrBusy))
		qt.Assert(t, qt.ErrorMatches(err, `attach xdp veth1: the chain runs, but its pins are not in .*`))
		qt.Assert(t, qt.ErrorIs(other.Set(t.Context(), "ldt_trace_1", hook.Settings{Priority: 4}), hook.ErrBusy))
		s.wantRun(t, 1)
	}
	qt.Assert(t, qt.IsNil(other.DetachAll(t.Context())))
	s.wantTrace(t)

	// What stays there is found to be on no device.
	removed, err := s.Clean(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.DeepEquals(removed, []string{c.Folder}))
	s.wantPins(t)
}

// Two devices of the same index in two namespaces share a bpffs: neither takes
// the other's pins, not even to clean.
func TestSameIndex(t *testing.T) {
	needsFreplace(t)
	const index = 4711
	a := newScene(t)
	p := testenv.NewPairOpts(t, testenv.PairOptions{ServerIfindex: index})
	q := testenv.NewPairOpts(t, testenv.PairOptions{ServerIfindex: index})
	b := &scene{p, Device{p.ServerDev, p.Server.Name, a.BPFFS}, testenv.NewTrace(t, port)}
	c := &scene{q, Device{q.ServerDev, q.Server.Name, a.BPFFS}, testenv.NewTrace(t, port)}
	b.join(t, 1, at(1))
	c.join(t, 2, at(1))
	b.join(t, 3, at(3))
	c.join(t, 4, at(4))
	b.wantTrace(t, 1, 3)
	c.wantTrace(t, 2, 4)
	qt.Assert(t, qt.HasLen(a.pinned(t), 2*5))
	for _, d := range []Device{b.Device, c.Device, {NetNS: a.NetNS, BPFFS: a.BPFFS}} {
		removed, err := d.Clean(t.Context())
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.HasLen(removed, 0))
	}
	qt.Assert(t, qt.IsNil(b.Detach(t.Context(), "ldt_trace_1")))
	b.wantTrace(t, 3)
	c.wantTrace(t, 2, 4)
	qt.Assert(t, qt.IsNil(b.DetachAll(t.Context())))
	c.wantRun(t, 2, 4)
	qt.Assert(t, qt.IsNil(c.DetachAll(t.Context())))
	a.wantPins(t)
}

// Of a device that is gone only the pins are left.
func TestDeviceGone(t *testing.T) {
	needsFreplace(t)
	s := newScene(t)
	c := s.join(t, 1, at(1))
	gone := Device{NetNS: s.Client.Name, BPFFS: s.BPFFS}
	removed, err := gone.Clean(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.HasLen(removed, 0))
	s.Server.IP(t, "link", "del", s.ServerDev)
	removed = nil
	for try := 0; len(removed) == 0 && try < 100; try++ { // the kernel frees the device in its own time
		removed, err = gone.Clean(t.Context())
		qt.Assert(t, qt.IsNil(err))
	}
	qt.Assert(t, qt.DeepEquals(removed, []string{c.Folder}))
	qt.Assert(t, qt.HasLen(s.pinned(t), 0))
}

// A dispatcher that somebody has open may be on its way to a device.
func TestCleanLeavesWhatIsOpen(t *testing.T) {
	needsFreplace(t)
	s := newScene(t)
	b, err := s.Build(t.Context(), []Incoming{{Source: s.source(t, 1), Priority: 3}, {Source: s.source(t, 2)}}, BuildOptions{Version: 2})
	qt.Assert(t, qt.IsNil(err))
	b.locked.unlock() // as libxdp does
	removed, err := s.Clean(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.HasLen(removed, 0))
	// What is forgotten is not.
	b.parts.close()
	b.join.close()
	removed, err = s.Clean(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.DeepEquals(removed, []string{b.Chain.Folder}))
	qt.Assert(t, qt.HasLen(s.pinned(t), 0))
}

// A chain is built for somebody else to attach.
func TestBuild(t *testing.T) {
	needsFreplace(t)
	s := newScene(t)
	incoming := func() []Incoming {
		return []Incoming{{Source: s.source(t, 1), Priority: 60}, {Source: s.source(t, 2), ContinueOn: hook.SetOf(hook.Drop)}}
	}
	b, err := s.Build(t.Context(), incoming(), BuildOptions{})
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.HasLen(s.pinned(t), 5))
	qt.Assert(t, qt.IsNil(b.Discard()))
	qt.Assert(t, qt.HasLen(s.pinned(t), 0))

	b, err = s.Build(t.Context(), incoming(), BuildOptions{Version: 2})
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.DeepEquals(names(b.Chain), []string{tracerName(2), tracerName(1)}))
	s.replace(t, b.Dispatcher, nil, hook.ModeAuto)
	qt.Assert(t, qt.IsNil(b.Commit()))
	s.wantTrace(t, 2)
	qt.Assert(t, qt.Equals(s.read(t).Config.Version, 2))
	s.wantPins(t)
	qt.Assert(t, qt.IsNil(s.Set(t.Context(), "ldt_trace_2", hook.Settings{ContinueOn: hook.SetOf(hook.Pass)})))
	s.wantRun(t, 2, 1)

	prog := s.read(t).Dispatcher.ID
	p, err := ebpf.NewProgramFromID(ebpf.ProgramID(prog))
	qt.Assert(t, qt.IsNil(err))
	s.replace(t, nil, p, hook.ModeAuto)
	p.Close()
	qt.Assert(t, qt.IsNil(Remove(t.Context(), s.BPFFS, s.ServerIfindex, ebpf.ProgramID(prog))))
	qt.Assert(t, qt.IsNil(Remove(t.Context(), s.BPFFS, s.ServerIfindex, ebpf.ProgramID(prog))))
	qt.Assert(t, qt.HasLen(s.pinned(t), 0))
}

// What Plan says is what Attach does.
func TestPlan(t *testing.T) {
	needsFreplace(t)
	s := newScene(t)
	s.join(t, 1, at(10))
	s.join(t, 3, at(30))
	plan, err := s.Plan(t.Context(), s.source(t, 2), at(20))
	qt.Assert(t, qt.IsNil(err))
	s.wantRun(t, 1, 3)
	c := s.join(t, 2, at(20))
	qt.Assert(t, qt.DeepEquals(names(plan), names(c)))
	qt.Assert(t, qt.DeepEquals(plan.Config, c.Config))
	qt.Assert(t, qt.Equals(plan.Members[1].Program.ID, 0))
	qt.Assert(t, qt.Equals(plan.Members[2].Program.ID, c.Members[2].Program.ID))
	qt.Assert(t, qt.IsNil(s.DetachAll(t.Context())))
}
