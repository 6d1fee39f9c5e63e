package chains

import (
	"fmt"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

var allVerdicts = []hook.Verdict{hook.Aborted, hook.Drop, hook.Pass, hook.TX, hook.Redirect}

// others is every verdict but v.
func others(v hook.Verdict) hook.VerdictSet {
	return hook.SetOf(allVerdicts...) &^ hook.SetOf(v)
}

// exits are the places where packets of a scene can end up.
type exits struct {
	*scene.Scene
	out        int // ifindex of the device to redirect to
	redirected func() int
	aborted    func() int
}

func newExits(t *testing.T, s *scene.Scene) *exits {
	t.Helper()
	e := &exits{Scene: s, aborted: countAborts(t)}

	// Frames that TX sends back and those that are redirected are seen in native mode only where
	// the other end of the wire has a program too.
	s.Client.Do(t, func() { scene.Hold(t, testenv.VerdictProgram(t, "ldt_peer", testenv.XDPPass), s.ClientIfindex) })
	beyond := testenv.NewNetNS(t)
	s.Server.IP(t, "link", "add", "out0", "up", "type", "veth", "peer", "name", "out1", "netns", beyond.Name)
	beyond.IP(t, "link", "set", "out1", "up")
	prog, redirected := testenv.CountProgram(t, "ldt_redirected", scene.Port, testenv.XDPDrop)
	s.Server.Do(t, func() { e.out = scene.IfindexOf(t, "out0") })
	beyond.Do(t, func() { scene.Hold(t, prog, scene.IfindexOf(t, "out1")) })
	e.redirected = redirected
	return e
}

// program gives every packet that verdict, and does what belongs to it.
func (e *exits) program(t *testing.T, v hook.Verdict) *ebpf.Program {
	t.Helper()
	spec := testenv.VerdictSpec("ldt_"+v.String(), int(v))
	if v == hook.Redirect {
		spec.Instructions = asm.Instructions{
			asm.Mov.Imm(asm.R1, int32(e.out)), asm.Mov.Imm(asm.R2, 0), asm.FnRedirect.Call(), asm.Return(),
		}
	}
	return testenv.Load(t, spec)
}

// fate sends packets and tells by what happens to them what the chain's verdict is.
func (e *exits) fate(t *testing.T) string {
	t.Helper()
	const n = 4
	redirected, aborted := e.redirected(), e.aborted()
	passed, returned := e.Passed(t, scene.Port, n), e.Returned(t, scene.Port, n)
	got := fmt.Sprintf("%d of %d passed, %d returned, %d of %d redirected", passed, n, returned, e.redirected()-redirected, 2*n)
	switch got {
	case "4 of 4 passed, 0 returned, 0 of 8 redirected":
		return "pass"
	case "0 of 4 passed, 4 returned, 0 of 8 redirected":
		return "tx"
	case "0 of 4 passed, 0 returned, 8 of 8 redirected":
		return "redirect"
	case "0 of 4 passed, 0 returned, 0 of 8 redirected":
		if e.aborted()-aborted >= 2*n {
			return "aborted"
		}
		return "drop"
	}
	return got
}

// The last member that ran gives the chain's verdict. For each pair of verdicts the first member either goes on on
// its own verdict only, or on all but that.
func TestVerdicts(t *testing.T) {
	scene.EachMode(t, func(t *testing.T, s *scene.Scene, mode hook.Mode) {
		e := newExits(t, s)
		var programs []*ebpf.Program
		for _, v := range allVerdicts {
			programs = append(programs, e.program(t, v))
		}
		first := s.Attach(t, programs[0], dispatcher.Options{Name: "first", Mode: mode, Priority: 10})
		second := s.Attach(t, programs[0], dispatcher.Options{Name: "second", Priority: 20})

		for _, v := range allVerdicts {
			qt.Assert(t, qt.IsNil(first.Update(t.Context(), dispatcher.Program(programs[v]))))
			for _, goesOn := range []bool{true, false} {
				set := others(v)
				if goesOn {
					set = hook.SetOf(v)
				}
				qt.Assert(t, qt.IsNil(first.Set(t.Context(), hook.Settings{ContinueOn: set})))
				for _, w := range allVerdicts {
					qt.Assert(t, qt.IsNil(second.Update(t.Context(), dispatcher.Program(programs[w]))))
					want := v
					if goesOn {
						want = w
					}
					qt.Check(t, qt.Equals(e.fate(t), want.String()), qt.Commentf("%v continues on %v, then %v", v, set, w))
				}
			}
		}
	})
}

// The last member ends the chain, whatever its set says.
func TestVerdictOfTheLastMember(t *testing.T) {
	scene.EachMode(t, func(t *testing.T, s *scene.Scene, mode hook.Mode) {
		e := newExits(t, s)
		for _, v := range allVerdicts {
			for _, set := range []hook.VerdictSet{hook.SetOf(v), others(v), hook.Never, hook.SetOf(allVerdicts...)} {
				l := s.Attach(t, e.program(t, v), dispatcher.Options{Name: "only", Mode: mode, ContinueOn: set})
				qt.Check(t, qt.Equals(e.fate(t), v.String()), qt.Commentf("continues on %v", set))
				qt.Assert(t, qt.IsNil(l.Detach(t.Context())))
			}
		}
	})
}

// Which member runs after which, with verdicts of every kind in the middle; the number is the member, the verdict its answer.
func TestContinueSets(t *testing.T) {
	any := hook.SetOf(allVerdicts...)
	scene.EachMode(t, func(t *testing.T, s *scene.Scene, mode hook.Mode) {
		for _, test := range []struct {
			name     string
			verdicts []hook.Verdict
			sets     []hook.VerdictSet
			ran      []int
			passes   bool
		}{
			{"pass is the default", []hook.Verdict{hook.Pass, hook.Pass, hook.Drop}, []hook.VerdictSet{0, 0, 0}, []int{0, 1, 2}, false},
			{"drop ends by default", []hook.Verdict{hook.Pass, hook.Drop, hook.Pass}, []hook.VerdictSet{0, 0, 0}, []int{0, 1}, false},
			{"never ends on pass", []hook.Verdict{hook.Pass, hook.Drop}, []hook.VerdictSet{hook.Never, 0}, []int{0}, true},
			{"never in the middle", []hook.Verdict{hook.Pass, hook.Pass, hook.Drop}, []hook.VerdictSet{0, hook.Never, 0}, []int{0, 1}, true},
			{"any goes on after drop", []hook.Verdict{hook.Drop, hook.Aborted, hook.Pass}, []hook.VerdictSet{any, any, any}, []int{0, 1, 2}, true},
			{"the last word may be worse", []hook.Verdict{hook.Drop, hook.Pass, hook.Aborted}, []hook.VerdictSet{any, any, 0}, []int{0, 1, 2}, false},
			{"a verdict that does not exist", []hook.Verdict{7, hook.Pass}, []hook.VerdictSet{any, 0}, []int{0}, false},
		} {
			var links []*dispatcher.Link
			for i, v := range test.verdicts {
				links = append(links, s.Attach(t, s.Tracer(t, i, int(v)), dispatcher.Options{
					Mode: mode, ContinueOn: test.sets[i],
				}))
			}
			qt.Check(t, qt.DeepEquals(s.Ran(t), test.ran), qt.Commentf("%s", test.name))
			qt.Check(t, qt.Equals(!s.Drops(t), test.passes), qt.Commentf("%s", test.name))
			for _, l := range links {
				qt.Assert(t, qt.IsNil(l.Detach(t.Context())))
			}
		}
	})
}

// A filter that runs before the decapsulator instead of after it filters nothing: lower priorities run first, and of
// equals the one that came first.
func TestOrder(t *testing.T) {
	scene.EachMode(t, func(t *testing.T, s *scene.Scene, mode hook.Mode) {
		var links []*dispatcher.Link
		for i, p := range []int{50, 10, hook.MaxPriority, 50, hook.MinPriority, 10, 0} { // 0 is 50
			links = append(links, s.Attach(t, s.Tracer(t, i, testenv.XDPPass), dispatcher.Options{Mode: mode, Priority: p}))
		}
		s.WantRun(t, 4, 1, 5, 0, 3, 6, 2)
		for i, m := range s.Read(t).Members {
			qt.Check(t, qt.Equals(m.Name, []string{
				"ldt_trace_4", "ldt_trace_1", "ldt_trace_5", "ldt_trace_0", "ldt_trace_3", "ldt_trace_6", "ldt_trace_2",
			}[i]))
		}
		// With a new priority a member goes behind its equals; with the same it stays.
		qt.Assert(t, qt.IsNil(links[0].Set(t.Context(), scene.Priority(10))))
		qt.Assert(t, qt.IsNil(links[3].Set(t.Context(), scene.Priority(50))))
		s.WantRun(t, 4, 1, 5, 0, 3, 6, 2)
		qt.Assert(t, qt.IsNil(links[4].Set(t.Context(), scene.Priority(50))))
		s.WantRun(t, 1, 5, 0, 3, 6, 4, 2)
	})
}

// IPv4 and IPv6 alike go through the chain, and what a member passes arrives unharmed.
func TestFilters(t *testing.T) {
	scene.EachMode(t, func(t *testing.T, s *scene.Scene, mode hook.Mode) {
		s.Attach(t, testenv.DropUDPPort(t, "ldt_drop_0", scene.Port), dispatcher.Options{Mode: mode})
		second := s.Attach(t, testenv.DropUDPPort(t, "ldt_drop_1", scene.Port+1), dispatcher.Options{})
		want := func(port, n int) {
			t.Helper()
			qt.Check(t, qt.Equals(s.Passed(t, port, 100), n))
			qt.Check(t, qt.Equals(s.Passed6(t, port, 100), n))
		}
		want(scene.Port, 0)
		want(scene.Port+1, 0)
		want(scene.Port+2, 100)
		qt.Assert(t, qt.IsNil(second.Detach(t.Context())))
		want(scene.Port, 0)
		want(scene.Port+1, 100)
	})
}

// The mode is the chain's: what the device shows, what Read shows, and what a member that joins may ask for.
func TestModes(t *testing.T) {
	scene.EachMode(t, func(t *testing.T, s *scene.Scene, mode hook.Mode) {
		s.Attach(t, s.Tracer(t, 1, testenv.XDPPass), dispatcher.Options{Mode: mode})
		s.Attach(t, s.Tracer(t, 2, testenv.XDPPass), dispatcher.Options{Mode: mode})
		s.Attach(t, s.Tracer(t, 3, testenv.XDPPass), dispatcher.Options{}) // auto: the chain's
		qt.Check(t, qt.Equals(s.Read(t).Mode, mode))
		word := map[hook.Mode]string{hook.ModeNative: "xdp ", hook.ModeGeneric: "xdpgeneric "}[mode]
		qt.Check(t, qt.StringContains(s.Server.IP(t, "link", "show", s.ServerDev), word))

		other := hook.ModeNative + hook.ModeGeneric - mode
		_, err := dispatcher.Attach(t.Context(), s.Target, dispatcher.Program(s.Tracer(t, 4, testenv.XDPPass)), dispatcher.Options{Mode: other, BPFFS: s.BPFFS})
		qt.Check(t, qt.ErrorIs(err, dispatcher.ErrIncompatible))
		qt.Check(t, qt.ErrorMatches(err, fmt.Sprintf(`attach xdp veth1: the chain is in %v mode, and all its members are; ask for %v or auto`, mode, mode)))
		s.WantRun(t, 1, 2, 3)
	})
}

// countAborts counts the packets on devices of this machine that XDP aborted, by the tracepoint
// that administrators look at for it. Nothing else here aborts any.
func countAborts(t *testing.T) func() int {
	t.Helper()
	counter, err := ebpf.NewMap(&ebpf.MapSpec{Name: "ldt_aborts", Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { counter.Close() })
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "ldt_exception", Type: ebpf.RawTracepoint, License: "GPL",
		Instructions: asm.Instructions{
			asm.LoadMem(asm.R1, asm.R1, 16, asm.DWord), // the third argument: the verdict
			asm.JNE.Imm32(asm.R1, int32(hook.Aborted), "other"),
			asm.LoadMapValue(asm.R1, counter.FD(), 0),
			asm.Mov.Imm(asm.R2, 1),
			asm.AddAtomic.Mem(asm.R1, asm.R2, asm.DWord, 0),
			asm.Mov.Imm(asm.R0, 0).WithSymbol("other"),
			asm.Return(),
		},
	})
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { prog.Close() })
	l, err := link.AttachRawTracepoint(link.RawTracepointOptions{Name: "xdp_exception", Program: prog})
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { l.Close() })
	return func() int {
		t.Helper()
		var n uint64
		qt.Assert(t, qt.IsNil(counter.Lookup(uint32(0), &n)))
		return int(n)
	}
}
