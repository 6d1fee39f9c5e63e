package dispatch

import (
	"fmt"

	"github.com/cilium/ebpf/asm"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/code"
)

// ProgramName is the name of every dispatcher in the kernel.
const ProgramName = "libdispatcher"

// What a slot's function returns for an empty slot when the main function
// must tell that from a verdict. Any 32-bit value that no program returns by
// accident would do; the kernel takes values above XDP_REDIRECT for ABORTED.
const (
	missingContinue = 0x6c640000
	missingDrop     = missingContinue + 1
	missingAborted  = missingContinue + 2
)

// SlotRef is the symbol under which the code refers to the map of the slot at
// i, to be resolved with asm.Instructions.AssociateMap before the load.
func SlotRef(i int) string { return fmt.Sprintf("slot_%d", i) }

// Generate returns the code of the dispatcher.
//
// For each slot, main calls a function that tail-calls into the slot's prog
// array: the tail-called program returns to main. When the slot is empty the
// tail call falls through and the function returns the slot's default. These
// functions must be global: of a static one the verifier would conclude that
// it always returns that default, because it does not follow tail calls.
//
// The verdict of a chain is that of the last member that ran, and PASS when
// none did. Comparisons are on 32 bits, as the kernel takes the verdict.
func Generate(slots []hook.Settings) asm.Instructions {
	g := generator{plain: true}
	for _, s := range slots[:max(len(slots)-1, 0)] {
		g.plain = g.plain && s.ContinueOn == hook.SetOf(hook.Pass)
	}

	g.Begin(ProgramName)
	if len(slots) > 1 {
		g.Emit(asm.Mov.Reg(asm.R6, asm.R1))
	}
	if len(slots) == 0 {
		g.Emit(asm.Mov.Imm(asm.R0, int32(hook.Pass)))
	} else if !g.plain {
		g.Emit(asm.Mov.Imm(asm.R7, int32(hook.Pass)))
	}
	for i, s := range slots {
		g.call(i, s, i == len(slots)-1)
	}
	g.Label("exit")
	g.Emit(asm.Return())
	for _, v := range []hook.Verdict{hook.Drop, hook.Aborted} {
		if g.closes[v] {
			g.Label(v.String())
			g.Emit(asm.Mov.Imm(asm.R0, int32(v)), asm.Return())
		}
	}
	for i, s := range slots {
		g.slot(i, s)
	}
	return g.Insns
}

type generator struct {
	code.Writer
	// plain: every member but the last continues on PASS alone, so that whenever
	// the chain goes on the verdict is PASS and need not be kept.
	plain  bool
	closes [hook.Verdicts]bool // final verdicts of empty slots that are in use
}

// call runs the member at i and decides whether the chain goes on.
func (g *generator) call(i int, s hook.Settings, last bool) {
	if i > 0 {
		g.Emit(asm.Mov.Reg(asm.R1, asm.R6))
	}
	g.Emit(asm.Call.Label(SlotFunc(i)))
	if g.plain {
		// An empty slot that continues returns PASS, one that does not, its
		// verdict: no case of its own is needed.
		if !last {
			g.Emit(asm.JNE.Imm32(asm.R0, int32(hook.Pass), "exit"))
		}
		return
	}

	next := fmt.Sprintf("next_%d", i)
	def := missing(s, false)
	switch def {
	case missingDrop:
		g.closes[hook.Drop] = true
		g.Emit(asm.JEq.Imm32(asm.R0, missingDrop, hook.Drop.String()))
	case missingAborted:
		g.closes[hook.Aborted] = true
		g.Emit(asm.JEq.Imm32(asm.R0, missingAborted, hook.Aborted.String()))
	}
	if last {
		if def == missingContinue {
			g.Emit(
				asm.JNE.Imm32(asm.R0, missingContinue, "exit"),
				asm.Mov.Reg(asm.R0, asm.R7),
			)
		}
		return
	}
	verdicts := s.ContinueOn.List()
	if len(verdicts) == 0 {
		// Only an empty slot goes on. Where that does not either, the
		// comparison still shows the verifier a way to what follows.
		g.Emit(asm.JNE.Imm32(asm.R0, missingContinue, "exit"))
		return
	}
	if def == missingContinue {
		g.Emit(asm.JEq.Imm32(asm.R0, missingContinue, next))
	}
	g.Emit(asm.Mov.Reg(asm.R7, asm.R0))
	for _, v := range verdicts[1:] {
		g.Emit(asm.JEq.Imm32(asm.R0, int32(v), next))
	}
	g.Emit(asm.JNE.Imm32(asm.R0, int32(verdicts[0]), "exit"))
	g.Label(next)
}

// slot is the function that tail-calls into the member at i.
func (g *generator) slot(i int, s hook.Settings) {
	g.Begin(SlotFunc(i))
	g.Emit(
		asm.LoadMapPtr(asm.R2, 0).WithReference(SlotRef(i)),
		asm.Mov.Imm(asm.R3, 0),
		asm.FnTailCall.Call(),
		asm.Mov.Imm(asm.R0, missing(s, g.plain)),
		asm.Return(),
	)
}

// SlotFunc is the name of the function that runs the member at i.
func SlotFunc(i int) string { return fmt.Sprintf("member_%d", i) }

// missing is what the function of an empty slot returns. A closed door is
// final even where the chain would continue on that verdict.
func missing(s hook.Settings, plain bool) int32 {
	switch {
	case s.OnMissing == hook.MissingDrop && !plain && s.ContinueOn.Has(hook.Drop):
		return missingDrop
	case s.OnMissing == hook.MissingDrop:
		return int32(hook.Drop)
	case s.OnMissing == hook.MissingAborted && !plain && s.ContinueOn.Has(hook.Aborted):
		return missingAborted
	case s.OnMissing == hook.MissingAborted:
		return int32(hook.Aborted)
	case plain:
		return int32(hook.Pass)
	}
	return missingContinue
}
