package libxdp

import (
	"errors"
	"io/fs"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// Members join, move, are replaced and leave; packets meet each chain.
func TestChange(t *testing.T) {
	testenv.NeedFreplace(t)
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

			// The name decides among equal priorities, not the time of joining.
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

// Several join together or not at all.
func TestAttachAll(t *testing.T) {
	testenv.NeedFreplace(t)
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

	// The kernel refuses one of them.
	bad := s.spec(9, pass, "ldt_bad")
	bad.Programs["ldt_bad"].Instructions = testenv.Typed("ldt_bad", asm.Instructions{asm.LoadMem(asm.R0, asm.R1, 4000, asm.Word), asm.Return()})
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

// The kernel cuts names at 15 characters, and these are equal up to there; the
// chain has whole names.
func TestLongNames(t *testing.T) {
	testenv.NeedFreplace(t)
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

// Verdicts are libxdp's: a single program's verdict is the chain's; with
// several the verdict is PASS where the last program's actions let the chain
// continue.
func TestVerdicts(t *testing.T) {
	testenv.NeedFreplace(t)
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

// A chain keeps the mode that it was started with.
func TestModes(t *testing.T) {
	testenv.NeedFreplace(t)
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

// A dispatcher accepts multi-buffer packets when all its members do.
func TestFrags(t *testing.T) {
	testenv.NeedFreplace(t)
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

// asking is a source that asks for settings.
type asking struct {
	Source
	settings hook.Settings
}

func (a asking) Settings() hook.Settings { return a.settings }

// Build makes a chain for another caller to attach.
func TestBuild(t *testing.T) {
	testenv.NeedFreplace(t)
	s := newScene(t)
	sources := func() []Source {
		return []Source{asking{s.source(t, 1), hook.Settings{Priority: 60}}, asking{s.source(t, 2), hook.Settings{ContinueOn: hook.SetOf(hook.Drop)}}}
	}
	b, err := s.Build(t.Context(), sources(), 0)
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.HasLen(s.pinned(t), 5))
	qt.Assert(t, qt.IsNil(b.Discard()))
	qt.Assert(t, qt.HasLen(s.pinned(t), 0))

	b, err = s.Build(t.Context(), sources(), 2)
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.DeepEquals(names(b.Chain), []string{tracerName(2), tracerName(1)}))
	s.replace(t, b.Dispatcher, nil, hook.ModeAuto)
	b.Commit()
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

// Attach does what Plan says.
func TestPlan(t *testing.T) {
	testenv.NeedFreplace(t)
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

// A dispatcher that is bound to its device stays bound, and its members too.
func TestDevBound(t *testing.T) {
	testenv.NeedFreplace(t)
	s := newScene(t)
	c := two(3)
	c.DevBound = true
	var prog *ebpf.Program
	var err error
	s.Server.Do(t, func() { prog, err = newDispatcher(c, s.ServerIfindex) })
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
		t.Skipf("needs programs that are bound to a veth, which this kernel has not (Linux 6.3): %v", err)
	}
	qt.Assert(t, qt.IsNil(err))
	s.replace(t, prog, nil, hook.ModeNative)
	prog.Close()
	s.join(t, 1, at(1))
	got := s.join(t, 2, at(2))
	qt.Assert(t, qt.IsTrue(got.Config.DevBound))
	for _, m := range got.Members {
		qt.Assert(t, qt.IsTrue(m.DevBound))
	}
	s.wantRun(t, 1, 2)
	qt.Assert(t, qt.IsNil(s.Detach(t.Context(), "ldt_trace_1")))
	qt.Assert(t, qt.IsTrue(s.read(t).Config.DevBound))
	s.wantRun(t, 2)
	qt.Assert(t, qt.IsNil(s.DetachAll(t.Context())))
}
