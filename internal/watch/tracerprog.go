package watch

import (
	"encoding/binary"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"
)

// exit stands for the end of a process, in the place of a command.
const exit = 0xffffffff

// Where the descriptor of the object is that a call is about.
const (
	first  = iota // in the first attribute
	third         // in the third
	result        // the call returns it
	none          // it is not looked at
)

// traced are the commands that attach or detach something. A look makes no such calls.
var traced = []struct {
	cmd, fd int32
}{
	{unix.BPF_MAP_UPDATE_ELEM, first},
	{unix.BPF_OBJ_PIN, third},
	{unix.BPF_PROG_ATTACH, none},
	{unix.BPF_PROG_DETACH, none},
	{unix.BPF_LINK_CREATE, result},
	{unix.BPF_LINK_UPDATE, first},
	{unix.BPF_LINK_DETACH, first},
}

// callSize is the size of a record that the programs write: process, command, id of the
// link or slot, attach type, name, time. Of a pin the id of the object is written twice, in
// the place of the attach type as if the object were a map, since what it is is not known.
const callSize = 40

func parseCall(b []byte) (call, bool) {
	if len(b) < callSize {
		return call{}, false
	}
	u := binary.NativeEndian.Uint32
	return call{pid: int(u(b)), cmd: u(b[4:]), id: u(b[8:]), attach: u(b[12:]), comm: unix.ByteSliceToString(b[16:32]), at: binary.NativeEndian.Uint64(b[32:])}, true
}

func (t *tracer) load(o offsets) error {
	for _, spec := range []*ebpf.MapSpec{
		{Name: "ld_calls", Type: ebpf.RingBuf, MaxEntries: 1 << 18},
		{Name: "ld_pending", Type: ebpf.LRUHash, KeySize: 8, ValueSize: 16, MaxEntries: 1 << 10},
		{Name: "ld_makers", Type: ebpf.LRUHash, KeySize: 4, ValueSize: 4, MaxEntries: 1 << 12},
		{Name: "ld_overflows", Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1},
	} {
		m, err := ebpf.NewMap(spec)
		if err != nil {
			return err
		}
		t.maps = append(t.maps, m)
	}
	events, pending, makers, overflows := t.maps[0], t.maps[1], t.maps[2], t.maps[3]
	t.overflows = overflows
	var err error
	if t.reader, err = ringbuf.NewReader(events); err != nil {
		return err
	}
	emit := emitTo(events, overflows)
	for _, spec := range []*ebpf.ProgramSpec{
		{Name: "ld_bpf_enter", Type: ebpf.TracePoint, Instructions: onEnter(pending)},
		{Name: "ld_bpf_exit", Type: ebpf.TracePoint, Instructions: onExit(o, pending, makers, emit)},
		{Name: "ld_end", Type: ebpf.RawTracepoint, Instructions: onEnd(makers, emit)},
	} {
		spec.License = "Dual BSD/GPL"
		p, err := ebpf.NewProgram(spec)
		if err != nil {
			return fmt.Errorf("program %s: %w", spec.Name, err)
		}
		t.programs = append(t.programs, p)
	}
	return nil
}

// Offsets on the programs' stacks.
const (
	keyAt     = -8  // process and thread
	pendingAt = -24 // command, and the first 12 bytes of its attributes
	scratchAt = -32 // a pointer between two steps
	callAt    = -72
	makerAt   = -80
)

// onEnter saves the arguments of a call, because the process may overwrite them later.
func onEnter(pending *ebpf.Map) asm.Instructions {
	const cmd, attr = 16, 24 // in the tracepoint's context
	insns := asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.FnGetCurrentPidTgid.Call(),
		asm.StoreMem(asm.RFP, keyAt, asm.R0, asm.DWord),
		asm.LoadMem(asm.R7, asm.R6, cmd, asm.DWord),
	}
	for _, c := range traced {
		insns = append(insns, asm.JEq.Imm(asm.R7, c.cmd, "traced"))
	}
	return append(insns,
		asm.Ja.Label("out"),
		asm.StoreMem(asm.RFP, pendingAt, asm.R7, asm.Word).WithSymbol("traced"),
		asm.StoreImm(asm.RFP, pendingAt+4, 0, asm.Word),
		asm.StoreImm(asm.RFP, pendingAt+8, 0, asm.Word),
		asm.StoreImm(asm.RFP, pendingAt+12, 0, asm.Word),
		asm.Mov.Reg(asm.R1, asm.RFP),
		asm.Add.Imm(asm.R1, pendingAt+4),
		asm.Mov.Imm(asm.R2, 12),
		asm.LoadMem(asm.R3, asm.R6, attr, asm.DWord),
		asm.FnProbeReadUser.Call(),
		asm.LoadMapPtr(asm.R1, pending.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, keyAt),
		asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, pendingAt),
		asm.Mov.Imm(asm.R4, 0),
		asm.FnMapUpdateElem.Call(),
		asm.Mov.Imm(asm.R0, 0).WithSymbol("out"),
		asm.Return(),
	)
}

// onExit reports a call that succeeded, with the id of the call's object.
func onExit(o offsets, pending, makers *ebpf.Map, emit asm.Instructions) asm.Instructions {
	const ret = 16
	insns := asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.FnGetCurrentPidTgid.Call(),
		asm.StoreMem(asm.RFP, keyAt, asm.R0, asm.DWord),
		asm.LoadMapPtr(asm.R1, pending.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, keyAt),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.LoadMem(asm.R7, asm.R0, 0, asm.Word),  // command
		asm.LoadMem(asm.R8, asm.R0, 4, asm.Word),  // first attribute: a descriptor
		asm.LoadMem(asm.R9, asm.R0, 12, asm.Word), // third: the attach type, or a descriptor
		asm.LoadMapPtr(asm.R1, pending.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, keyAt),
		asm.FnMapDeleteElem.Call(),
		asm.LoadMem(asm.R1, asm.R6, ret, asm.DWord),
		asm.JSLT.Imm(asm.R1, 0, "out"),

		asm.StoreMem(asm.RFP, callAt+4, asm.R7, asm.Word),
		asm.StoreImm(asm.RFP, callAt+8, 0, asm.Word),
		asm.StoreMem(asm.RFP, callAt+12, asm.R9, asm.Word),
	}
	for _, c := range traced {
		switch c.fd {
		case third:
			insns = append(insns,
				asm.JNE.Imm(asm.R7, c.cmd, "not the third"),
				asm.Mov.Reg(asm.R8, asm.R9),
				asm.Ja.Label("find"),
				asm.Mov.Imm(asm.R0, 0).WithSymbol("not the third"),
			)
		case result:
			insns = append(insns,
				asm.JNE.Imm(asm.R7, c.cmd, "not the result"),
				asm.Mov.Reg(asm.R8, asm.R1),
				asm.Ja.Label("find"),
				asm.Mov.Imm(asm.R0, 0).WithSymbol("not the result"),
			)
		case none:
			insns = append(insns, asm.JEq.Imm(asm.R7, c.cmd, "report"))
		}
	}
	follow := func(offset int32) asm.Instructions {
		return asm.Instructions{
			asm.Add.Imm(asm.R3, offset),
			asm.Mov.Reg(asm.R1, asm.RFP),
			asm.Add.Imm(asm.R1, scratchAt),
			asm.Mov.Imm(asm.R2, 8),
			asm.FnProbeReadKernel.Call(),
			asm.JNE.Imm(asm.R0, 0, "out"),
			asm.LoadMem(asm.R3, asm.RFP, scratchAt, asm.DWord),
		}
	}
	number := func(object asm.Register, offset int32, to int32) asm.Instructions {
		return asm.Instructions{
			asm.Mov.Reg(asm.R3, object),
			asm.Add.Imm(asm.R3, offset),
			asm.Mov.Reg(asm.R1, asm.RFP),
			asm.Add.Imm(asm.R1, to),
			asm.Mov.Imm(asm.R2, 4),
			asm.FnProbeReadKernel.Call(),
		}
	}
	insns = append(insns,
		asm.FnGetCurrentTask.Call().WithSymbol("find"),
		asm.Mov.Reg(asm.R3, asm.R0),
	)
	for _, offset := range []int32{o.files, o.fdt, o.fd} {
		insns = append(insns, follow(offset)...)
	}
	insns = append(insns, asm.LSh.Imm(asm.R8, 3), asm.Add.Reg(asm.R3, asm.R8))
	insns = append(insns, follow(0)...)
	insns = append(insns, follow(o.private)...)
	insns = append(insns,
		asm.Mov.Reg(asm.R8, asm.R3),
		asm.JEq.Imm(asm.R7, unix.BPF_OBJ_PIN, "pin"),
		asm.JNE.Imm(asm.R7, unix.BPF_MAP_UPDATE_ELEM, "link"),
	)
	insns = append(insns, number(asm.R8, o.mapType, scratchAt)...)
	insns = append(insns,
		asm.LoadMem(asm.R1, asm.RFP, scratchAt, asm.Word),
		asm.JNE.Imm(asm.R1, int32(ebpf.ProgramArray), "out"), // not a slot
	)
	insns = append(insns, number(asm.R8, o.mapID, callAt+8)...)
	insns = append(insns, asm.Ja.Label("maker"))
	toPinned := number(asm.R8, o.mapID, callAt+12)
	toPinned[0] = toPinned[0].WithSymbol("pin")
	insns = append(insns, toPinned...)
	toLink := number(asm.R8, o.linkID, callAt+8)
	toLink[0] = toLink[0].WithSymbol("link")
	insns = append(insns, toLink...)
	insns = append(insns,
		asm.JNE.Imm(asm.R7, unix.BPF_LINK_CREATE, "report"),

		asm.LoadMem(asm.R1, asm.RFP, keyAt, asm.DWord).WithSymbol("maker"),
		asm.RSh.Imm(asm.R1, 32),
		asm.StoreMem(asm.RFP, makerAt, asm.R1, asm.Word),
		asm.LoadMapPtr(asm.R1, makers.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, makerAt),
		asm.Mov.Reg(asm.R3, asm.R2),
		asm.Mov.Imm(asm.R4, 0),
		asm.FnMapUpdateElem.Call(),
		asm.LoadMem(asm.R1, asm.RFP, keyAt, asm.DWord).WithSymbol("report"),
		asm.RSh.Imm(asm.R1, 32),
		asm.StoreMem(asm.RFP, callAt, asm.R1, asm.Word),
	)
	return append(insns, emit...)
}

// onEnd reports the end of a process that made a link or filled a slot.
func onEnd(makers *ebpf.Map, emit asm.Instructions) asm.Instructions {
	return append(asm.Instructions{
		asm.FnGetCurrentPidTgid.Call(),
		asm.Mov.Reg32(asm.R1, asm.R0),
		asm.RSh.Imm(asm.R0, 32),
		asm.JNE.Reg(asm.R0, asm.R1, "out"), // only the first thread
		asm.StoreMem(asm.RFP, makerAt, asm.R0, asm.Word),
		asm.StoreMem(asm.RFP, callAt, asm.R0, asm.Word),
		asm.StoreImm(asm.RFP, callAt+4, -1, asm.Word),
		asm.StoreImm(asm.RFP, callAt+8, 0, asm.Word),
		asm.StoreImm(asm.RFP, callAt+12, 0, asm.Word),
		asm.LoadMapPtr(asm.R1, makers.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, makerAt),
		asm.FnMapDeleteElem.Call(),
		asm.JNE.Imm(asm.R0, 0, "out"), // the process made nothing
	}, emit...)
}

// emitTo returns the end of a program, which adds name and time and writes the record.
func emitTo(events, overflows *ebpf.Map) asm.Instructions {
	return asm.Instructions{
		asm.Mov.Reg(asm.R1, asm.RFP),
		asm.Add.Imm(asm.R1, callAt+16),
		asm.Mov.Imm(asm.R2, 16),
		asm.FnGetCurrentComm.Call(),
		asm.FnKtimeGetNs.Call(),
		asm.StoreMem(asm.RFP, callAt+32, asm.R0, asm.DWord),
		asm.LoadMapPtr(asm.R1, events.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, callAt),
		asm.Mov.Imm(asm.R3, callSize),
		asm.Mov.Imm(asm.R4, 0),
		asm.FnRingbufOutput.Call(),
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.LoadMapValue(asm.R1, overflows.FD(), 0),
		asm.Mov.Imm(asm.R2, 1),
		asm.AddAtomic.Mem(asm.R1, asm.R2, asm.DWord, 0),
		asm.Mov.Imm(asm.R0, 0).WithSymbol("out"),
		asm.Return(),
	}
}
