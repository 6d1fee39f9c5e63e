package demo

import (
	"context"

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

// pin loads a program and pins it, for ip and tc to attach.
func (s *stage) pin(spec *ebpf.ProgramSpec) (id uint32, err error) {
	spec.License = "Dual BSD/GPL"
	prog, err := ebpf.NewProgram(spec)
	if err != nil {
		return 0, err
	}
	defer prog.Close()
	id = kernel.ProgramID(prog)
	s.made.addProgram(id)
	path := s.expand("$BPFFS/" + spec.Name)
	s.made.pins[path] = true
	return id, prog.Pin(path)
}

func (s *stage) pinRival() error {
	_, err := s.pin(&ebpf.ProgramSpec{
		Name: rival, Type: ebpf.XDP, AttachType: ebpf.AttachXDP,
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, int32(hook.Drop)), asm.Return()},
	})
	return err
}

func (s *stage) pinWatch() error {
	m, err := ebpf.NewMap(&ebpf.MapSpec{Name: watched, Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	if err != nil {
		return err
	}
	defer m.Close()
	const protocol = 16 // offset in struct __sk_buff, linux/bpf.h
	s.watcher, err = s.pin(&ebpf.ProgramSpec{
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
	return err
}

// watched returns how many packets watch has counted.
func (s *stage) watched() (packets uint64, err error) {
	err = readMapOf(s.watcher, watched, func(m *ebpf.Map) error { return m.Lookup(uint32(0), &packets) })
	return packets, err
}

// attachOther attaches a program to tcx/egress by a link, which it keeps in
// s.other.
func (s *stage) attachOther(ctx context.Context) error {
	free, err := s.chain(ctx, hook.TCXEgress)
	if err != nil {
		return err
	}
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: other, Type: ebpf.SchedCLS, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, goOn), asm.Return()},
	})
	if err != nil {
		return err
	}
	defer prog.Close()
	ns, err := kernel.OpenNetNS(s.vars["NS"])
	if err != nil {
		return err
	}
	defer ns.Close()
	return ns.Do(func() error {
		l, err := link.AttachTCX(link.TCXOptions{Interface: free.Ifindex, Program: prog, Attach: ebpf.AttachTCXEgress})
		if err == nil {
			s.other = l
			s.later(l.Close)
		}
		return err
	})
}
