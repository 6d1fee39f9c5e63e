package libxdp

import (
	"fmt"
	"math/bits"

	"github.com/cilium/ebpf/asm"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/code"
)

// A generator writes the code of a dispatcher. The code does what libxdp's
// does, but needs no lookup for a packet, because the actions are constants.
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
// A single program replaces all of it (see stubName); until then there is only
// the chain with its stub.
type generator struct{ code.Writer }

// generate returns the code of a dispatcher of those programs. stub returns the
// body of the functions that components replace.
func generate(programs []ProgramConfig, stub func(n int) asm.Instructions) asm.Instructions {
	g := &generator{}
	last := len(programs) - 1
	g.Begin(code.Global(mainFunction))
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
		g.Begin(code.Global(stubFunction(n)))
		g.Emit(stub(n)...)
	}
	return g.Insns
}

// goOn ends the chain unless the verdict is one of the actions.
func (g *generator) goOn(p ProgramConfig, next string) {
	for _, action := range actions(p) {
		g.Emit(asm.JEq.Imm32(asm.R0, action, next))
	}
	g.Emit(asm.JNE.Imm32(asm.R0, notAttached, "exit"))
	g.Label(next)
}

// finish ends the chain. If the last program's actions would let the chain
// continue, libxdp's verdict is PASS, not the program's verdict.
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

// actions lists the verdicts after which the chain continues, the most common
// one first.
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

// stubBody returns the body of a stub. The helper that it calls changes nothing,
// but the kernel counts it as one that may change a packet. Since Linux 6.13 a
// program that may change packets can only replace a function that may do so
// too.
func stubBody(int) asm.Instructions {
	return asm.Instructions{
		asm.Mov.Imm(asm.R2, 0),
		asm.FnXdpAdjustTail.Call(),
		asm.Mov.Imm(asm.R0, notAttached),
		asm.Return(),
	}
}
