package chains

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// A sealed chain can be changed as any other.
func TestChangesWhileSealed(t *testing.T) {
	s := scene.NewSealScene(t)
	ctx := t.Context()
	s.Member(t, 1)
	s.Member(t, 2)
	s.Member(t, 3)
	s.Seal(t, "1 2 3")

	// Join, for good and for a while, and leave.
	s.Member(t, 4, 15)
	guest := s.Attach(t, s.Tracer(t, 5, scene.Pass), dispatcher.Options{Name: "5", Priority: 40})
	s.WantSealed(t, "1", "2", "3")
	s.WantRun(t, 1, 4, 2, 3, 5)
	s.Seal(t, "1 4 2 3 5!", `it is not pinned: .*`)
	s.WantRun(t, 1, 4, 2, 3, 5)
	qt.Assert(t, qt.IsNil(guest.Close()))
	s.WantRunSoon(t, 1, 4, 2, 3)
	s.Detach(t, "4")
	s.WantSealed(t, "1", "2", "3")
	s.WantRun(t, 1, 2, 3)

	// Set and move. A handle that was open all the time, and one of another process.
	two, other := s.Open(t, "2"), scene.NewApp(t)
	qt.Assert(t, qt.IsNil(other.Do(t, s.Command(scene.Command{Op: "open", Member: "1"}))))
	qt.Assert(t, qt.IsNil(two.Set(ctx, hook.Settings{Priority: 50, ContinueOn: hook.SetOf(hook.Drop)})))
	s.WantRun(t, 1, 3, 2)
	qt.Assert(t, qt.IsNil(other.Do(t, s.Command(scene.Command{Op: "move", Position: hook.Position{Last: true}}))))
	s.WantRun(t, 3, 2) // which goes on for what is dropped only
	s.WantSealed(t, "3", "2", "1")
	qt.Assert(t, qt.IsNil(two.Set(ctx, hook.Settings{ContinueOn: hook.SetOf(hook.Pass)})))
	s.WantRun(t, 3, 2, 1)
	info, err := two.Info(ctx)
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.IsTrue(info.Sealed))
	chain, err := two.Chain(ctx)
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.IsTrue(chain.Member("2").Sealed))

	// Replace by code that can be sealed: from here, from another process.
	qt.Assert(t, qt.IsNil(two.Update(ctx, dispatcher.Spec(scene.Alone(s.Trace.Spec(12, scene.Pass)), dispatcher.LoadOptions{}))))
	s.WantRun(t, 3, 12, 1)
	qt.Assert(t, qt.IsNil(other.Do(t, s.Command(scene.Command{Op: "update", Program: scene.ID(t, s.Tracer(t, 11, scene.Pass))}))))
	s.WantRun(t, 3, 12, 11)
	s.WantSealed(t, "3", "2", "1")

	// By a program without code: it runs at once, from its slot, and so does what comes after it.
	qt.Assert(t, qt.IsNil(two.Update(ctx, dispatcher.Program(s.Trace.Program(t, 22, scene.Pass)))))
	s.WantRun(t, 3, 22, 11)
	s.WantSealed(t, "3", "1")
	qt.Assert(t, qt.IsNil(two.Update(ctx, dispatcher.Program(s.Tracer(t, 32, scene.Pass)))))
	s.WantRun(t, 3, 32, 11)
	s.WantSealed(t, "3", "1")
	s.Seal(t, "3 2 1")
	s.WantRun(t, 3, 32, 11)
	qt.Assert(t, qt.IsNil(two.Update(ctx, scene.File("tailcall.o", "ldt_entry"))))
	s.WantRun(t, 3)
	qt.Assert(t, qt.IsTrue(s.Drops(t)))
	s.WantSealed(t, "3", "1")
	qt.Assert(t, qt.IsNil(two.Update(ctx, dispatcher.Program(s.Tracer(t, 2, scene.Pass)))))
	s.Seal(t, "3 2 1")

	// What is refused changes nothing.
	sealed := s.Read(t)
	qt.Assert(t, qt.IsNotNil(two.Update(ctx, scene.File("refused.o", ""))))
	qt.Assert(t, qt.DeepEquals(s.Read(t), sealed))

	// A handle goes, the member stays.
	qt.Assert(t, qt.IsNil(two.Close()))
	qt.Assert(t, qt.IsNil(other.Stop()))
	s.WantRun(t, 3, 2, 11)
	s.WantSealed(t, "3", "2", "1")

	// A member that is made its owner's is in its slot from then on, and leaves with it.
	two = s.Open(t, "2")
	qt.Assert(t, qt.IsNil(two.Unpin(ctx)))
	s.WantRun(t, 3, 2, 11)
	s.WantSealed(t, "3", "1")
	qt.Assert(t, qt.IsNil(two.Close()))
	s.WantRunSoon(t, 3, 11)

	s.WantSealed(t, "3", "1")
	s.Clear(t)
	s.WantFree(t)
}

// A program of several versions, replaced while it is sealed, goes on with its maps.
func TestReplaceKeepsMapsWhileSealed(t *testing.T) {
	s := scene.New(t)
	link := s.Join(t, scene.File("filter.o", ""), scene.Persistent("filter", 10))
	s.Join(t, scene.File("several.o", "ldt_second"), scene.Persistent("second", 20))
	s.Seal(t, "filter second")
	pins := s.Read(t).Pins
	path := filepath.Dir(pins[slices.IndexFunc(pins, func(p string) bool { return strings.Contains(p, "member_filter") })]) + "/map_ldt_dropped"
	count := uint64(0)
	for round := range 3 {
		s.WantDropped(t, scene.Port, scene.Port+1)
		count += 5
		qt.Assert(t, qt.Equals(scene.PinnedCount(t, path), count))
		qt.Assert(t, qt.IsNil(link.Update(t.Context(), scene.File("other.o", ""))), qt.Commentf("round %d", round))
		s.WantDropped(t, scene.Port+1)
		qt.Assert(t, qt.Equals(scene.PinnedCount(t, path), count))
		qt.Assert(t, qt.DeepEquals(s.MemberPins(t, "filter"), []string{"map_ldt_dropped", "map_ldt_passed", "slot"}))
		s.WantSealed(t, "filter", "second")
		qt.Assert(t, qt.IsNil(link.Update(t.Context(), scene.File("filter.o", ""))))
		s.WantSealed(t, "filter", "second")
	}
	s.Clear(t)
	s.WantFree(t)
}

// A program that is put in the place of a sealed one runs from that moment on, and not only when it has been linked: a process that
// replaces it may be killed in between.
func TestReplaceSealedAtOnce(t *testing.T) {
	s := scene.NewSealScene(t)
	s.Member(t, 1)
	s.Member(t, 2)
	s.Member(t, 3)
	s.Seal(t, "1 2 3")
	link := s.Open(t, "2")
	for i, next := range []*ebpf.Program{s.Tracer(t, 12, scene.Pass), s.Trace.Program(t, 22, scene.Pass)} {
		want, steps := s.Ran(t), 0
		err := scene.AtEachStep(func() error { return link.Update(t.Context(), dispatcher.Program(next)) }, func(step string) {
			if step == "replace: after" {
				want, steps = []int{1, 12 + 10*i, 3}, steps+1
			}
			s.WantRun(t, want...)
		})
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.Equals(steps, 1))
		s.WantRun(t, want...)
	}
	s.WantSealed(t, "1", "3")
	s.Clear(t)
	s.WantFree(t)
}

// A pin that is removed by hand: packets go on to run what was linked, and the member leaves with the next change of the
// chain; one that leaves a closed door behind, closes it then.
func TestSealedPinRemovedByHand(t *testing.T) {
	for missing, after := range map[hook.OnMissing][]int{hook.MissingContinue: {1, 3, 4}, hook.MissingDrop: {1}} {
		t.Run(missing.String(), func(t *testing.T) {
			s := scene.NewSealScene(t)
			s.Member(t, 1, 1)
			qt.Assert(t, qt.IsNil(s.Attach(t, s.Tracer(t, 2, scene.Pass), dispatcher.Options{
				Name: "2", Priority: 2, OnMissing: missing, Persistent: true,
			}).Close()))
			s.Member(t, 3, 3)
			s.Seal(t, "1 2 3")
			for _, path := range s.Read(t).Pins {
				if strings.Contains(path, "/member_2/") {
					qt.Assert(t, qt.IsNil(os.Remove(path)))
				}
			}
			// The kernel empties the slot. Packets do not see that, and it is not shown either.
			linked := s.Read(t).Member("2")
			scene.Soon(t, func() bool { return s.Read(t).Member("2").Program.Name == "" })
			s.WantRun(t, 1, 2, 3)
			shown := s.Read(t).Member("2")
			qt.Check(t, qt.Equals(shown.State, hook.StateRunning))
			qt.Check(t, qt.Equals(shown.Program.ID, linked.Program.ID))
			s.Member(t, 4, 4)
			s.WantRun(t, after...)
			if missing == hook.MissingDrop {
				qt.Assert(t, qt.IsTrue(s.Drops(t)))
			}
			s.WantSealed(t, "1", "3")
			s.Clear(t)
			s.WantFree(t)
		})
	}
}

// A process that may bind a map to a program can say that this is the program's code. It is not believed.
func TestSealForgedCode(t *testing.T) {
	s := scene.NewSealScene(t)
	s.Member(t, 1)
	forge := func(c *dispatch.Code) *ebpf.Program {
		t.Helper()
		prog := s.Trace.Program(t, 2, scene.Pass)
		qt.Assert(t, qt.IsNil(state.KeepCode(prog, c)))
		return prog
	}
	other := s.Tracer(t, 9, scene.Pass)
	code, _, err := state.CodeOf(other)
	qt.Assert(t, qt.IsNil(err))
	link := s.Attach(t, forge(code), scene.Persistent("2", 20))
	s.Seal(t, "1 2!", `its object code is not the program's \(tag [0-9a-f]+, not [0-9a-f]+\)`)
	s.WantRun(t, 1, 2)

	// The right instructions with the maps of others.
	own, _, err := state.CodeOf(s.Tracer(t, 2, scene.Pass))
	qt.Assert(t, qt.IsNil(err))
	foreign, err := ebpf.NewMap(&ebpf.MapSpec{Name: "ldt_foreign", Type: ebpf.Array, KeySize: 4, ValueSize: 16 + 64*4, MaxEntries: 1})
	qt.Assert(t, qt.IsNil(err))
	defer foreign.Close()
	info, err := foreign.Info()
	qt.Assert(t, qt.IsNil(err))
	id, _ := info.ID()
	own.Maps = []uint32{uint32(id)}
	qt.Assert(t, qt.IsNil(link.Update(t.Context(), dispatcher.Program(forge(own)))))
	s.Seal(t, "1 2!", `its object code is not the program's \(it uses map `+regexp.QuoteMeta(fmt.Sprint(id))+`.*\)`)

	// What is no code at all.
	for _, value := range [][]byte{{0}, []byte("no code")} {
		prog := s.Trace.Program(t, 2, scene.Pass)
		m, err := ebpf.NewMap(&ebpf.MapSpec{
			Name: "ld_code", Type: ebpf.Array, KeySize: 4, ValueSize: uint32(len(value)), MaxEntries: 1,
			Contents: []ebpf.MapKV{{Key: uint32(0), Value: value}},
		})
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.IsNil(errors.Join(m.Freeze(), prog.BindMap(m), m.Close())))
		qt.Assert(t, qt.IsNil(link.Update(t.Context(), dispatcher.Program(prog))))
		s.Seal(t, "1 2!", `object code of program "ldt_trace_2": .*`)
		s.WantRun(t, 1, 2)
	}
	s.Clear(t)
	s.WantFree(t)
}
