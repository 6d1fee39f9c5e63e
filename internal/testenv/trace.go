package testenv

import (
	"fmt"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// Trace records the order in which programs saw a packet. Programs on cgroup hooks without packets
// ([On]) record each of their runs.
type Trace struct {
	port int
	log  *ebpf.Map
}

// traceLog is the only value of the map that the programs share. Datagrams of this package begin with 8
// bytes of their own. When a program meets a datagram with other bytes than those in Packet, the log
// starts again.
type traceLog struct {
	Packet  uint64
	Count   uint64
	Numbers [64]uint32
}

// NewTrace starts a trace of UDP datagrams to a port, IPv4 and IPv6, sent with [Pair.Send] and its kin.
func NewTrace(t testing.TB, port int) *Trace {
	t.Helper()
	log := newMap(t, &ebpf.MapSpec{
		Name:       "ldt_trace",
		Type:       ebpf.Array,
		KeySize:    4,
		ValueSize:  16 + 64*4,
		MaxEntries: 1,
	})
	return &Trace{port: port, log: log}
}

// Program loads a program that records its number. The verdict is for the traced datagrams; the
// program passes all other packets, as [DropUDPPort] does.
func (tr *Trace) Program(t testing.TB, number, verdict int, opts ...ProgramOption) *ebpf.Program {
	t.Helper()
	return Load(t, tr.Spec(number, verdict, opts...))
}

// Spec returns the program of [Trace.Program] without loading it.
func (tr *Trace) Spec(number, verdict int, opts ...ProgramOption) *ebpf.ProgramSpec {
	const (
		payload = 8
		packet  = 0
		count   = 8
		numbers = 16
	)
	spec := newSpec(fmt.Sprintf("ldt_trace_%d", number), opts)
	record := asm.Instructions{
		asm.LoadMem(asm.R3, asm.R2, count, asm.DWord).WithSymbol("record"),
		asm.JGE.Imm(asm.R3, 64, "verdict"),
		asm.Mov.Reg(asm.R4, asm.R3),
		asm.LSh.Imm(asm.R4, 2),
		asm.Add.Reg(asm.R4, asm.R2),
		asm.StoreImm(asm.R4, numbers, int64(number), asm.Word),
		asm.Add.Imm(asm.R3, 1),
		asm.StoreMem(asm.R2, count, asm.R3, asm.DWord),

		asm.Mov.Imm(asm.R0, int32(verdict)).WithSymbol("verdict"),
		asm.Return(),
	}
	view, seesPackets := views[spec.Type]
	if !seesPackets {
		spec.Instructions = append(asm.Instructions{asm.LoadMapValue(asm.R2, tr.log.FD(), 0)}, record...)
		return spec
	}
	insns := append(need(payload+8),
		asm.LoadMem(asm.R1, asm.R6, payload, asm.DWord),
		asm.LoadMapValue(asm.R2, tr.log.FD(), 0),
		asm.LoadMem(asm.R3, asm.R2, packet, asm.DWord),
		asm.JEq.Reg(asm.R1, asm.R3, "record"),
		asm.StoreMem(asm.R2, packet, asm.R1, asm.DWord),
		asm.Mov.Imm(asm.R3, 0),
		asm.StoreMem(asm.R2, count, asm.R3, asm.DWord),
	)
	spec.Instructions = onUDPPort(view, tr.port, view.pass, append(insns, record...))
	return spec
}

// Last returns the numbers of the programs that saw the last traced packet, in order, or nil when no packet
// was seen since the start or [Trace.Reset]. Runs without a packet are recorded since the same time, up to 64
// of them.
func (tr *Trace) Last(t testing.TB) []int {
	t.Helper()
	var log traceLog
	if err := tr.log.Lookup(uint32(0), &log); err != nil {
		t.Fatalf("read trace: %v", err)
	}
	var numbers []int
	for _, n := range log.Numbers[:log.Count] {
		numbers = append(numbers, int(n))
	}
	return numbers
}

// Reset empties the log.
func (tr *Trace) Reset(t testing.TB) {
	t.Helper()
	if err := tr.log.Put(uint32(0), traceLog{}); err != nil {
		t.Fatalf("reset trace: %v", err)
	}
}
