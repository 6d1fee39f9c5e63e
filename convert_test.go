package dispatcher_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// typed gives the program of a collection the type that libxdp's dispatcher wants.
func typed(prog *ebpf.ProgramSpec) *ebpf.CollectionSpec {
	prog.Instructions = testenv.Typed(prog.Name, prog.Instructions)
	return &ebpf.CollectionSpec{Programs: map[string]*ebpf.ProgramSpec{prog.Name: prog}}
}

// tracerSource is a tracer that is yet to be loaded.
func (s *scene) tracerSource(n, verdict int) dispatcher.Source {
	return dispatcher.Spec(typed(s.trace.Spec(n, verdict)), dispatcher.LoadOptions{})
}

func tracerRef(n int) string { return fmt.Sprintf("ldt_trace_%d", n) }

// joinLibxdp makes a tracer a member of the chain of libxdp, which it starts if
// there is none.
func (s *scene) joinLibxdp(t testing.TB, n, verdict, prio int) *dispatcher.Link {
	t.Helper()
	link, err := dispatcher.Attach(t.Context(), s.target, s.tracerSource(n, verdict), dispatcher.Options{
		Settings: priority(prio), Persistent: true, Style: hook.StyleLibxdp, BPFFS: s.bpffs,
	})
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { link.Close() })
	return link
}

func (s *scene) convert(t testing.TB, to hook.Style, numbers ...int) *hook.Chain {
	t.Helper()
	o := dispatcher.ConvertOptions{BPFFS: s.bpffs, Programs: map[hook.Ref]dispatcher.Source{}}
	for _, n := range numbers {
		o.Programs[hook.Ref(tracerRef(n))] = s.tracerSource(n, pass)
	}
	c, err := dispatcher.Convert(t.Context(), s.target, to, o)
	qt.Assert(t, qt.IsNil(err))
	return c
}

// wantNoDispatchers checks that no pins of libxdp's protocol are left.
func (s *scene) wantNoDispatchers(t testing.TB) {
	t.Helper()
	left, err := filepath.Glob(s.bpffs + "/xdp/[ds]*-*") // dispatch-1-2, slot-3
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.HasLen(left, 0))
}

// A member of a chain of libxdp has the same verbs as one of ours, but belongs to
// nobody.
func TestLibxdpMember(t *testing.T) {
	testenv.NeedFreplace(t)
	s := newScene(t)
	one := s.joinLibxdp(t, 1, pass, 10)
	s.wantRun(t, 1)
	// Without a style: the chain that is there is joined.
	two, err := dispatcher.Attach(t.Context(), s.target, s.tracerSource(2, pass), dispatcher.Options{Persistent: true, BPFFS: s.bpffs})
	qt.Assert(t, qt.IsNil(err))
	defer two.Close()
	s.wantRun(t, 1, 2)

	c := s.read(t)
	qt.Check(t, qt.Equals(c.Style, hook.StyleLibxdp))
	qt.Check(t, qt.IsFalse(c.Ours()))
	qt.Check(t, qt.IsFalse(c.Protected()))
	info, err := two.Info(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.DeepEquals(*info, c.Members[1]))
	qt.Check(t, qt.Equals(info.Kind, hook.KindLibxdp))
	qt.Check(t, qt.IsTrue(info.Persistent))

	qt.Assert(t, qt.IsNil(one.Set(t.Context(), priority(60))))
	s.wantRun(t, 2, 1)
	qt.Assert(t, qt.IsNil(two.Set(t.Context(), hook.Settings{ContinueOn: hook.SetOf(hook.TX)})))
	s.wantRun(t, 2)
	qt.Assert(t, qt.IsNil(two.Set(t.Context(), hook.Settings{ContinueOn: hook.SetOf(hook.Pass, hook.TX)})))
	qt.Assert(t, qt.IsNil(two.Update(t.Context(), s.tracerSource(3, drop))))
	s.wantRun(t, 3)
	qt.Check(t, qt.IsTrue(s.drops(t)))
	info, err = two.Info(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(info.Name, tracerRef(3)))
	prog, err := two.Program()
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(uint32(idOf(t, prog)), info.Program.ID))
	prog.Close()

	qt.Check(t, qt.IsNil(two.Pin(t.Context())))
	qt.Check(t, qt.ErrorIs(two.Unpin(t.Context()), dispatcher.ErrUsage))
	qt.Check(t, qt.ErrorIs(two.Move(t.Context(), hook.Position{First: true}), dispatcher.ErrUsage))
	qt.Check(t, qt.ErrorIs(two.Set(t.Context(), hook.Settings{OnMissing: hook.MissingDrop}), dispatcher.ErrUsage))

	// It stays when its link is closed, and can be opened by anybody.
	qt.Assert(t, qt.IsNil(two.Close()))
	s.wantRun(t, 3)
	again := s.open(t, tracerRef(3))
	qt.Assert(t, qt.IsNil(again.Detach(t.Context())))
	s.wantRun(t, 1)
	_, err = again.Info(t.Context())
	qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
	qt.Assert(t, qt.IsNil(again.Close()))

	// Netlink takes off what nobody owns.
	s.Server.IP(t, "link", "set", "dev", s.ServerDev, "xdp", "off")
	_, err = one.Chain(t.Context())
	qt.Assert(t, qt.IsNil(err))
	_, err = one.Info(t.Context())
	qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
	qt.Check(t, qt.ErrorIs(one.Set(t.Context(), priority(1)), fs.ErrNotExist))
	s.wantFree(t)

	// The next change takes its pins away.
	s.joinLibxdp(t, 4, pass, 10)
	s.detach(t, tracerRef(4))
	s.wantFree(t)
	s.wantNoDispatchers(t)
}

// What is in a chain of libxdp is found among all that there is, in all namespaces.
func TestLibxdpListed(t *testing.T) {
	testenv.NeedFreplace(t)
	s := newScene(t)
	s.joinLibxdp(t, 1, pass, 10)
	chains, err := dispatcher.List(t.Context(), dispatcher.ListOptions{BPFFS: s.bpffs})
	qt.Assert(t, qt.IsNil(err))
	i := slices.IndexFunc(chains, func(c hook.Chain) bool {
		return c.Style == hook.StyleLibxdp && c.Target == s.ServerDev && c.Ifindex == s.ServerIfindex
	})
	qt.Assert(t, qt.IsTrue(i >= 0))
	qt.Check(t, qt.Equals(summary(&chains[i]), tracerRef(1)+"*(libxdp)"))

	held, err := dispatcher.HoldersIn(t.Context(), chains[i:i+1], dispatcher.HoldersOptions{BPFFS: s.bpffs})
	qt.Assert(t, qt.IsNil(err))
	var pins []string
	for _, h := range held[0] {
		for _, holder := range h.Holders.Pins {
			pins = append(pins, holder.Path)
		}
	}
	qt.Check(t, qt.IsTrue(slices.ContainsFunc(pins, func(p string) bool { return strings.HasSuffix(p, "/prog0-link") })), qt.Commentf("%q", pins))
	s.clear(t)
	s.wantNoDispatchers(t)
}

// A chain goes over to the other style and back, and packets meet the same members
// in the same order.
func TestConvert(t *testing.T) {
	testenv.NeedFreplace(t)
	s := newScene(t)
	s.joinLibxdp(t, 2, pass, 70)
	s.joinLibxdp(t, 1, pass, 10)
	s.joinLibxdp(t, 3, pass, 90)
	s.wantRun(t, 1, 2, 3)
	before := s.read(t)

	c := s.convert(t, hook.StyleOwned, 1, 2, 3)
	qt.Check(t, qt.IsTrue(c.Protected()))
	s.wantRun(t, 1, 2, 3)
	s.wantChain(t, "ldt_trace_1* ldt_trace_2* ldt_trace_3*")
	for i, m := range s.read(t).Members {
		qt.Check(t, qt.Equals(m.Priority, before.Members[i].Priority))
		qt.Check(t, qt.Equals(m.ContinueOn, before.Members[i].ContinueOn))
	}
	s.wantNoDispatchers(t)
	_, err := s.Server.TryIP("link", "set", "dev", s.ServerDev, "xdp", "off")
	qt.Check(t, qt.IsNotNil(err))

	// More join, of the same priority, which here is in the order of their coming.
	for _, n := range []int{5, 4} {
		link, err := dispatcher.Attach(t.Context(), s.target, s.tracerSource(n, pass), dispatcher.Options{Settings: priority(95), Persistent: true, BPFFS: s.bpffs})
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.IsNil(link.Close()))
	}
	s.wantRun(t, 1, 2, 3, 5, 4)
	c = s.convert(t, hook.StyleLibxdp, 1, 2, 3, 4, 5)
	qt.Check(t, qt.Equals(c.Style, hook.StyleLibxdp))
	s.wantRun(t, 1, 2, 3, 5, 4)
	s.wantNoPins(t)

	// Without a gap, and protected later.
	o := dispatcher.ConvertOptions{NoGap: true, BPFFS: s.bpffs, Programs: map[hook.Ref]dispatcher.Source{}}
	for _, m := range s.read(t).Members {
		var n int
		fmt.Sscanf(m.Name, "ldt_trace_%d", &n)
		o.Programs[hook.ProgramRef(m.Program.ID)] = s.tracerSource(n, pass)
	}
	c, err = dispatcher.Convert(t.Context(), s.target, hook.StyleOwned, o)
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.IsFalse(c.Protected()))
	s.wantRun(t, 1, 2, 3, 5, 4)
	link, err := dispatcher.Adopt(t.Context(), s.target, dispatcher.AdoptOptions{Options: dispatcher.Options{Persistent: true, BPFFS: s.bpffs}})
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.IsNil(link.Close()))
	s.wantRun(t, 1, 2, 3, 5, 4)
	qt.Check(t, qt.IsTrue(s.read(t).Protected()))
	s.wantNoDispatchers(t)
	s.clear(t)
	s.wantFree(t)
}

// While a chain changes its style nothing is attached for a moment, and the length
// of that is told here; without a gap no packet gets through.
func TestConvertGap(t *testing.T) {
	testenv.NeedFreplace(t)
	s := newBusyScene(t)
	drop := func() dispatcher.Source {
		return dispatcher.Spec(typed(testenv.DropUDPPortSpec("ldt_drop", port)), dispatcher.LoadOptions{})
	}
	link, err := dispatcher.Attach(t.Context(), s.target, drop(), dispatcher.Options{Style: hook.StyleLibxdp, Persistent: true, BPFFS: s.bpffs})
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.IsNil(link.Close()))
	convert := func(to hook.Style, noGap bool) (through uint64) {
		t.Helper()
		flood := s.Flood(t, port, port+1)
		soon(t, func() bool { _, marker := flood.Marker(); return marker > 0 })
		before, start := flood.Sent(), time.Now()
		_, err := dispatcher.Convert(t.Context(), s.target, to, dispatcher.ConvertOptions{
			NoGap: noGap, BPFFS: s.bpffs, Programs: map[hook.Ref]dispatcher.Source{"ldt_drop": drop()},
		})
		took, sent := time.Since(start), flood.Sent()-before
		qt.Assert(t, qt.IsNil(err))
		all, through := flood.Stop()
		gap := time.Duration(float64(took) * float64(through) / float64(max(sent, 1)))
		t.Logf("to %s, no gap %v: took %v; of %d datagrams %d got through, so that the gap was about %v", to, noGap, took, all, through, gap)
		return through
	}
	for range 3 {
		convert(hook.StyleOwned, false)
		convert(hook.StyleLibxdp, false)
	}
	qt.Check(t, qt.Equals(convert(hook.StyleOwned, true), 0))
	s.clear(t)
	flood := s.Flood(t, port)
	soon(t, func() bool { return flood.Received() > 0 })
	flood.Stop()
	s.wantFree(t)
	s.wantNoDispatchers(t)
}

// The maps of a member are those that it had.
func TestConvertKeepsMaps(t *testing.T) {
	testenv.NeedFreplace(t)
	s := newScene(t)
	counting := func() dispatcher.Source {
		spec := countingSpec()
		spec.Programs = typed(spec.Programs["ldt_counting"]).Programs
		return dispatcher.Spec(spec, dispatcher.LoadOptions{})
	}
	link, err := dispatcher.Attach(t.Context(), s.target, counting(), dispatcher.Options{Style: hook.StyleLibxdp, Persistent: true, BPFFS: s.bpffs})
	qt.Assert(t, qt.IsNil(err))
	counted := func() uint64 {
		t.Helper()
		prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(s.read(t).Members[0].Program.ID))
		qt.Assert(t, qt.IsNil(err))
		defer prog.Close()
		maps := testenv.Maps(t, prog)
		qt.Assert(t, qt.HasLen(maps, 1))
		defer maps[0].Close()
		b, err := maps[0].LookupBytes(uint32(0))
		qt.Assert(t, qt.IsNil(err))
		return binary.NativeEndian.Uint64(b)
	}
	s.Send(t, port, 10)
	qt.Assert(t, qt.Equals(counted(), uint64(10)))
	qt.Assert(t, qt.IsNil(link.Close()))
	for _, to := range []hook.Style{hook.StyleOwned, hook.StyleLibxdp, hook.StyleOwned} {
		before := counted()
		_, err := dispatcher.Convert(t.Context(), s.target, to, dispatcher.ConvertOptions{
			BPFFS: s.bpffs, Programs: map[hook.Ref]dispatcher.Source{"ldt_counting": counting()},
		})
		qt.Assert(t, qt.IsNil(err))
		s.Send(t, port, 10)
		qt.Assert(t, qt.Equals(counted(), before+10), qt.Commentf("%s", to))
	}
	s.clear(t)
	s.wantFree(t)
	s.wantNoDispatchers(t)
}

// What cannot go over stays as it is.
func TestConvertRefused(t *testing.T) {
	testenv.NeedFreplace(t)
	s := newScene(t)
	convert := func(to hook.Style, programs map[hook.Ref]dispatcher.Source) error {
		_, err := dispatcher.Convert(t.Context(), s.target, to, dispatcher.ConvertOptions{BPFFS: s.bpffs, Programs: programs})
		return err
	}
	qt.Check(t, qt.ErrorIs(convert(hook.StyleOwned, nil), fs.ErrNotExist))
	qt.Check(t, qt.ErrorIs(convert("mine", nil), dispatcher.ErrUsage))

	s.joinLibxdp(t, 1, pass, 10)
	qt.Check(t, qt.ErrorIs(convert(hook.StyleLibxdp, nil), fs.ErrExist))
	qt.Check(t, qt.ErrorIs(convert(hook.StyleOwned, map[hook.Ref]dispatcher.Source{"nosuch": s.tracerSource(2, pass), "ldt_trace_1": s.tracerSource(1, pass)}), fs.ErrNotExist))
	frags := typed(s.trace.Spec(2, pass))
	frags.Programs["ldt_trace_2"].Instructions = asm.Instructions{asm.Return()} // R0 has no value
	refused := dispatcher.Spec(frags, dispatcher.LoadOptions{})
	var verifier *dispatcher.VerifierRefusal
	qt.Check(t, qt.ErrorAs(convert(hook.StyleOwned, map[hook.Ref]dispatcher.Source{"ldt_trace_1": refused}), &verifier))
	s.wantRun(t, 1)
	s.clear(t)

	for n := range 11 {
		s.attach(t, s.tracer(t, n, pass), dispatcher.Options{Name: fmt.Sprint(n), Persistent: true})
	}
	qt.Check(t, qt.ErrorIs(convert(hook.StyleLibxdp, nil), dispatcher.ErrChainFull))
	s.detach(t, "10")
	// Loaded with an expected attach type, it cannot be called from there.
	err := convert(hook.StyleLibxdp, nil)
	qt.Check(t, qt.ErrorIs(err, dispatcher.ErrIncompatible))
	s.wantRun(t, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
	s.clear(t)
	s.attach(t, s.tracer(t, 1, pass), dispatcher.Options{Name: "1"})
	qt.Check(t, qt.ErrorIs(convert(hook.StyleLibxdp, nil), dispatcher.ErrBusy))
	s.wantRun(t, 1)
	s.clear(t)
	s.wantFree(t)
	s.wantNoDispatchers(t)
}

// A process may be killed while it moves a chain over: the chain is then the old
// one or the new one, or, in the gap, none; the next one can go on.
func TestConvertCrash(t *testing.T) {
	testenv.NeedFreplace(t)
	for _, to := range []hook.Style{hook.StyleOwned, hook.StyleLibxdp} {
		t.Run(string(to), func(t *testing.T) {
			s := newScene(t)
			for n := 1; s.diesConverting(t, to, n); n++ {
			}
		})
	}
}

// diesConverting lets a process die at the n-th step of a conversion, and returns
// false when there are fewer.
func (s *scene) diesConverting(t *testing.T, to hook.Style, n int) bool {
	t.Helper()
	from := hook.StyleLibxdp
	if to == from {
		from = hook.StyleOwned
	}
	begin := newApp(t)
	qt.Assert(t, qt.IsNil(begin.do(t, s.command(command{Op: "libxdp", Maps: true}))))
	if from == hook.StyleOwned {
		qt.Assert(t, qt.IsNil(begin.do(t, s.command(command{Op: "convert", Member: string(from)}))))
	}
	begin.Kill()
	qt.Assert(t, qt.Equals(s.read(t).Style, from))

	victim := newApp(t)
	got := victim.try(t, s.command(command{Op: "convert", Member: string(to), DieAt: n}))
	victim.Kill()
	at := qt.Commentf("died at step %d, %q", n, got.Died)
	if got.Died == "" {
		qt.Assert(t, qt.IsNil(got.err()))
		qt.Assert(t, qt.Equals(s.read(t).Style, to), at)
	}
	// A link that was not pinned goes in the kernel's own time, and a slot with it.
	soon(t, func() bool {
		c := s.read(t)
		return len(c.Members) == 0 || len(c.Members) == 1 && c.Members[0].State == hook.StateRunning
	})
	c := s.read(t)
	if len(c.Members) == 0 {
		gap := strings.Contains(got.Died, "in the gap") || strings.Contains(got.Died, "after the gap") || strings.HasPrefix(got.Died, "move pins")
		qt.Check(t, qt.IsTrue(gap), at)
	} else {
		qt.Check(t, qt.Equals(c.Members[0].Name, "ldt_counting"), at)
		qt.Check(t, qt.IsTrue(c.Style == from || c.Style == to), at)
	}

	// The next one can do it, or begin anew.
	next := newApp(t)
	op := command{Op: "convert", Member: string(to)}
	if len(c.Members) == 0 {
		op = command{Op: "libxdp", Maps: true}
	}
	if err := next.do(t, s.command(op)); !errors.Is(err, fs.ErrExist) {
		qt.Assert(t, qt.IsNil(err), at)
	}
	next.Kill()
	s.clear(t)
	_, err := dispatcher.Recover(t.Context(), dispatcher.RecoverOptions{BPFFS: s.bpffs})
	qt.Assert(t, qt.IsNil(err), at)
	s.wantFree(t)
	s.wantNoDispatchers(t)
	return got.Died != ""
}

func init() {
	source := func() dispatcher.Source {
		spec := countingOn(hook.XDP)
		spec.Programs = typed(spec.Programs["ldt_counting"]).Programs
		return dispatcher.Spec(spec, dispatcher.LoadOptions{})
	}
	operations["libxdp"] = func(a *appState, ctx context.Context, c command) error {
		return a.keep(dispatcher.Attach(ctx, c.Target, source(), dispatcher.Options{Style: hook.StyleLibxdp, Persistent: true, BPFFS: c.BPFFS}))
	}
	operations["convert"] = func(_ *appState, ctx context.Context, c command) error {
		_, err := dispatcher.Convert(ctx, c.Target, hook.Style(c.Member), dispatcher.ConvertOptions{
			BPFFS: c.BPFFS, Programs: map[hook.Ref]dispatcher.Source{"ldt_counting": source()},
		})
		return err
	}
}

// Members of an owned chain whose programs were loaded without an expected attach
// type can be called from libxdp's dispatcher as they are (Linux 6.1).
func TestConvertLoadedPrograms(t *testing.T) {
	testenv.NeedFreplace(t)
	s := newScene(t)
	none := testenv.ExpectedAttachType(ebpf.AttachNone)
	for n := range 3 {
		s.attach(t, testenv.Load(t, s.trace.Spec(n, pass, none)), dispatcher.Options{Name: fmt.Sprint(n), Persistent: true}).Close()
	}
	s.wantRun(t, 0, 1, 2)
	_, err := dispatcher.Convert(t.Context(), s.target, hook.StyleLibxdp, dispatcher.ConvertOptions{BPFFS: s.bpffs})
	if err != nil { // Linux 5.10
		qt.Check(t, qt.ErrorIs(err, dispatcher.ErrIncompatible))
		s.wantRun(t, 0, 1, 2)
		s.clear(t)
		s.wantFree(t)
		return
	}
	s.wantRun(t, 0, 1, 2)
	qt.Check(t, qt.Equals(s.read(t).Style, hook.StyleLibxdp))
	// Another change links what is there again.
	s.detach(t, tracerRef(1))
	s.wantRun(t, 0, 2)
	s.clear(t)
	s.wantFree(t)
	s.wantNoDispatchers(t)
}
