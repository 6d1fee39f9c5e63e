package demo

import (
	"net"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// Programs of other tools, which use tc, ip or links of their own.
const (
	rival = "rival" // XDP: drops everything
	watch = "watch" // TC: counts IPv4 and continues
	other = "other" // TC: continues
)

const (
	watched = "watched" // the map of watch

	// goOn lets TC's next program run (TCX_NEXT, TC_ACT_UNSPEC in linux/bpf.h).
	goOn = -1
)

// load loads a program of another tool.
func load(spec *ebpf.ProgramSpec) *ebpf.Program {
	spec.License = "Dual BSD/GPL"
	return value(ebpf.NewProgram(spec))
}

// pin loads a program and pins it, for ip and tc to attach.
func (s *stage) pin(spec *ebpf.ProgramSpec) (id uint32) {
	prog := load(spec)
	defer prog.Close()
	id = kernel.ProgramID(prog)
	s.made.addProgram(id)
	path := s.expand("$BPFFS/" + spec.Name)
	s.made.pins[path] = true
	must(prog.Pin(path))
	return id
}

func (s *stage) pinRival() {
	s.pin(&ebpf.ProgramSpec{
		Name: rival, Type: ebpf.XDP, AttachType: ebpf.AttachXDP,
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, int32(hook.Drop)), asm.Return()},
	})
}

func (s *stage) pinWatch() {
	m := value(ebpf.NewMap(&ebpf.MapSpec{Name: watched, Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1}))
	defer m.Close()
	const protocol = 16 // offset in struct __sk_buff, linux/bpf.h
	s.watcher = s.pin(&ebpf.ProgramSpec{
		Name: watch, Type: ebpf.SchedCLS,
		Instructions: asm.Instructions{
			asm.LoadMem(asm.R2, asm.R1, protocol, asm.Word),
			asm.HostTo(asm.BE, asm.R2, asm.Half),
			asm.JNE.Imm(asm.R2, unix.ETH_P_IP, "next"),
			asm.LoadMapValue(asm.R1, m.FD(), 0),
			asm.Mov.Imm(asm.R2, 1),
			asm.StoreXAdd(asm.R1, asm.R2, asm.DWord),
			asm.Mov.Imm(asm.R0, goOn).WithSymbol("next"),
			asm.Return(),
		},
	})
}

// watched returns how many packets watch has counted.
func (s *stage) watched() (packets uint64) {
	readMap(s.watcher, watched, func(m *ebpf.Map) error { return m.Lookup(uint32(0), &packets) })
	return packets
}

// attachOther attaches a program to tcx/egress by a link, which it keeps in
// s.other.
func (s *stage) attachOther() {
	l := s.attachLink(device, ebpf.AttachTCXEgress, &ebpf.ProgramSpec{
		Name: other, Type: ebpf.SchedCLS,
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, goOn), asm.Return()},
	})
	s.other = l
	s.later(l.Close)
}

// attachLink attaches a program by a link, as a tool does that does not know the
// dispatcher.
func (s *stage) attachLink(device string, at ebpf.AttachType, spec *ebpf.ProgramSpec) (l *link.RawLink) {
	prog := load(spec)
	defer prog.Close()
	must(kernel.InNetNS(s.vars["NS"], func() error {
		ifi, err := net.InterfaceByName(device)
		if err != nil {
			return err
		}
		l, err = link.AttachRawLink(link.RawLinkOptions{Program: prog, Attach: at, Target: ifi.Index})
		return err
	}))
	return l
}
