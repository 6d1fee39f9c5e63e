package libxdp

import (
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// start begins a test that loads programs.
func start(t *testing.T) {
	t.Helper()
	testenv.CheckLeaks(t)
	kernel.RaiseMemlock()
}

// reference is libxdp's verdict for a chain with programs that return these
// values.
func reference(programs []ProgramConfig, returns []byte) uint32 {
	for i, p := range programs {
		if r := returns[i]; r > notAttached || (p.Actions|1<<notAttached)&(1<<r) == 0 {
			return uint32(r)
		}
	}
	return uint32(hook.Pass)
}

// fromPacket is a stub that returns byte n of the packet. It replaces components
// on kernels that refuse them.
func fromPacket(n int) asm.Instructions {
	end := stubFunction(n) + "_end"
	return asm.Instructions{
		asm.LoadMem(asm.R2, asm.R1, 0, asm.Word), // xdp_md.data
		asm.LoadMem(asm.R3, asm.R1, 4, asm.Word), // xdp_md.data_end
		asm.Mov.Reg(asm.R4, asm.R2),
		asm.Add.Imm(asm.R4, int32(n+1)),
		asm.Mov.Imm(asm.R0, 99),
		asm.JGT.Reg(asm.R4, asm.R3, end),
		asm.LoadMem(asm.R0, asm.R2, int16(n), asm.Byte),
		asm.Return().WithSymbol(end),
	}
}

// run returns the verdict of a program for a packet that begins with those bytes.
func run(t *testing.T, prog *ebpf.Program, returns ...byte) uint32 {
	t.Helper()
	packet := make([]byte, 64)
	copy(packet, returns)
	verdict, err := prog.Run(&ebpf.RunOptions{Data: packet})
	qt.Assert(t, qt.IsNil(err))
	return verdict
}

func configOf(version uint8, actions ...uint32) Config {
	c := Config{Version: version}
	for _, a := range actions {
		c.Programs = append(c.Programs, ProgramConfig{Priority: DefaultPriority, Actions: a})
	}
	return c
}

// The generated code must do what libxdp's code does, for all return values.
func TestSemantics(t *testing.T) {
	start(t)
	const pass = 1 << hook.Pass
	masks := []uint32{0, pass, 1 << hook.Drop, pass | 1<<hook.TX, 1<<hook.Verdicts - 1, 1<<notAttached | 1<<hook.Aborted, 1<<30 | 1<<5}
	values := []byte{0, 1, 2, 3, 4, 5, 30, 31, 32, 63, 66, 255}
	check := func(actions ...uint32) {
		t.Helper()
		c := configOf(3, actions...)
		prog, err := loadDispatcher(c, 0, fromPacket)
		qt.Assert(t, qt.IsNil(err))
		defer prog.Close()
		returns := make([]byte, len(actions))
		var each func(i int)
		each = func(i int) {
			if i == len(returns) {
				if got, want := run(t, prog, returns...), reference(c.Programs, returns); got != want {
					t.Errorf("actions %#x, programs return %v: verdict %d, want %d", actions, returns, got, want)
				}
				return
			}
			for _, v := range values {
				returns[i] = v
				each(i + 1)
			}
		}
		each(0)
	}
	for _, a := range masks {
		check(a)
		for _, b := range masks {
			check(a, b)
		}
	}
	check(pass, 0, 1<<hook.Verdicts-1)
	check(1<<hook.Verdicts-1, pass, pass)

	// All positions of a full chain.
	full := configOf(2, slices.Repeat([]uint32{pass}, MaxMembers)...)
	prog, err := loadDispatcher(full, 0, fromPacket)
	qt.Assert(t, qt.IsNil(err))
	defer prog.Close()
	for stop := range MaxMembers {
		returns := slices.Repeat([]byte{byte(hook.Pass)}, MaxMembers)
		returns[stop/2] = notAttached
		returns[stop] = byte(hook.TX)
		qt.Check(t, qt.Equals(run(t, prog, returns...), uint32(hook.TX)))
	}
}

// A dispatcher without components passes everything.
func TestDispatcherAlone(t *testing.T) {
	start(t)
	for n := 1; n <= MaxMembers; n++ {
		prog, err := newDispatcher(configOf(3, make([]uint32, n)...), 0)
		qt.Assert(t, qt.IsNil(err))
		qt.Check(t, qt.Equals(run(t, prog, 1), uint32(hook.Pass)))
		prog.Close()
	}
}
