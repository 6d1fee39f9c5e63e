package dispatch

import (
	"fmt"
	"slices"

	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
)

// CodeMapRef is the symbol under which the code of the member at i refers to
// the map with that index in Code.Maps.
func CodeMapRef(i, index int) string { return fmt.Sprintf("code_%d_%d", i, index) }

// maxInline is the size of a member that stands in the place of its call, in
// instructions: in larger ones the call costs little, see docs/performance.md.
const maxInline = 32

// inlined tells whether the member at i stands in the place of its call. Main
// needs R6 and R7 while members are to follow; and its frame comes on top of those
// of all members that are called, so it shall have none of its own.
func (g *generator) inlined(i int) bool {
	c := g.code(i)
	switch {
	case c == nil:
		return false
	case g.count == 1:
		return true
	case i == g.count-1:
		return !c.uses(asm.R10)
	}
	return len(c.Insns) <= maxInline && len(c.functions()) == 1 && !c.uses(asm.R6, asm.R7, asm.R10)
}

func (g *generator) code(i int) *Code {
	if i < 0 || i >= len(g.codes) {
		return nil
	}
	return g.codes[i]
}

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

// uses tells whether the main function has to do with one of the registers.
func (c *Code) uses(regs ...asm.Register) bool {
	end := len(c.Insns)
	if begin := c.functions(); len(begin) > 1 {
		end = begin[1]
	}
	for _, ins := range c.Insns[:end] {
		// In a call and a load of 64 bits the source is no register.
		src := ins.Src
		if ins.OpCode.IsDWordLoad() || ins.OpCode.JumpOp() == asm.Call {
			src = asm.R0
		}
		if slices.Contains(regs, ins.Dst) || slices.Contains(regs, src) {
			return true
		}
	}
	return false
}

// linked returns the instructions of the member at i, as functions of the
// dispatcher.
func (g *generator) linked(i int) asm.Instructions {
	c := g.codes[i]
	insns := slices.Clone(c.Insns)
	for j := range insns {
		ins := &insns[j]
		if ins.IsLoadFromMap() {
			*ins = ins.WithReference(CodeMapRef(i, int(uint32(ins.Constant))))
		}
		// Where one function has lines all must have (check_btf_line,
		// kernel/bpf/verifier.c).
		if fn := btf.FuncMetadata(ins); fn != nil && ins.Source() == nil {
			*ins = ins.WithSource(asm.Comment(fn.Name))
		}
	}
	return insns
}

// function emits the member at i as a function of its own.
func (g *generator) function(i int) {
	insns := g.linked(i)
	g.begin(SlotFunc(i))
	g.fn = &btf.Func{Name: g.codes[i].Name, Type: proto, Linkage: btf.GlobalFunc}
	g.emit(insns...)
}

// inline emits the member at i in the place of its call. After the last one
// come its own functions.
func (g *generator) inline(i int) {
	insns := g.linked(i)
	insns[0] = btf.WithFuncMetadata(insns[0], nil)
	if i == g.count-1 {
		g.emit(insns...)
		return
	}
	if last := len(insns) - 1; insns[last].OpCode.JumpOp() == asm.Exit {
		insns = insns[:last] // who jumps there comes to what follows
	}
	// Elsewhere an exit is a jump to the end, in units of 8 bytes.
	iter := insns.Iterate()
	size := asm.RawInstructionOffset(insns.Size() / asm.InstructionSize)
	for iter.Next() {
		if iter.Ins.OpCode.JumpOp() == asm.Exit {
			ja := asm.Ja.Label("").WithSource(iter.Ins.Source())
			ja.Offset = int16(size - iter.Offset - 1)
			*iter.Ins = ja
		}
	}
	g.emit(insns...)
}
