package testenv

import (
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// The verdicts of XDP programs.
const (
	XDPAborted = iota
	XDPDrop
	XDPPass
	XDPTX
)

const license = "Dual BSD/GPL"

// ProgramOption changes how a test program is loaded. Without options it is what clang and libbpf make
// of SEC("xdp"): expected attach type BPF_XDP, no frags.
type ProgramOption func(*ebpf.ProgramSpec)

// ExpectedAttachType loads the program for another attach type, [ebpf.AttachNone] for instance.
func ExpectedAttachType(attach ebpf.AttachType) ProgramOption {
	return func(spec *ebpf.ProgramSpec) { spec.AttachType = attach }
}

// Frags declares that the program understands packets in fragments.
func Frags() ProgramOption {
	return func(spec *ebpf.ProgramSpec) { spec.Flags |= unix.BPF_F_XDP_HAS_FRAGS }
}

// VerdictProgram loads a program that gives every packet the same verdict.
func VerdictProgram(t testing.TB, name string, verdict int, opts ...ProgramOption) *ebpf.Program {
	t.Helper()
	return Load(t, VerdictSpec(name, verdict, opts...))
}

// VerdictSpec is the program of [VerdictProgram], not loaded.
func VerdictSpec(name string, verdict int, opts ...ProgramOption) *ebpf.ProgramSpec {
	return newSpec(name, asm.Instructions{
		asm.Mov.Imm(asm.R0, int32(verdict)),
		asm.Return(),
	}, opts)
}

// DropUDPPort loads a program that drops UDP datagrams to a port, IPv4 and IPv6, and passes the rest.
func DropUDPPort(t testing.TB, name string, port int, opts ...ProgramOption) *ebpf.Program {
	t.Helper()
	return Load(t, DropUDPPortSpec(name, port, opts...))
}

// DropUDPPortSpec is the program of [DropUDPPort], not loaded.
func DropUDPPortSpec(name string, port int, opts ...ProgramOption) *ebpf.ProgramSpec {
	return newSpec(name, onUDPPort(port, XDPPass, asm.Instructions{
		asm.Mov.Imm(asm.R0, XDPDrop),
		asm.Return(),
	}), opts)
}

// CountProgram loads a program that counts UDP datagrams to a port, IPv4 and IPv6, and a function that
// returns the number so far. Its verdict is the same for every packet.
func CountProgram(t testing.TB, name string, port, verdict int, opts ...ProgramOption) (*ebpf.Program, func() int) {
	t.Helper()
	counter := newMap(t, &ebpf.MapSpec{Name: "ldt_count", Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	prog := Load(t, CountSpec(name, counter, port, verdict, opts...))
	return prog, func() int {
		t.Helper()
		var n uint64
		if err := counter.Lookup(uint32(0), &n); err != nil {
			t.Fatalf("read counter: %v", err)
		}
		return int(n)
	}
}

// CountSpec is the program of [CountProgram], not loaded. It counts in the first entry of counter, an
// array of 64-bit numbers.
func CountSpec(name string, counter *ebpf.Map, port, verdict int, opts ...ProgramOption) *ebpf.ProgramSpec {
	return newSpec(name, onUDPPort(port, verdict, asm.Instructions{
		asm.LoadMapValue(asm.R1, counter.FD(), 0),
		asm.Mov.Imm(asm.R2, 1),
		asm.AddAtomic.Mem(asm.R1, asm.R2, asm.DWord, 0),
		asm.Mov.Imm(asm.R0, int32(verdict)),
		asm.Return(),
	}), opts)
}

// Load loads a program for the length of the test.
func Load(t testing.TB, spec *ebpf.ProgramSpec) *ebpf.Program {
	t.Helper()
	if !strings.HasPrefix(spec.Name, "ldt_") || len(spec.Name) >= unix.BPF_OBJ_NAME_LEN {
		t.Fatalf("program name %q: needs the prefix ldt_ for CheckLeaks and at most %d characters", spec.Name, unix.BPF_OBJ_NAME_LEN-1)
	}
	prog, err := ebpf.NewProgram(spec)
	if err != nil {
		t.Fatalf("load %s: %+v", spec.Name, err)
	}
	t.Cleanup(func() { prog.Close() })
	return prog
}

func newMap(t testing.TB, spec *ebpf.MapSpec) *ebpf.Map {
	t.Helper()
	m, err := ebpf.NewMap(spec)
	if err != nil {
		t.Fatalf("create map %s: %v", spec.Name, err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

func newSpec(name string, insns asm.Instructions, opts []ProgramOption) *ebpf.ProgramSpec {
	spec := &ebpf.ProgramSpec{
		Name:         name,
		Type:         ebpf.XDP,
		AttachType:   ebpf.AttachXDP,
		Instructions: insns,
		License:      license,
	}
	for _, opt := range opts {
		opt(spec)
	}
	return spec
}

// onUDPPort is a program that runs then for UDP datagrams to a port, IPv4 and IPv6 without options, and
// gives other packets a verdict. Then finds the UDP header at R6 and the end of the packet at R7.
func onUDPPort(port, other int, then asm.Instructions) asm.Instructions {
	const (
		ethernet = 14
		ipv4     = 20
		ipv6     = 40
		udp      = 8
	)
	insns := asm.Instructions{
		asm.LoadMem(asm.R6, asm.R1, 0, asm.Word), // xdp_md.data
		asm.LoadMem(asm.R7, asm.R1, 4, asm.Word), // xdp_md.data_end
	}
	insns = append(insns, need(ethernet+ipv4)...)
	insns = append(insns,
		asm.LoadMem(asm.R1, asm.R6, 12, asm.Half),
		asm.HostTo(asm.BE, asm.R1, asm.Half),
		asm.JEq.Imm(asm.R1, unix.ETH_P_IP, "ipv4"),
		asm.JNE.Imm(asm.R1, unix.ETH_P_IPV6, "other"),
		asm.LoadMem(asm.R1, asm.R6, ethernet+6, asm.Byte),
		asm.Add.Imm(asm.R6, ethernet+ipv6),
		asm.Ja.Label("transport"),

		asm.LoadMem(asm.R1, asm.R6, ethernet+9, asm.Byte).WithSymbol("ipv4"),
		asm.Add.Imm(asm.R6, ethernet+ipv4),

		asm.JNE.Imm(asm.R1, unix.IPPROTO_UDP, "other").WithSymbol("transport"),
	)
	insns = append(insns, need(udp)...)
	insns = append(insns,
		asm.LoadMem(asm.R1, asm.R6, 2, asm.Half),
		asm.HostTo(asm.BE, asm.R1, asm.Half),
		asm.JNE.Imm(asm.R1, int32(port), "other"),
	)
	insns = append(insns, then...)
	return append(insns,
		asm.Mov.Imm(asm.R0, int32(other)).WithSymbol("other"),
		asm.Return(),
	)
}

// need jumps to other when the packet has fewer than n bytes at R6.
func need(n int32) asm.Instructions {
	return asm.Instructions{
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Add.Imm(asm.R1, n),
		asm.JGT.Reg(asm.R1, asm.R7, "other"),
	}
}
