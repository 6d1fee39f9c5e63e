package dispatch_test

import (
	"fmt"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// missing replaces a verdict where a slot is empty.
const missing = -1

var verdicts = []int{int(hook.Aborted), int(hook.Drop), int(hook.Pass), int(hook.TX), int(hook.Redirect)}

// reference returns a chain's verdict, independently of the generated code.
func reference(slots []hook.Settings, does []int) int {
	verdict := int(hook.Pass)
	for i, s := range slots {
		if does[i] == missing {
			switch s.OnMissing {
			case hook.MissingDrop:
				return int(hook.Drop)
			case hook.MissingAborted:
				return int(hook.Aborted)
			}
			continue
		}
		verdict = does[i]
		if !s.ContinueOn.Has(hook.Verdict(verdict)) {
			return verdict
		}
	}
	return verdict
}

// bench has slots with programs that take their verdict from the packet: the
// program in slot i returns byte i. Refilling slots for each verdict would be
// slow. Each slot has a twin that stays empty.
type bench struct {
	slots, empty []*ebpf.Map
	codes        []*dispatch.Code // of the slots' programs
	build        func(*state.Chain, []*ebpf.Map, []*dispatch.Code) (*ebpf.Program, error)
	ran          func(slots []hook.Settings, does []int) // may be nil
	done         func(slots []hook.Settings)             // with a dispatcher; may be nil
	quick        bool                                    // only all possible members sealed, or none
}

func newBench(t *testing.T, slots int) *bench {
	t.Helper()
	b := &bench{build: func(c *state.Chain, slots []*ebpf.Map, codes []*dispatch.Code) (*ebpf.Program, error) {
		return alone(state.Build(c, slots, codes))
	}}
	for i := range slots {
		slot := newSlot(t)
		prog, code := loadWithCode(t, byteProgram(i))
		qt.Assert(t, qt.IsNil(state.Fill(slot, prog)))
		b.slots, b.empty, b.codes = append(b.slots, slot), append(b.empty, newSlot(t)), append(b.codes, code)
	}
	return b
}

// byteProgram returns the i-th byte of the packet as its verdict.
func byteProgram(i int) asm.Instructions {
	insns := asm.Instructions{
		asm.LoadMem(asm.R2, asm.R1, 0, asm.Word), // xdp_md.data
		asm.LoadMem(asm.R3, asm.R1, 4, asm.Word), // xdp_md.data_end
		asm.Mov.Reg(asm.R4, asm.R2),
		asm.Add.Imm(asm.R4, int32(i+1)),
		asm.Mov.Imm(asm.R0, 99),
		asm.JGT.Reg(asm.R4, asm.R3, "end"),
		asm.LoadMem(asm.R0, asm.R2, int16(i), asm.Byte),
		asm.Return().WithSymbol("end"),
	}
	switch i % 4 {
	case 1: // with exits in the middle, and none at the end
		insns = slices.Concat(insns[:4], asm.Instructions{
			asm.JLE.Reg(asm.R4, asm.R3, "read"),
			asm.Mov.Imm(asm.R0, 99),
			asm.Return(),
			asm.LoadMem(asm.R0, asm.R2, int16(i), asm.Byte).WithSymbol("out"),
			asm.Return(),
			asm.LoadMem(asm.R5, asm.R2, int16(i), asm.Byte).WithSymbol("read"),
			asm.Ja.Label("out"),
		})
	case 2: // with a stack frame, and with registers that main uses too
		insns = slices.Concat(asm.Instructions{
			asm.Mov.Imm(asm.R6, 7),
			asm.Mov.Imm(asm.R7, 8),
			asm.StoreMem(asm.RFP, -8, asm.R6, asm.DWord),
		}, insns)
	case 3: // too large to be inlined
		insns = slices.Concat(slices.Repeat(asm.Instructions{asm.Mov.Imm(asm.R5, 1)}, 600), insns)
	}
	return insns
}

func loadWithCode(t *testing.T, insns asm.Instructions) (*ebpf.Program, *dispatch.Code) {
	t.Helper()
	const name = "ldt_member"
	loaded, err := load.Spec{Collection: &ebpf.CollectionSpec{Programs: map[string]*ebpf.ProgramSpec{
		name: {Name: name, Type: ebpf.XDP, AttachType: ebpf.AttachXDP, License: "GPL", Instructions: insns},
	}}}.Load(load.Want{Hook: hook.XDP})
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(loaded.Close)
	code, _, err := state.CodeOf(loaded.Program)
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.Equals(code.Refused, ""))
	qt.Assert(t, qt.IsNil(state.Verify(loaded.Program, code, dispatch.Plain)))
	return loaded.Program, code
}

func newSlot(t *testing.T) *ebpf.Map {
	t.Helper()
	slot, err := state.NewSlot("ldt")
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { slot.Close() })
	return slot
}

// alone closes the description of a dispatcher, which the program keeps.
func alone(d *state.Dispatcher, err error) (*ebpf.Program, error) {
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.Program.Clone()
}

// dispatcher loads a chain's dispatcher. empty tells which slots are empty, and
// sealed has a bit for each member that is linked.
func (b *bench) dispatcher(t *testing.T, slots []hook.Settings, empty func(i int) bool, sealed int) *ebpf.Program {
	t.Helper()
	chain := &state.Chain{ID: 1, Plan: dispatch.Plan{Shape: dispatch.Plain}}
	var maps []*ebpf.Map
	codes := make([]*dispatch.Code, len(slots))
	for i, s := range slots {
		chain.Slots = append(chain.Slots, dispatch.Slot{MapID: uint32(i + 1), Name: fmt.Sprint(i), Settings: s})
		if empty(i) {
			maps = append(maps, b.empty[i])
		} else {
			maps = append(maps, b.slots[i])
			if sealed&(1<<i) != 0 {
				codes[i] = b.codes[i]
			}
		}
	}
	if sealed == 0 {
		codes = nil
	}
	prog, err := b.build(chain, maps, codes)
	qt.Assert(t, qt.IsNil(err))
	return prog
}

func none(int) bool { return false }

// run returns the verdict of a dispatcher with programs that return what does
// says.
func run(t *testing.T, prog *ebpf.Program, does ...int) uint32 {
	t.Helper()
	packet := make([]byte, 64)
	for i, v := range does {
		packet[i] = byte(v)
	}
	verdict, err := prog.Run(&ebpf.RunOptions{Data: packet})
	qt.Assert(t, qt.IsNil(err))
	return verdict
}

// combinations calls fn for each way to choose one of n things k times.
func combinations(n, k int, fn func(chosen []int)) {
	chosen := make([]int, k)
	for {
		fn(chosen)
		i := 0
		for ; i < k && chosen[i] == n-1; i++ {
			chosen[i] = 0
		}
		if i == k {
			return
		}
		chosen[i]++
	}
}

// check runs a chain with every combination of verdicts and empty slots.
func (b *bench) check(t *testing.T, slots []hook.Settings) {
	t.Helper()
	for empties := range 1 << len(slots) {
		empty := func(i int) bool { return empties&(1<<i) != 0 }
		var progs []*ebpf.Program
		for sealed := range 1 << len(slots) {
			// An empty member is never sealed, and a counting dispatcher calls
			// slots.
			some := sealed != 0 && sealed != 1<<len(slots)-1-empties
			if sealed&empties == 0 && (sealed == 0 || b.done == nil) && !(some && b.quick) {
				progs = append(progs, b.dispatcher(t, slots, empty, sealed))
			}
		}
		var filled []int
		for i := range slots {
			if !empty(i) {
				filled = append(filled, i)
			}
		}
		combinations(len(verdicts), len(filled), func(chosen []int) {
			does := slices.Repeat([]int{missing}, len(slots))
			for i, c := range chosen {
				does[filled[i]] = verdicts[c]
			}
			want := reference(slots, does)
			for i, prog := range progs {
				if got := run(t, prog, does...); got != uint32(want) {
					t.Errorf("settings %v, slots do %v, %d. way to seal: verdict %d, want %d", slots, does, i, got, want)
				}
			}
			if b.ran != nil {
				b.ran(slots, does)
			}
		})
		for _, prog := range progs {
			prog.Close()
		}
		if b.done != nil {
			b.done(slots)
		}
	}
}

// The generated code must do what its documentation says, for the settings of
// the golden files and for all settings that matter of up to three members.
func TestSemantics(t *testing.T) {
	testenv.CheckLeaks(t)
	newBench(t, 4).checkAll(t)
}

// checkAll checks chains of all settings that matter.
func (b *bench) checkAll(t *testing.T) {
	t.Helper()
	for _, slots := range plans {
		b.check(t, slots)
	}
	b.quick = true

	var all []hook.Settings
	for _, set := range []hook.VerdictSet{
		hook.Never, hook.SetOf(hook.Pass), hook.SetOf(hook.Drop), hook.SetOf(hook.Aborted, hook.TX), hook.SetOf(hook.Pass, hook.Redirect), anyVerdict(),
	} {
		for m := hook.MissingContinue; m <= hook.MissingAborted; m++ {
			all = append(all, settings(set, m))
		}
	}
	combinations(len(all), 2, func(c []int) { b.check(t, []hook.Settings{all[c[0]], all[c[1]]}) })

	few := []hook.Settings{
		plain, settings(hook.SetOf(hook.Pass), hook.MissingDrop), settings(hook.Never, hook.MissingContinue),
		settings(anyVerdict(), hook.MissingDrop), settings(hook.SetOf(hook.Aborted, hook.TX), hook.MissingAborted),
	}
	combinations(len(few), 3, func(c []int) { b.check(t, []hook.Settings{few[c[0]], few[c[1]], few[c[2]]}) })
}

// A value that is no verdict ends the chain and is returned unchanged: the
// kernel reports it (bpf_warn_invalid_xdp_action), and a chain must not hide
// it. Of a 64-bit value only the half that the kernel reads counts.
func TestOddVerdicts(t *testing.T) {
	testenv.CheckLeaks(t)
	b := newBench(t, 2)
	for _, tc := range []struct {
		returns asm.Instruction
		want    uint32
	}{
		{asm.Mov.Imm(asm.R0, 5), 5},
		{asm.Mov.Imm(asm.R0, 31), 31},
		{asm.Mov.Imm(asm.R0, -1), 1<<32 - 1},
		{asm.LoadImm(asm.R0, 1<<32|int64(hook.Drop), asm.DWord), uint32(hook.Drop)},
		{asm.LoadImm(asm.R0, 1<<32|int64(hook.Pass), asm.DWord), uint32(hook.TX)}, // goes on
	} {
		var odd *ebpf.Program
		odd, b.codes[0] = loadWithCode(t, asm.Instructions{tc.returns, asm.Return()})
		qt.Assert(t, qt.IsNil(state.Fill(b.slots[0], odd)))
		for _, first := range []hook.Settings{plain, settings(hook.SetOf(hook.Pass, hook.Redirect), hook.MissingDrop)} {
			for sealed := range 4 {
				prog := b.dispatcher(t, []hook.Settings{first, plain}, none, sealed)
				qt.Check(t, qt.Equals(run(t, prog, 0, int(hook.TX)), tc.want), qt.Commentf("%v, sealed %b", tc.returns, sealed))
				prog.Close()
			}
		}
	}
}

// The kernel silently skips a tail call beyond the 33rd. The last member of a
// full chain must run.
func TestFullChain(t *testing.T) {
	testenv.CheckLeaks(t)
	b := newBench(t, hook.MaxMembers)
	for _, sealed := range []int{0, 1<<hook.MaxMembers - 1, 0x55555555} {
		prog := b.dispatcher(t, slices.Repeat([]hook.Settings{plain}, hook.MaxMembers), none, sealed)
		does := slices.Repeat([]int{int(hook.Pass)}, hook.MaxMembers)
		qt.Check(t, qt.Equals(run(t, prog, does...), uint32(hook.Pass)))
		does[hook.MaxMembers-1] = int(hook.TX)
		qt.Check(t, qt.Equals(run(t, prog, does...), uint32(hook.TX)))
		prog.Close()
	}
}
