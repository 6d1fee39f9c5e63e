package dispatch

import (
	"fmt"

	"github.com/cilium/ebpf/asm"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/code"
)

// ProgramName is the name of every dispatcher in the kernel.
const ProgramName = "libdispatcher"

// Values that a slot's function returns for an empty slot when main must tell
// them from verdicts. Any 32-bit values would do that no program returns by
// accident. The kernel treats values above XDP_REDIRECT as ABORTED.
const (
	missingContinue = 0x6c640000
	missingDrop     = missingContinue + 1
	missingAborted  = missingContinue + 2
)

// SlotRef is the symbol by which the code refers to the map of the slot at i.
// asm.Instructions.AssociateMap resolves it before the load.
func SlotRef(i int) string { return fmt.Sprintf("slot_%d", i) }

// Link returns the code of the dispatcher.
//
// For each slot but the last, main calls a function that tail-calls into the
// slot's prog array; the tail-called program returns to main. When the slot is
// empty the tail call falls through, and the function returns the slot's default.
// The last member's verdict is always the chain's verdict, so main tail-calls the
// last member itself and does not return. These functions and main are static, so
// that freplace can put nothing in their place.
//
// The verdict of a chain is the verdict of the last member that ran, or PASS if no
// member ran. Comparisons are on 32 bits, because the kernel reads 32 bits of the
// verdict.
//
// Members with a code at their index in codes are linked into the dispatcher; with
// nil for codes, none are. A linked member is a global function, so the verifier
// checks it once by itself, not again for each path of the members before it; the
// price is that freplace can replace it. With
// inline, small main functions replace their calls. That is faster for packets and
// more work for the verifier. An only member never needs a call.
func Link(slots []hook.Settings, codes []*Code, inline bool) asm.Instructions {
	g := generator{Writer: code.Writer{Lines: codes != nil}, plain: true, layout: newLayout(slots, codes, inline)}
	for _, s := range slots[:max(len(slots)-1, 0)] {
		g.plain = g.plain && s.ContinueOn == hook.SetOf(hook.Pass)
	}

	g.Begin(code.Static(ProgramName))
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
		case g.inlined(i): // part of main
		case g.linked(i):
			g.function(i)
		case i < last:
			g.slot(i, s)
		}
	}
	return g.Insns
}

// end emits the ends of main. A last member that is inlined in main has its own
// ends and comes after the common ones.
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
	// plain: every member but the last continues on PASS only. Whenever the
	// chain continues the verdict is then PASS, and main need not keep it.
	plain  bool
	closes [hook.Verdicts]bool // final verdicts of empty slots that are in use
	behind asm.Instructions    // other functions of inlined members
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
		// An empty slot that continues returns PASS, and a closed one returns
		// its verdict, so empty slots need no case of their own.
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
		// Only an empty slot continues. If that does not continue either, the
		// comparison still shows the verifier a way to the next member.
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

// finish runs the last member, at i. Its verdict is final.
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

// slot emits the function that runs the member at i.
func (g *generator) slot(i int, s hook.Settings) {
	g.Begin(code.Static(SlotFunc(i)))
	g.tailCall(i)
	g.Emit(anything...)
	if value := missing(s, g.plain); value != 0 {
		g.Emit(asm.Add.Imm32(asm.R0, value))
	}
	g.Emit(asm.Return())
}

// anything is 0, but any 32-bit number to the verifier: what is left of a random
// 32-bit number after a shift by 32. The verifier of most kernels does not follow
// tail calls (Linux 7.2 does, 6.12 does not). Of a static function that ends with a
// constant they would conclude that it always returns the constant, and take the
// code for all other verdicts out.
var anything = asm.Instructions{
	asm.FnGetPrandomU32.Call(),
	asm.RSh.Imm(asm.R0, 32),
}

// tailCall runs the member at i. It falls through only if the slot is empty.
func (g *generator) tailCall(i int) {
	g.Emit(
		asm.LoadMapPtr(asm.R2, 0).WithReference(SlotRef(i)),
		asm.Mov.Imm(asm.R3, 0),
		asm.FnTailCall.Call(),
	)
}

// SlotFunc is the name of the function that runs the member at i.
func SlotFunc(i int) string { return fmt.Sprintf("member_%d", i) }

// missing returns what the function of an empty slot returns. The verdict of an
// empty drop or aborted slot is final even where the chain would continue on
// it.
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
