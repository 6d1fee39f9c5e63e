package dispatch_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// few are plans that together use all that the code can contain.
var few = []string{"plain-1", "plain-2", "mixed", "never-drop", "aborted-in-set"}

// Like TestGenerate, for the code that counts and for the call into it.
func TestGenerateCounting(t *testing.T) {
	for _, name := range few {
		t.Run(name, func(t *testing.T) {
			got := fmt.Sprintf("%v\n%v", dispatch.Watched(dispatch.Link(plans[name], nil, false)), dispatch.Counting(plans[name]))
			golden := filepath.Join("testdata", "counting", name+".golden")
			if *update {
				qt.Assert(t, qt.IsNil(os.WriteFile(golden, []byte(got), 0o644)))
			}
			want, err := os.ReadFile(golden)
			qt.Assert(t, qt.IsNil(err), qt.Commentf("make it with -update"))
			qt.Assert(t, qt.Equals(got, string(want)))
		})
	}
}

// tally counts a run of a chain, independently of the generated code.
func tally(counts []dispatch.Counts, slots []hook.Settings, does []int) {
	for i, s := range slots {
		switch d := does[i]; {
		case d == missing:
			counts[i].Empty++
			if s.OnMissing != hook.MissingContinue {
				return
			}
		default:
			counts[i].Verdicts[d]++
			if !s.ContinueOn.Has(hook.Verdict(d)) {
				return
			}
		}
	}
}

// watchedBench is a bench with watched dispatchers.
func watchedBench(t *testing.T, slots int) (b *bench, watch **state.Watch) {
	t.Helper()
	b, watch = newBench(t, slots), new(*state.Watch)
	b.build = func(c *state.Chain, slots []*ebpf.Map, codes []*dispatch.Code) (*ebpf.Program, error) {
		if *watch != nil {
			(*watch).Close()
		}
		d, w, err := state.BuildWatched(c, slots, codes)
		*watch = w
		return alone(d, err)
	}
	t.Cleanup(func() {
		if *watch != nil {
			(*watch).Close()
		}
	})
	return b, watch
}

// counter loads the code that counts, without a watch.
type counter struct{ counts *ebpf.Map }

func (cr *counter) build(c *state.Chain, slots []*ebpf.Map, _ []*dispatch.Code) (*ebpf.Program, error) {
	if err := cr.close(); err != nil {
		return nil, err
	}
	var err error
	cr.counts, err = ebpf.NewMap(&ebpf.MapSpec{
		Name: "ldt_counts", Type: ebpf.PerCPUArray, KeySize: 4, ValueSize: uint32(4 * dispatch.CountsSize), MaxEntries: 1,
	})
	if err != nil {
		return nil, err
	}
	var settings []hook.Settings
	for _, s := range c.Slots {
		settings = append(settings, s.Settings)
	}
	insns := dispatch.Counting(settings)
	if err := insns.AssociateMap(dispatch.CountsRef, cr.counts); err != nil {
		return nil, err
	}
	for i, m := range slots {
		if err := insns.AssociateMap(dispatch.SlotRef(i), m); err != nil {
			return nil, err
		}
	}
	return ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "ldt_counting", Type: ebpf.XDP, AttachType: ebpf.AttachXDP, Instructions: insns, License: "Dual BSD/GPL",
	})
}

func (cr *counter) read(t *testing.T) [4]dispatch.Counts {
	t.Helper()
	var sum [4]dispatch.Counts
	var cpus [][4]dispatch.Counts
	qt.Assert(t, qt.IsNil(cr.counts.Lookup(uint32(0), &cpus)))
	for _, cpu := range cpus {
		for i, c := range cpu {
			sum[i] = sum[i].Plus(c)
		}
	}
	return sum
}

func (cr *counter) close() error {
	if cr.counts == nil {
		return nil
	}
	return cr.counts.Close()
}

// The code that counts gives the verdicts of the code that does not, for all
// cases of TestSemantics, and its counts are right.
func TestCountingSemantics(t *testing.T) {
	testenv.CheckLeaks(t)
	b, cr := newBench(t, 4), &counter{}
	t.Cleanup(func() { cr.close() })
	b.build = cr.build
	want := make([]dispatch.Counts, 4)
	b.ran = func(slots []hook.Settings, does []int) { tally(want, slots, does) }
	b.done = func(slots []hook.Settings) {
		for i, got := range cr.read(t) {
			if got.Ran() == 0 && got.Nanos > 0 {
				t.Errorf("settings %v: member %d did not run for %d ns", slots, i, got.Nanos)
			}
			got.Nanos = 0
			if got != want[i] {
				t.Errorf("settings %v, member %d: counted %+v, want %+v", slots, i, got, want[i])
			}
		}
		clear(want)
	}
	b.checkAll(t)
}

// Without its watcher a dispatcher gives the same verdicts: at once when there
// never was a watcher, otherwise as soon as the kernel has emptied the watch.
func TestWatchedAlone(t *testing.T) {
	testenv.CheckLeaks(t)
	b, watch := watchedBench(t, 4)
	build := b.build
	b.build = func(c *state.Chain, slots []*ebpf.Map, codes []*dispatch.Code) (*ebpf.Program, error) {
		prog, err := build(c, slots, codes)
		if err == nil {
			(*watch).Close()
		}
		return prog, err
	}
	b.quick = true
	for _, name := range few { // the kernel takes long to empty a watch
		b.check(t, plans[name])
	}
}

// A value that is no verdict is returned unchanged, and counted as other.
func TestCountingOddVerdicts(t *testing.T) {
	testenv.CheckLeaks(t)
	b, watch := watchedBench(t, 2)
	prog := b.dispatcher(t, []hook.Settings{plain, plain}, none, 0)
	defer prog.Close()
	qt.Assert(t, qt.Equals(run(t, prog, 5, int(hook.TX)), 5))
	qt.Assert(t, qt.Equals(run(t, prog, 255, int(hook.TX)), 255))
	qt.Assert(t, qt.Equals(run(t, prog, int(hook.Pass), 7), 7))
	counted, err := (*watch).Read()
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(counted[1].Other, 2))
	qt.Check(t, qt.Equals(counted[1].Verdicts, [hook.Verdicts]uint64{hook.Pass: 1}))
	qt.Check(t, qt.Equals(counted[2].Other, 1))
}

// The call into the code that counts is one of the 33 that the kernel allows.
// The last of 32 members must still run.
func TestFullChainWatched(t *testing.T) {
	testenv.CheckLeaks(t)
	b, watch := watchedBench(t, hook.MaxMembers)
	prog := b.dispatcher(t, slices.Repeat([]hook.Settings{plain}, hook.MaxMembers), none, 0)
	defer prog.Close()
	does := slices.Repeat([]int{int(hook.Pass)}, hook.MaxMembers)
	does[hook.MaxMembers-1] = int(hook.TX)
	qt.Assert(t, qt.Equals(run(t, prog, does...), uint32(hook.TX)))
	counted, err := (*watch).Read()
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.Equals(counted[hook.MaxMembers].Verdicts[hook.TX], 1))

	(*watch).Close() // and when the watcher is gone, at any moment
	for range 100 {
		qt.Assert(t, qt.Equals(run(t, prog, does...), uint32(hook.TX)))
	}
}

// Measures what a packet costs in a chain that is watched, and after the death
// of its watcher:
//
//	go test -run '^$' -bench Watching ./internal/dispatch
func BenchmarkWatching(b *testing.B) {
	testenv.Require(b)
	for _, members := range []int{1, 2, 10, 32} {
		slots := slices.Repeat([]hook.Settings{plain}, members)
		chain := &state.Chain{ID: 1, Plan: dispatch.Plan{Shape: dispatch.Plain}}
		pass := testenv.VerdictProgram(b, "ldt_pass", testenv.XDPPass)
		var maps []*ebpf.Map
		for i, s := range slots {
			slot, err := state.NewSlot("ldt")
			qt.Assert(b, qt.IsNil(err))
			b.Cleanup(func() { slot.Close() })
			qt.Assert(b, qt.IsNil(state.Fill(slot, pass)))
			chain.Slots = append(chain.Slots, dispatch.Slot{MapID: uint32(i + 1), Name: fmt.Sprint(i), Settings: s})
			maps = append(maps, slot)
		}
		run := func(name string, prog *ebpf.Program) {
			b.Run(fmt.Sprintf("members=%d/%s", members, name), func(b *testing.B) {
				_, took, err := prog.Benchmark(make([]byte, 64), b.N, b.ResetTimer)
				qt.Assert(b, qt.IsNil(err))
				b.ReportMetric(float64(took.Nanoseconds()), "ns/packet")
			})
		}
		prog, err := state.Build(chain, maps, nil)
		qt.Assert(b, qt.IsNil(err))
		run("plain", prog.Program)
		prog.Close()
		prog, watch, err := state.BuildWatched(chain, maps, nil)
		qt.Assert(b, qt.IsNil(err))
		run("watched", prog.Program)
		watch.Close()
		time.Sleep(100 * time.Millisecond) // until the kernel has emptied the watch
		run("abandoned", prog.Program)
		prog.Close()
	}
}
