package libxdp

import (
	"fmt"
	"math/bits"

	"github.com/cilium/ebpf/asm"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/code"
)

// A generator writes the code of a dispatcher. It means what libxdp's means,
// but nothing is looked up for a packet: the actions are constants.
//
//	xdp_dispatcher:  r6 = r1
//	                 call prog0
//	                 if w0 == PASS goto next_0      one for each action
//	                 if w0 != 31 goto exit
//	next_0:          r1 = r6
//	                 call prog1                     the last one
//	                 if w0 != 31 goto exit
//	                 r0 = PASS
//	exit:            exit
//	prog0:           ...
//
// A program on its own replaces all of it (see stubName); until then the chain
// of its stub alone is there.
type generator struct{ code.Writer }

// generate returns the code of a dispatcher of those programs. stub is the body
// of the functions that components replace.
func generate(programs []ProgramConfig, stub func(n int) asm.Instructions) asm.Instructions {
	g := &generator{}
	last := len(programs) - 1
	g.Begin(mainFunction)
	if last > 0 {
		g.Emit(asm.Mov.Reg(asm.R6, asm.R1))
	}
	for n, p := range programs {
		if n > 0 {
			g.Emit(asm.Mov.Reg(asm.R1, asm.R6))
		}
		g.Emit(asm.Call.Label(stubFunction(n)))
		if n < last {
			g.goOn(p, fmt.Sprintf("next_%d", n))
		} else {
			g.finish(p)
		}
	}
	for n := range programs {
		g.Begin(stubFunction(n))
		g.Emit(stub(n)...)
	}
	return g.Insns
}

// goOn leaves unless the verdict is one of the actions.
func (g *generator) goOn(p ProgramConfig, next string) {
	for _, action := range actions(p) {
		g.Emit(asm.JEq.Imm32(asm.R0, action, next))
	}
	g.Emit(asm.JNE.Imm32(asm.R0, notAttached, "exit"))
	g.Label(next)
}

// finish leaves. Where the chain would go on, but ends here, libxdp's verdict is
// not that of the last program but PASS.
func (g *generator) finish(p ProgramConfig) {
	for _, action := range actions(p) {
		if action != int32(hook.Pass) {
			g.Emit(asm.JEq.Imm32(asm.R0, action, "pass"))
		}
	}
	g.Emit(asm.JNE.Imm32(asm.R0, notAttached, "exit"))
	g.Label("pass")
	g.Emit(asm.Mov.Imm(asm.R0, int32(hook.Pass)))
	g.Label("exit")
	g.Emit(asm.Return())
}

// actions lists the verdicts after which the chain goes on, the most common one
// first.
func actions(p ProgramConfig) []int32 {
	var list []int32
	mask := p.Actions &^ (1 << notAttached)
	if mask&(1<<hook.Pass) != 0 {
		list = append(list, int32(hook.Pass))
		mask &^= 1 << hook.Pass
	}
	for ; mask != 0; mask &= mask - 1 {
		list = append(list, int32(bits.TrailingZeros32(mask)))
	}
	return list
}

// stubBody is what a stub does until a component replaces it. The helper changes
// nothing, but is one that may change a packet: where the kernel looks at that
// (Linux 6.13), a function without such a helper can only be replaced by one
// without.
func stubBody(int) asm.Instructions {
	return asm.Instructions{
		asm.Mov.Imm(asm.R2, 0),
		asm.FnXdpAdjustTail.Call(),
		asm.Mov.Imm(asm.R0, notAttached),
		asm.Return(),
	}
}
