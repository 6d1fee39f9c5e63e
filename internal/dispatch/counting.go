package dispatch

import (
	"fmt"

	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/code"
)

// CountingName is the name of every counting dispatcher in the kernel.
const CountingName = "ld_counting"

// References of the code below. AssociateMap resolves them.
const (
	WatchRef  = "watch"  // a prog array of one entry: the counting dispatcher, while a process watches
	CountsRef = "counts" // a per-CPU array of one entry: a Counts for each slot
)

// Counts are what a counting dispatcher counts for one slot, laid out as in the map.
type Counts struct {
	Verdicts [hook.Verdicts]uint64 // how often the member returned each verdict
	Other    uint64                // how often it returned another value
	Empty    uint64                // how often the slot was empty
	Nanos    uint64                // how long the member took, the clock's time included
}

// Plus adds two counts.
func (c Counts) Plus(d Counts) Counts {
	for v := range d.Verdicts {
		c.Verdicts[v] += d.Verdicts[v]
	}
	c.Other, c.Empty, c.Nanos = c.Other+d.Other, c.Empty+d.Empty, c.Nanos+d.Nanos
	return c
}

// Minus returns the counts since d.
func (c Counts) Minus(d Counts) Counts {
	for v := range d.Verdicts {
		c.Verdicts[v] -= d.Verdicts[v]
	}
	c.Other, c.Empty, c.Nanos = c.Other-d.Other, c.Empty-d.Empty, c.Nanos-d.Nanos
	return c
}

// Ran returns how often the member ran.
func (c Counts) Ran() uint64 {
	n := c.Other
	for _, said := range c.Verdicts {
		n += said
	}
	return n
}

// Offsets in a Counts, for the code. Other follows the verdicts.
const (
	CountsSize = 8 * (hook.Verdicts + 3)
	otherAt    = 8 * hook.Verdicts
	emptyAt    = otherAt + 8
	nanosAt    = emptyAt + 8
)

// Counting returns the code of a dispatcher that does what [Link]'s code does,
// and counts. It runs instead of the plain dispatcher while a process watches,
// so counting may cost time. Correct times need the clock at both ends of each
// member, but the end of one member is the beginning of the next.
//
// R6 holds the context, R7 the verdict of the last member that ran, R8 the
// counters, R9 the time.
func Counting(slots []hook.Settings) asm.Instructions {
	var g generator // not plain: a slot's function says when it is empty
	g.Begin(code.Static(CountingName))
	g.Emit(
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.Mov.Imm(asm.R7, int32(hook.Pass)),
		asm.Mov.Imm(asm.R1, 0),
		asm.StoreMem(asm.R10, -4, asm.R1, asm.Word),
		asm.Mov.Reg(asm.R2, asm.R10),
		asm.Add.Imm(asm.R2, -4),
		asm.LoadMapPtr(asm.R1, 0).WithReference(CountsRef),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "exit"), // never: the array has the entry
		asm.Mov.Reg(asm.R8, asm.R0),
		asm.FnKtimeGetNs.Call(),
		asm.Mov.Reg(asm.R9, asm.R0),
	)
	for i, s := range slots {
		g.count(i, s, i == len(slots)-1)
	}
	g.Label("exit")
	g.Emit(asm.Mov.Reg(asm.R0, asm.R7), asm.Return())
	for i := range slots {
		g.slot(i, hook.Settings{OnMissing: hook.MissingContinue})
	}
	return g.Insns
}

// count runs the member at i, counts, and decides whether the chain goes on.
func (g *generator) count(i int, s hook.Settings, last bool) {
	base := int16(i * CountsSize)
	next, empty, bucket := fmt.Sprintf("next_%d", i), fmt.Sprintf("empty_%d", i), fmt.Sprintf("bucket_%d", i)
	if last {
		next = "exit"
	}
	add := func(at int16, register asm.Register) asm.Instructions {
		return asm.Instructions{
			asm.LoadMem(asm.R2, asm.R8, at, asm.DWord),
			asm.Add.Reg(asm.R2, register),
			asm.StoreMem(asm.R8, at, asm.R2, asm.DWord),
		}
	}

	g.Emit(
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Call.Label(SlotFunc(i)),
		asm.JEq.Imm32(asm.R0, missingContinue, empty),
		asm.Mov.Reg(asm.R7, asm.R0),
		asm.FnKtimeGetNs.Call(),
		asm.Mov.Reg(asm.R1, asm.R0),
		asm.Sub.Reg(asm.R1, asm.R9),
		asm.Mov.Reg(asm.R9, asm.R0),
	)
	g.Emit(add(base+nanosAt, asm.R1)...)
	g.Emit( // a CPU handles one packet at a time, so atomic additions are not needed
		asm.Mov.Reg32(asm.R1, asm.R7),
		asm.JLT.Imm(asm.R1, hook.Verdicts, bucket),
		asm.Mov.Imm(asm.R1, hook.Verdicts),
	)
	g.Label(bucket)
	g.Emit(
		asm.LSh.Imm(asm.R1, 3),
		asm.Mov.Reg(asm.R2, asm.R8),
		asm.Add.Reg(asm.R2, asm.R1),
		asm.LoadMem(asm.R1, asm.R2, base, asm.DWord),
		asm.Add.Imm(asm.R1, 1),
		asm.StoreMem(asm.R2, base, asm.R1, asm.DWord),
	)
	closed := s.OnMissing != hook.MissingContinue
	if !last {
		for _, v := range s.ContinueOn.List() {
			g.Emit(asm.JEq.Imm32(asm.R7, int32(v), next))
		}
		if closed && len(s.ContinueOn.List()) == 0 {
			// No verdict continues, but the verifier must see a way to the next
			// member.
			g.Emit(asm.JEq.Imm32(asm.R7, missingContinue, next))
		}
	}
	g.Emit(asm.Ja.Label("exit"))

	g.Label(empty)
	g.Emit(asm.Mov.Imm(asm.R1, 1))
	g.Emit(add(base+emptyAt, asm.R1)...)
	if closed {
		verdict := hook.Drop
		if s.OnMissing == hook.MissingAborted {
			verdict = hook.Aborted
		}
		g.Emit(asm.Mov.Imm(asm.R7, int32(verdict)), asm.Ja.Label("exit"))
	}
	if !last {
		g.Label(next)
	}
}

// Watched returns the code of a watched dispatcher: insns behind a tail call
// into the prog array of the watch. When that array is empty, because the
// watcher is gone, insns run.
func Watched(insns asm.Instructions) asm.Instructions {
	first := insns[0]
	watched := asm.Instructions{
		btf.WithFuncMetadata(asm.Mov.Reg(asm.R6, asm.R1).WithSymbol(first.Symbol()), btf.FuncMetadata(&first)).WithSource(first.Source()),
		asm.LoadMapPtr(asm.R2, 0).WithReference(WatchRef),
		asm.Mov.Imm(asm.R3, 0),
		asm.FnTailCall.Call(),
		asm.Mov.Reg(asm.R1, asm.R6),
		btf.WithFuncMetadata(first.WithSymbol(""), nil),
	}
	return append(watched, insns[1:]...)
}

// ClockCalls is how often [Clock]'s code reads the clock.
const ClockCalls = 64

// Clock returns the code of a program that returns the time that ClockCalls
// readings of the clock take, in nanoseconds.
func Clock() asm.Instructions {
	insns := asm.Instructions{
		asm.FnKtimeGetNs.Call(),
		asm.Mov.Reg(asm.R6, asm.R0),
	}
	for range ClockCalls {
		insns = append(insns, asm.FnKtimeGetNs.Call())
	}
	return append(insns, asm.Sub.Reg(asm.R0, asm.R6), asm.Return())
}
