// Package code writes the instructions of dispatchers.
package code

import (
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
)

// A Writer collects instructions in order.
type Writer struct {
	Insns asm.Instructions
	// Lines gives each function that has no source line one: its name. If one
	// function has lines, all must have them (check_btf_line,
	// kernel/bpf/verifier.c).
	Lines bool

	pending string    // label of the next instruction
	fn      *btf.Func // function that begins at the next instruction
}

// Emit adds instructions.
func (w *Writer) Emit(insns ...asm.Instruction) {
	for _, ins := range insns {
		if w.pending != "" {
			ins = ins.WithSymbol(w.pending)
		}
		if w.fn != nil {
			ins = btf.WithFuncMetadata(ins, w.fn)
			if w.Lines && ins.Source() == nil {
				ins = ins.WithSource(asm.Comment(w.fn.Name))
			}
		}
		w.pending, w.fn = "", nil
		w.Insns = append(w.Insns, ins)
	}
}

// Label names the next instruction.
func (w *Writer) Label(name string) { w.pending = name }

// Begin begins a function with the next instruction. Its label is its name.
func (w *Writer) Begin(fn *btf.Func) { w.BeginAs(fn.Name, fn) }

// BeginAs is Begin for a function with a label that is not its name.
func (w *Writer) BeginAs(label string, fn *btf.Func) { w.pending, w.fn = label, fn }

// Global returns a global XDP function. The verifier checks such a function by
// itself, so freplace can replace it.
func Global(name string) *btf.Func {
	return &btf.Func{Name: name, Type: function, Linkage: btf.GlobalFunc}
}

// Static returns a static XDP function. The kernel lets freplace replace global
// functions only (btf_check_func_type_match, kernel/bpf/btf.c), so nobody can put
// another function in its place.
func Static(name string) *btf.Func {
	return &btf.Func{Name: name, Type: function, Linkage: btf.StaticFunc}
}

// function is the prototype of an XDP function. The kernel knows a context by the
// name of its type (btf_get_prog_ctx_type), and compares only that name with a
// component's (btf_check_func_type_match), so an empty struct of that name is
// enough.
var function = &btf.FuncProto{
	Return: Int,
	Params: []btf.FuncParam{{Name: "ctx", Type: &btf.Pointer{Target: &btf.Struct{Name: "xdp_md"}}}},
}

// Int is the type int of C.
var Int = &btf.Int{Name: "int", Size: 4, Encoding: btf.Signed}
