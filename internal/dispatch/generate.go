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

// Link returns the code of the dispatcher.
//
// For each slot but the last, main calls a function that tail-calls into the
// slot's prog array: the tail-called program returns to main. When the slot is
// empty the tail call falls through and the function returns the slot's default.
// These functions must be global: of a static one the verifier would conclude
// that it always returns that default, because it does not follow tail calls.
// The last member's verdict is the chain's whatever it is, so main tail-calls
// that one itself and does not come back.
//
// The verdict of a chain is that of the last member that ran, and PASS when
// none did. Comparisons are on 32 bits, as the kernel takes the verdict.
//
// Members that have a code, at the same place in codes, are linked into it; nil is
// a chain without any. Such a member is a global function, so that the verifier
// looks at it once by itself and not at all its ways together with those of the
// members after it. With inline, those that are not large stand in the place of
// their call, which is faster, and more for the verifier to look at. The last one
// needs no call in any case if it is the only one.
func Link(slots []hook.Settings, codes []*Code, inline bool) asm.Instructions {
	g := generator{Writer: code.Writer{Lines: codes != nil}, plain: true, layout: newLayout(slots, codes, inline)}
	for _, s := range slots[:max(len(slots)-1, 0)] {
		g.plain = g.plain && s.ContinueOn == hook.SetOf(hook.Pass)
	}

	g.Begin(ProgramName)
	if len(slots) > 1 {
		g.Emit(g.context.store(asm.R1))
	}
	if len(slots) == 0 {
		g.Emit(asm.Mov.Imm(asm.R0, int32(hook.Pass)))
	} else if !g.plain {
		g.Emit(g.verdict.storeImm(int32(hook.Pass)))
	}
	last := len(slots) - 1
	for i, s := range slots {
		switch {
		case i < last:
			g.call(i, s)
		case !g.inlined(i):
			g.finish(i, s)
		}
	}
	g.end(last)
	g.Emit(g.behind...)
	for i, s := range slots {
		switch {
		case g.inlined(i): // is a part of main
		case g.linked(i):
			g.function(i)
		case i < last:
			g.slot(i, s)
		}
	}
	return g.Insns
}

// end emits the ends of main. A last member that stands in main has its own, and
// comes after those of the members before it.
func (g *generator) end(last int) {
	inlined := g.inlined(last)
	if inlined && last > 0 {
		g.Emit(asm.Ja.Label("last"))
	}
	if !inlined || last > 0 {
		g.Label("exit")
		g.Emit(asm.Return())
	}
	for _, v := range []hook.Verdict{hook.Drop, hook.Aborted} {
		if g.closes[v] {
			g.Label(v.String())
			g.Emit(asm.Mov.Imm(asm.R0, int32(v)), asm.Return())
		}
	}
	if !inlined {
		return
	}
	if last > 0 {
		g.Label("last")
		g.Emit(g.context.load(asm.R1))
	}
	g.body(last)
}

type generator struct {
	code.Writer
	layout
	// plain: every member but the last continues on PASS alone, so that whenever
	// the chain goes on the verdict is PASS and need not be kept.
	plain  bool
	closes [hook.Verdicts]bool // final verdicts of empty slots that are in use
	behind asm.Instructions    // other functions of members that stand in main
}

// loadContext puts the context into R1 for the member at i.
func (g *generator) loadContext(i int) {
	if i > 0 {
		g.Emit(g.context.load(asm.R1))
	}
}

// call runs the member at i and decides whether the chain goes on.
func (g *generator) call(i int, s hook.Settings) {
	g.loadContext(i)
	if g.inlined(i) {
		g.body(i)
	} else {
		g.Emit(asm.Call.Label(SlotFunc(i)))
	}
	if g.plain {
		// An empty slot that continues returns PASS, one that does not, its
		// verdict: no case of its own is needed.
		g.Emit(asm.JNE.Imm32(asm.R0, int32(hook.Pass), "exit"))
		return
	}

	next := fmt.Sprintf("next_%d", i)
	def := missing(s, false)
	if g.linked(i) {
		def = int32(hook.Pass) // it is never empty
	}
	switch def {
	case missingDrop:
		g.closes[hook.Drop] = true
		g.Emit(asm.JEq.Imm32(asm.R0, missingDrop, hook.Drop.String()))
	case missingAborted:
		g.closes[hook.Aborted] = true
		g.Emit(asm.JEq.Imm32(asm.R0, missingAborted, hook.Aborted.String()))
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
	g.Emit(g.verdict.store(asm.R0))
	for _, v := range verdicts[1:] {
		g.Emit(asm.JEq.Imm32(asm.R0, int32(v), next))
	}
	g.Emit(asm.JNE.Imm32(asm.R0, int32(verdicts[0]), "exit"))
	g.Label(next)
}

// finish runs the last member, at i, whose verdict is final.
func (g *generator) finish(i int, s hook.Settings) {
	g.loadContext(i)
	if g.linked(i) {
		g.Emit(asm.Call.Label(SlotFunc(i)))
		return
	}
	g.tailCall(i)
	if s.OnMissing == hook.MissingContinue && !g.plain {
		g.Emit(g.verdict.load(asm.R0))
	} else {
		g.Emit(asm.Mov.Imm(asm.R0, missing(s, true)))
	}
}

// slot is the function that runs the member at i.
func (g *generator) slot(i int, s hook.Settings) {
	g.Begin(SlotFunc(i))
	g.tailCall(i)
	g.Emit(asm.Mov.Imm(asm.R0, missing(s, g.plain)), asm.Return())
}

// tailCall runs the member at i and does not come back, unless its slot is empty.
func (g *generator) tailCall(i int) {
	g.Emit(
		asm.LoadMapPtr(asm.R2, 0).WithReference(SlotRef(i)),
		asm.Mov.Imm(asm.R3, 0),
		asm.FnTailCall.Call(),
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
