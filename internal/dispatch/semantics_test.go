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

// missing is in the place of a verdict where a slot is empty.
const missing = -1

var verdicts = []int{int(hook.Aborted), int(hook.Drop), int(hook.Pass), int(hook.TX), int(hook.Redirect)}

// reference is what a chain does, said in another way.
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

// bench has slots whose programs take their verdict from the packet: the one in
// slot i from byte i. To fill slots anew for each verdict would take the kernel
// long. Each slot has a twin that stays empty.
type bench struct {
	slots, empty []*ebpf.Map
	codes        []*dispatch.Code // of their programs
	build        func(*state.Chain, []*ebpf.Map, []*dispatch.Code) (*ebpf.Program, error)
	ran          func(slots []hook.Settings, does []int) // may be nil
	done         func(slots []hook.Settings)             // with a dispatcher; may be nil
	quick        bool                                    // all that can be are sealed, or none
}

func newBench(t *testing.T, slots int) *bench {
	t.Helper()
	b := &bench{build: state.Build}
	for i := range slots {
		slot := newSlot(t)
		prog, code := loadWithCode(t, byteProgram(i))
		qt.Assert(t, qt.IsNil(state.Fill(slot, prog)))
		b.slots, b.empty, b.codes = append(b.slots, slot), append(b.empty, newSlot(t)), append(b.codes, code)
	}
	return b
}

// byteProgram has the i-th byte of the packet as its verdict.
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
	case 1: // with exits on the way, and none at the end
		insns = slices.Concat(insns[:4], asm.Instructions{
			asm.JLE.Reg(asm.R4, asm.R3, "read"),
			asm.Mov.Imm(asm.R0, 99),
			asm.Return(),
			asm.LoadMem(asm.R0, asm.R2, int16(i), asm.Byte).WithSymbol("out"),
			asm.Return(),
			asm.LoadMem(asm.R5, asm.R2, int16(i), asm.Byte).WithSymbol("read"),
			asm.Ja.Label("out"),
		})
	case 2: // with a frame, and registers that main uses too
		insns = slices.Concat(asm.Instructions{
			asm.Mov.Imm(asm.R6, 7),
			asm.Mov.Imm(asm.R7, 8),
			asm.StoreMem(asm.RFP, -8, asm.R6, asm.DWord),
		}, insns)
	case 3: // too large to stand in the place of its call
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

// dispatcher loads the one of a chain, some of whose slots are empty, and some of
// whose members are linked into it: sealed is a bit for each.
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

// run returns the verdict of a dispatcher whose slots do as given.
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

// check runs a chain with everything that its slots may do.
func (b *bench) check(t *testing.T, slots []hook.Settings) {
	t.Helper()
	for empties := range 1 << len(slots) {
		empty := func(i int) bool { return empties&(1<<i) != 0 }
		var progs []*ebpf.Program
		for sealed := range 1 << len(slots) {
			// What is empty is not sealed. What counts, counts in slots.
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

// The generated code must mean what it is documented to mean, for the settings
// of the golden files and for all that matter of up to three members.
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

// What is no verdict ends the chain and comes out as it is: the kernel reports
// it (bpf_warn_invalid_xdp_action), which it must not be kept from. Of a 64-bit
// value only what the kernel looks at counts.
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

// The kernel skips a tail call beyond the 33rd in silence: the last member of
// a chain that is full must run.
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
