package dispatch

import "github.com/cilium/ebpf/asm"

// References of the code below, to be resolved with AssociateMap.
const (
	StandInSlot = "slot" // a prog array of one entry: the program that is stood in for
	StandInMark = "mark" // a per-CPU array of one 64-bit number
)

// Stand-ins are programs of TC that run another one in its place while it is
// moved. TCX takes no program twice, and there must be no packet that the
// program does not see, nor one that it sees twice: so while the place that it
// leaves and the one that it goes to both exist, one stand-in is at each, and
// they tell each other for the packet at hand, which a CPU takes through all
// programs without doing another one in between.
const (
	// First is for the place that packets come to first: it sets the mark and
	// runs the program.
	StandInFirst = "ld_first"
	// Second runs the program unless the mark is set, which it takes away.
	StandInSecond = "ld_second"
	// Away takes the mark away and runs nothing: it is for the first place when
	// the second is to run the program again.
	StandInAway = "ld_away"
)

// tcxNext is TCX_NEXT, and TC_ACT_UNSPEC: go on as if the program were not there.
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
