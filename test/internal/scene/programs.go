package scene

import (
	"fmt"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// File is a program in one of the test objects.
func File(object, program string) dispatcher.Source {
	return dispatcher.File("../testdata/"+object, dispatcher.LoadOptions{Program: program})
}

// Numbers name the members that tracers become.
var Numbers = []string{"zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"}

// Typed gives the program of a collection the type that libxdp's dispatcher wants.
func Typed(prog *ebpf.ProgramSpec) *ebpf.CollectionSpec {
	prog.Instructions = testenv.Typed(prog.Name, prog.Instructions)
	return Alone(prog)
}

// TracerSource is a tracer that is yet to be loaded.
func (s *Scene) TracerSource(n, verdict int) dispatcher.Source {
	return dispatcher.Spec(Typed(s.Trace.Spec(n, verdict)), dispatcher.LoadOptions{})
}

// TracerRef is the name of a tracer's program.
func TracerRef(n int) string { return fmt.Sprintf("ldt_trace_%d", n) }

// ID is the id of a program.
func ID(t testing.TB, prog *ebpf.Program) ebpf.ProgramID {
	t.Helper()
	info, err := prog.Info()
	qt.Assert(t, qt.IsNil(err))
	id, _ := info.ID()
	return id
}

// CountingOn is a program with a map, which counts the packets and lets them pass.
func CountingOn(h hook.Hook) *ebpf.CollectionSpec {
	prog := testenv.VerdictSpec("ldt_counting", 0, testenv.On(h))
	pass := map[string]int32{"xdp": testenv.XDPPass, "tcx": testenv.TCNext, "tc": testenv.TCNext, "cgroup": testenv.CgroupAllow}[h.Family()]
	prog.Instructions = asm.Instructions{
		asm.LoadMapValue(asm.R1, 0, 0).WithReference("ldt_counts"),
		asm.Mov.Imm(asm.R2, 1),
		asm.AddAtomic.Mem(asm.R1, asm.R2, asm.DWord, 0),
		asm.Mov.Imm(asm.R0, pass),
		asm.Return(),
	}
	counts := &ebpf.MapSpec{Name: "ldt_counts", Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1}
	return &ebpf.CollectionSpec{
		Maps:     map[string]*ebpf.MapSpec{"ldt_counts": counts},
		Programs: map[string]*ebpf.ProgramSpec{"ldt_counting": prog},
	}
}

// Alone is a program in a collection of its own.
func Alone(prog *ebpf.ProgramSpec) *ebpf.CollectionSpec {
	return &ebpf.CollectionSpec{Programs: map[string]*ebpf.ProgramSpec{prog.Name: prog}}
}

// Coded is a program that was loaded from what the library has seen, so that its code is kept.
func Coded(t testing.TB, prog *ebpf.ProgramSpec) *ebpf.Program {
	t.Helper()
	loaded, err := load.Spec{Collection: Alone(prog)}.Load(load.Want{Hook: hook.XDP})
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(loaded.Close)
	return loaded.Program
}
