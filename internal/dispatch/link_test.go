package dispatch_test

import (
	"io"
	"testing"

	"github.com/cilium/ebpf/asm"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// When the inlined members use all registers, main keeps its state on the stack.
func TestLinkWithoutRegisters(t *testing.T) {
	greedy := &dispatch.Code{Name: "ldt_greedy", Frame: 20, Insns: asm.Instructions{asm.Mov.Imm(asm.R0, 1)}}
	for r := asm.R6; r <= asm.R9; r++ {
		greedy.Insns = append(greedy.Insns, asm.Mov.Imm(r, 1))
	}
	greedy.Insns = append(greedy.Insns, asm.Return())
	for _, slots := range [][]hook.Settings{{plain, plain, plain}, {settings(anyVerdict(), hook.MissingDrop), plain, plain}} {
		insns := dispatch.Link(slots, []*dispatch.Code{greedy, nil, nil}, true)
		qt.Check(t, qt.IsNil(insns.Marshal(io.Discard, kernel.ByteOrder)), qt.Commentf("%v", insns))
	}
}
