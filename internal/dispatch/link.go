package dispatch

import (
	"fmt"
	"slices"

	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/code"
)

// CodeMapRef is the symbol by which the code of the member at i refers to the
// map at that index of Code.Maps.
func CodeMapRef(i, index int) string { return fmt.Sprintf("code_%d_%d", i, index) }

// codeFunc is the name of a function in the code of the member at i. The main function's name
// is SlotFunc.
func codeFunc(i, function int) string {
	if function == 0 {
		return SlotFunc(i)
	}
	return fmt.Sprintf("member_%d_%d", i, function)
}

// maxInline is the size, in instructions, of the largest main function that is
// inlined. For a larger function the call costs little, and the verifier need not
// check the function again on each path to it.
const maxInline = 512

// A layout is the way that members are linked.
type layout struct {
	codes  []*Code
	inline bool // small main functions replace their calls
	last   int
	// Where main keeps its state while a member runs: in registers that no
	// inlined member uses, or on the stack below the members' frames.
	context, verdict location
}

// A location is a register or, for RFP, a stack position.
type location struct {
	reg    asm.Register
	offset int16
}

func newLayout(slots []hook.Settings, codes []*Code, inline bool) layout {
	l := layout{codes: codes, inline: inline, last: len(slots) - 1}
	free := []asm.Register{asm.R6, asm.R7, asm.R8, asm.R9}
	frame := 0
	for i := range slots[:max(l.last, 0)] {
		if l.inlined(i) {
			frame = max(frame, codes[i].Frame)
			free = slices.DeleteFunc(free, codes[i].uses)
		}
	}
	at := int16(-(frame + 7) / 8 * 8)
	for _, p := range []*location{&l.context, &l.verdict} {
		if len(free) > 0 {
			p.reg, free = free[0], free[1:]
		} else {
			at -= 8
			*p = location{asm.RFP, at}
		}
	}
	return l
}

func (p location) store(from asm.Register) asm.Instruction {
	if p.reg == asm.RFP {
		return asm.StoreMem(asm.RFP, p.offset, from, asm.DWord)
	}
	return asm.Mov.Reg(p.reg, from)
}

func (p location) storeImm(value int32) asm.Instruction {
	if p.reg == asm.RFP {
		// asm.StoreImm cannot make a store of 64 bits.
		return asm.Instruction{OpCode: asm.StoreImmOp(asm.DWord), Dst: asm.RFP, Offset: p.offset, Constant: int64(value)}
	}
	return asm.Mov.Imm(p.reg, value)
}

func (p location) load(to asm.Register) asm.Instruction {
	if p.reg == asm.RFP {
		return asm.LoadMem(to, asm.RFP, p.offset, asm.DWord)
	}
	return asm.Mov.Reg(to, p.reg)
}

// linked tells whether the member at i is linked.
func (l *layout) linked(i int) bool { return i >= 0 && i < len(l.codes) && l.codes[i] != nil }

// inlined tells whether the member's main function replaces its call.
func (l *layout) inlined(i int) bool {
	if !l.linked(i) {
		return false
	}
	main := l.codes[i].main()
	return l.inline && len(main) <= maxInline && !slices.ContainsFunc(main, isMayGoto) || l.last == 0
}

// isMayGoto tells whether the instruction counts the rounds of a loop. All of a
// function share one count (do_misc_fixups, kernel/bpf/verifier.c; Linux 6.9): inlined,
// a member that used it up would end the loops of the members behind it.
func isMayGoto(ins asm.Instruction) bool { return ins.OpCode.JumpOp() == asm.JCOND }

// functions returns the indexes at which functions begin.
func (c *Code) functions() []int {
	var begin []int
	for i := range c.Insns {
		if btf.FuncMetadata(&c.Insns[i]) != nil {
			begin = append(begin, i)
		}
	}
	return begin
}

// main returns the main function.
func (c *Code) main() asm.Instructions {
	if begin := c.functions(); len(begin) > 1 {
		return c.Insns[:begin[1]]
	}
	return c.Insns
}

// uses tells whether the main function reads or writes the register.
func (c *Code) uses(reg asm.Register) bool {
	return slices.ContainsFunc(c.main(), func(ins asm.Instruction) bool {
		// In a call and in a load of 64 bits the source is not a register.
		return ins.Dst == reg || ins.Src == reg && !ins.OpCode.IsDWordLoad() && ins.OpCode.JumpOp() != asm.Call
	})
}

// parts returns the main function of the member at i, without its name, and
// its other functions.
func (l *layout) parts(i int) (main, others asm.Instructions) {
	c := l.codes[i]
	insns := slices.Clone(c.Insns)
	begin := c.functions()
	number := map[asm.RawInstructionOffset]int{} // number of the function that begins there
	iter := insns.Iterate()
	for iter.Next() {
		if n := slices.Index(begin, iter.Index); n >= 0 {
			number[iter.Offset] = n
		}
	}
	iter = insns.Iterate()
	for iter.Next() {
		ins := iter.Ins
		switch {
		case ins.IsLoadFromMap():
			*ins = ins.WithReference(CodeMapRef(i, int(uint32(ins.Constant))))
		case ins.IsFunctionReference():
			to := number[iter.Offset+1+asm.RawInstructionOffset(ins.Constant)]
			*ins = ins.WithReference(codeFunc(i, to))
			ins.Constant = -1 // to be resolved
		}
		if n := slices.Index(begin, iter.Index); n > 0 {
			*ins = ins.WithSymbol(codeFunc(i, n))
			if ins.Source() == nil {
				*ins = ins.WithSource(asm.Comment(btf.FuncMetadata(ins).Name))
			}
		}
	}
	n := len(c.main())
	insns[0] = btf.WithFuncMetadata(insns[0], nil)
	return insns[:n], insns[n:]
}

// function emits the linked member at i as a function.
func (g *generator) function(i int) {
	main, others := g.parts(i)
	g.BeginAs(SlotFunc(i), code.Global(g.codes[i].Name))
	g.Emit(main...)
	g.Emit(others...)
}

// body emits the main function of the member at i in place of its call. Its
// other functions follow main.
func (g *generator) body(i int) {
	insns, others := g.parts(i)
	g.behind = append(g.behind, others...)
	if i == g.last {
		g.Emit(insns...)
		return
	}
	if end := len(insns) - 1; insns[end].OpCode.JumpOp() == asm.Exit {
		insns = insns[:end] // jumps to the end lead to the next member
	}
	// Any other exit becomes a jump to the end, in units of 8 bytes.
	size := asm.RawInstructionOffset(insns.Size() / asm.InstructionSize)
	iter := insns.Iterate()
	for iter.Next() {
		if iter.Ins.OpCode.JumpOp() == asm.Exit {
			ja := asm.Ja.Label("").WithSource(iter.Ins.Source())
			ja.Offset = int16(size - iter.Offset - 1)
			*iter.Ins = ja
		}
	}
	g.Emit(insns...)
}
