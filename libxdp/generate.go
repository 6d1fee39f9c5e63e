package libxdp

import (
	"fmt"
	"math/bits"

	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"

	"github.com/libdispatcher/dispatcher/hook"
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
type generator struct {
	insns   asm.Instructions
	pending string    // label of the next instruction
	fn      *btf.Func // function that begins at the next instruction
}

// generate returns the code of a dispatcher of those programs. stub is the body
// of the functions that components replace.
func generate(programs []ProgramConfig, stub func(n int) asm.Instructions) asm.Instructions {
	g := &generator{}
	last := len(programs) - 1
	g.begin(mainFunction)
	if last > 0 {
		g.emit(asm.Mov.Reg(asm.R6, asm.R1))
	}
	for n, p := range programs {
		if n > 0 {
			g.emit(asm.Mov.Reg(asm.R1, asm.R6))
		}
		g.emit(asm.Call.Label(stubFunction(n)))
		if n < last {
			g.goOn(p, fmt.Sprintf("next_%d", n))
		} else {
			g.finish(p)
		}
	}
	for n := range programs {
		g.begin(stubFunction(n))
		g.emit(stub(n)...)
	}
	return g.insns
}

// goOn leaves unless the verdict is one of the actions.
func (g *generator) goOn(p ProgramConfig, next string) {
	for _, action := range actions(p) {
		g.emit(asm.JEq.Imm32(asm.R0, action, next))
	}
	g.emit(asm.JNE.Imm32(asm.R0, notAttached, "exit"))
	g.label(next)
}

// finish leaves. Where the chain would go on, but ends here, libxdp's verdict is
// not that of the last program but PASS.
func (g *generator) finish(p ProgramConfig) {
	for _, action := range actions(p) {
		if action != int32(hook.Pass) {
			g.emit(asm.JEq.Imm32(asm.R0, action, "pass"))
		}
	}
	g.emit(asm.JNE.Imm32(asm.R0, notAttached, "exit"))
	g.label("pass")
	g.emit(asm.Mov.Imm(asm.R0, int32(hook.Pass)))
	g.label("exit")
	g.emit(asm.Return())
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

func (g *generator) emit(insns ...asm.Instruction) {
	for _, ins := range insns {
		if g.pending != "" {
			ins = ins.WithSymbol(g.pending)
		}
		if g.fn != nil {
			ins = btf.WithFuncMetadata(ins, g.fn)
		}
		g.pending, g.fn = "", nil
		g.insns = append(g.insns, ins)
	}
}

func (g *generator) label(name string) { g.pending = name }

func (g *generator) begin(name string) {
	g.pending, g.fn = name, function(name)
}

// function is the type of a function that the verifier looks at by itself, so
// that it can be replaced: a global one, with a context.
func function(name string) *btf.Func {
	return &btf.Func{Name: name, Type: xdpFunction, Linkage: btf.GlobalFunc}
}

// The kernel knows a context by the name of its type, and compares no more than
// that with a component's (btf_check_func_type_match): an empty struct will do.
var xdpFunction = &btf.FuncProto{
	Return: cInt,
	Params: []btf.FuncParam{{Name: "ctx", Type: &btf.Pointer{Target: &btf.Struct{Name: "xdp_md"}}}},
}

var cInt = &btf.Int{Name: "int", Size: 4, Encoding: btf.Signed}
