package dispatch

import "github.com/cilium/ebpf/asm"

// References of the code below. AssociateMap resolves them.
const (
	StandInSlot = "slot" // a prog array of one entry: the program that the stand-in runs
	StandInMark = "mark" // a per-CPU array of one 64-bit number
)

// A stand-in is a TC program that runs a member's program while the member
// moves. TCX accepts a program only once on a hook, but during a move each
// packet must meet the member exactly once. So while the old and the new link
// both exist, each carries a stand-in. The two agree for each packet by a mark:
// a CPU takes a packet through all programs before it starts another.
const (
	// StandInFirst is for the link that packets meet first: it sets the mark
	// and runs the program.
	StandInFirst = "ld_first"
	// StandInSecond runs the program unless the mark is set, and clears the
	// mark.
	StandInSecond = "ld_second"
	// StandInAway clears the mark and runs nothing. It is for the first link
	// when the second one is to run the program again.
	StandInAway = "ld_away"
)

// tcxNext is TCX_NEXT, and TC_ACT_UNSPEC: continue as if the program were not
// there.
const tcxNext = -1

// StandIn returns the code of a stand-in.
func StandIn(name string) asm.Instructions {
	insns := asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1).WithSymbol(name),
		asm.Mov.Imm(asm.R1, 0),
		asm.StoreMem(asm.R10, -4, asm.R1, asm.Word),
		asm.Mov.Reg(asm.R2, asm.R10),
		asm.Add.Imm(asm.R2, -4),
		asm.LoadMapPtr(asm.R1, 0).WithReference(StandInMark),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "run"), // never: the array has the entry
	}
	switch name {
	case StandInFirst:
		insns = append(insns,
			asm.Mov.Imm(asm.R1, 1),
			asm.StoreMem(asm.R0, 0, asm.R1, asm.DWord),
		)
	case StandInSecond:
		insns = append(insns,
			asm.LoadMem(asm.R1, asm.R0, 0, asm.DWord),
			asm.JEq.Imm(asm.R1, 0, "run"),
			asm.Mov.Imm(asm.R1, 0),
			asm.StoreMem(asm.R0, 0, asm.R1, asm.DWord),
			asm.Ja.Label("next"),
		)
	case StandInAway:
		insns = append(insns,
			asm.Mov.Imm(asm.R1, 0),
			asm.StoreMem(asm.R0, 0, asm.R1, asm.DWord),
			asm.Ja.Label("next"),
		)
	}
	return append(insns,
		asm.Mov.Reg(asm.R1, asm.R6).WithSymbol("run"),
		asm.LoadMapPtr(asm.R2, 0).WithReference(StandInSlot),
		asm.Mov.Imm(asm.R3, 0),
		asm.FnTailCall.Call(),
		asm.Mov.Imm(asm.R0, tcxNext).WithSymbol("next"),
		asm.Return(),
	)
}

// IsStandIn tells whether a program of that name is a stand-in.
func IsStandIn(name string) bool {
	return name == StandInFirst || name == StandInSecond || name == StandInAway
}

// IsOurs tells whether a program of that name is generated here. Its maps are slots:
// do not open them.
func IsOurs(name string) bool { return name == ProgramName || IsStandIn(name) }
