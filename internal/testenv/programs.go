package testenv

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/code"
)

// The verdicts of XDP programs.
const (
	XDPAborted = iota
	XDPDrop
	XDPPass
	XDPTX
)

// The verdicts of programs of TCX and clsact (tcx_action_base and TC_ACT_*, linux/bpf.h and
// linux/pkt_cls.h). After TCNext the next program runs; the other verdicts are final.
const (
	TCNext = -1
	TCPass = 0
	TCDrop = 2
)

// The verdicts of cgroup programs. All programs run, and a single denial
// denies.
const (
	CgroupDeny = iota
	CgroupAllow
)

const license = "Dual BSD/GPL"

// ProgramOption changes how a test program is loaded. Without options the program is what clang and
// libbpf make from SEC("xdp"): expected attach type BPF_XDP, no frags. See [On] for programs of other
// hooks.
type ProgramOption func(*ebpf.ProgramSpec)

// ExpectedAttachType loads the program for another attach type, such as [ebpf.AttachNone].
func ExpectedAttachType(attach ebpf.AttachType) ProgramOption {
	return func(spec *ebpf.ProgramSpec) { spec.AttachType = attach }
}

// Frags declares that the program can handle packets in fragments.
func Frags() ProgramOption {
	return func(spec *ebpf.ProgramSpec) { spec.Flags |= unix.BPF_F_XDP_HAS_FRAGS }
}

// VerdictProgram loads a program that gives every packet the same verdict.
func VerdictProgram(t testing.TB, name string, verdict int, opts ...ProgramOption) *ebpf.Program {
	t.Helper()
	return Load(t, VerdictSpec(name, verdict, opts...))
}

// VerdictSpec returns the program of [VerdictProgram] without loading it.
func VerdictSpec(name string, verdict int, opts ...ProgramOption) *ebpf.ProgramSpec {
	spec := newSpec(name, opts)
	spec.Instructions = asm.Instructions{
		asm.Mov.Imm(asm.R0, int32(verdict)),
		asm.Return(),
	}
	return spec
}

// DropUDPPort loads a program that drops UDP datagrams to a port, IPv4 and IPv6, and passes all other
// packets, to the next program on hooks where a program decides that.
func DropUDPPort(t testing.TB, name string, port int, opts ...ProgramOption) *ebpf.Program {
	t.Helper()
	return Load(t, DropUDPPortSpec(name, port, opts...))
}

// DropUDPPortSpec returns the program of [DropUDPPort] without loading it.
func DropUDPPortSpec(name string, port int, opts ...ProgramOption) *ebpf.ProgramSpec {
	spec := newSpec(name, opts)
	view := viewOf(spec)
	spec.Instructions = onUDPPort(view, port, view.pass, asm.Instructions{
		asm.Mov.Imm(asm.R0, view.drop),
		asm.Return(),
	})
	return spec
}

// CountProgram loads a program that counts UDP datagrams to a port, IPv4 and IPv6, and returns it with
// a function that reads the count. The program gives every packet the same verdict.
func CountProgram(t testing.TB, name string, port, verdict int, opts ...ProgramOption) (*ebpf.Program, func() int) {
	t.Helper()
	counter, count := newCounter(t)
	return Load(t, CountSpec(name, counter, port, verdict, opts...)), count
}

// CountSpec returns the program of [CountProgram] without loading it. It counts in the first entry of
// counter, an array of 64-bit numbers.
func CountSpec(name string, counter *ebpf.Map, port, verdict int, opts ...ProgramOption) *ebpf.ProgramSpec {
	spec := newSpec(name, opts)
	spec.Instructions = onUDPPort(viewOf(spec), port, int32(verdict), counting(counter, verdict))
	return spec
}

// CgroupProgram loads a program for a cgroup hook, and returns it with a function that reads how often it
// ran. Its verdict is always the same. Some hooks do not accept [CgroupDeny], see [CanDeny].
func CgroupProgram(t testing.TB, name string, h hook.Hook, verdict int, opts ...ProgramOption) (*ebpf.Program, func() int) {
	t.Helper()
	counter, count := newCounter(t)
	spec := VerdictSpec(name, verdict, append([]ProgramOption{On(h)}, opts...)...)
	spec.Instructions = counting(counter, verdict)
	return Load(t, spec), count
}

// ConnectTo loads a program that redirects every connect(2) in its cgroup to an address:
// [hook.CgroupConnect4] for an IPv4 address, [hook.CgroupConnect6] for an IPv6 address.
func ConnectTo(t testing.TB, name string, to netip.AddrPort) *ebpf.Program {
	t.Helper()
	const (
		userIP4  = 4 // struct bpf_sock_addr, linux/bpf.h; all in network byte order
		userIP6  = 8
		userPort = 24
	)
	h, at := hook.CgroupConnect4, int16(userIP4)
	if to.Addr().Is6() {
		h, at = hook.CgroupConnect6, userIP6
	}
	spec := newSpec(name, []ProgramOption{On(h)})
	store := func(at int16, word uint32) {
		spec.Instructions = append(spec.Instructions,
			asm.Mov.Imm32(asm.R2, int32(word)),
			asm.StoreMem(asm.R1, at, asm.R2, asm.Word))
	}
	for word := range slices.Chunk(to.Addr().AsSlice(), 4) {
		store(at, binary.NativeEndian.Uint32(word))
		at += 4
	}
	store(userPort, uint32(binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, to.Port()))))
	spec.Instructions = append(spec.Instructions, asm.Mov.Imm(asm.R0, CgroupAllow), asm.Return())
	return Load(t, spec)
}

// Load loads a program and closes it at the end of the test.
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

// Typed gives an XDP program's function the type that libxdp's dispatcher requires of its components.
func Typed(name string, insns asm.Instructions) asm.Instructions {
	insns = slices.Clone(insns)
	insns[0] = btf.WithFuncMetadata(insns[0], code.Global(name)).WithSymbol(name)
	return insns
}

// Maps opens the maps of a program; the caller closes them.
func Maps(t testing.TB, prog *ebpf.Program) (maps []*ebpf.Map) {
	t.Helper()
	info, err := prog.Info()
	if err != nil {
		t.Fatal(err)
	}
	ids, _ := info.MapIDs()
	for _, id := range ids {
		m, err := ebpf.NewMapFromID(id)
		if err != nil {
			t.Fatal(err)
		}
		if info, err := m.Info(); err == nil && (info.Name == "ld_code" || info.Name == "ld_mark") { // the library bound it; it is not the program's own
			m.Close()
			continue
		}
		maps = append(maps, m)
	}
	return maps
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

// newCounter returns an array of one number, and a function that reads the
// number.
func newCounter(t testing.TB) (*ebpf.Map, func() int) {
	t.Helper()
	counter := newMap(t, &ebpf.MapSpec{Name: "ldt_count", Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	return counter, func() int {
		t.Helper()
		var n uint64
		if err := counter.Lookup(uint32(0), &n); err != nil {
			t.Fatalf("read counter: %v", err)
		}
		return int(n)
	}
}

// counting adds one to the counter and returns the verdict.
func counting(counter *ebpf.Map, verdict int) asm.Instructions {
	return asm.Instructions{
		asm.LoadMapValue(asm.R1, counter.FD(), 0),
		asm.Mov.Imm(asm.R2, 1),
		asm.AddAtomic.Mem(asm.R1, asm.R2, asm.DWord, 0),
		asm.Mov.Imm(asm.R0, int32(verdict)),
		asm.Return(),
	}
}

// newSpec returns a program without instructions.
func newSpec(name string, opts []ProgramOption) *ebpf.ProgramSpec {
	spec := &ebpf.ProgramSpec{
		Name:       name,
		Type:       ebpf.XDP,
		AttachType: ebpf.AttachXDP,
		License:    license,
	}
	for _, opt := range opts {
		opt(spec)
	}
	return spec
}

// view tells how a program reads a packet.
type view struct {
	data, end  int16 // offsets of the packet's bounds in the context
	ethernet   int32 // the bytes before the IP header
	pass, drop int32
}

// views are the program types that handle packets.
var views = map[ebpf.ProgramType]view{
	ebpf.XDP:       {0, 4, 14, XDPPass, XDPDrop},         // struct xdp_md
	ebpf.SchedCLS:  {76, 80, 14, TCNext, TCDrop},         // struct __sk_buff
	ebpf.CGroupSKB: {76, 80, 0, CgroupAllow, CgroupDeny}, // the same
}

func viewOf(spec *ebpf.ProgramSpec) view {
	v, ok := views[spec.Type]
	if !ok {
		panic(fmt.Sprintf("testenv: programs of type %s see no packets", spec.Type))
	}
	return v
}

// onUDPPort returns a program that runs then for UDP datagrams to a port, over IPv4 or IPv6 without
// options, and returns the verdict other for all other packets. then finds the UDP header at R6 and the
// end of the packet at R7.
func onUDPPort(v view, port int, other int32, then asm.Instructions) asm.Instructions {
	const (
		ipv4 = 20
		ipv6 = 40
		udp  = 8
	)
	insns := asm.Instructions{
		asm.LoadMem(asm.R6, asm.R1, v.data, asm.Word),
		asm.LoadMem(asm.R7, asm.R1, v.end, asm.Word),
	}
	insns = append(insns, need(v.ethernet+ipv4)...)
	if v.ethernet > 0 {
		insns = append(insns,
			asm.LoadMem(asm.R1, asm.R6, 12, asm.Half),
			asm.HostTo(asm.BE, asm.R1, asm.Half),
			asm.JEq.Imm(asm.R1, unix.ETH_P_IP, "ipv4"),
			asm.JNE.Imm(asm.R1, unix.ETH_P_IPV6, "other"),
		)
	} else {
		insns = append(insns,
			asm.LoadMem(asm.R1, asm.R6, 0, asm.Byte),
			asm.RSh.Imm(asm.R1, 4),
			asm.JEq.Imm(asm.R1, 4, "ipv4"),
			asm.JNE.Imm(asm.R1, 6, "other"),
		)
	}
	insns = append(insns,
		asm.LoadMem(asm.R1, asm.R6, int16(v.ethernet)+6, asm.Byte),
		asm.Add.Imm(asm.R6, v.ethernet+ipv6),
		asm.Ja.Label("transport"),

		asm.LoadMem(asm.R1, asm.R6, int16(v.ethernet)+9, asm.Byte).WithSymbol("ipv4"),
		asm.Add.Imm(asm.R6, v.ethernet+ipv4),

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
		asm.Mov.Imm(asm.R0, other).WithSymbol("other"),
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
