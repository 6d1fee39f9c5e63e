package demo

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
)

const (
	keptDevice = "veth3"
	keptFD     = 3     // the first descriptor that a child inherits
	app        = "app" // XDP: drops packets from one address
)

// keptEnds are the addresses of a second pair of devices.
var keptEnds = ends{netip.MustParseAddr("10.67.0.1"), netip.MustParseAddr("10.67.0.66"), netip.MustParseAddr("10.67.0.2")}

func (s *stage) adoptKept(ctx context.Context) {
	n := s.join(ctx, "veth2", keptDevice, keptEnds)
	o, id := s.keep(ctx)
	pid := o.Process.Pid
	s.say("On veth3 an app was first that does not know libdispatcher: its program drops packets from %s,", keptEnds.bad)
	s.say("and process %d keeps the link's descriptor. (It is sleep, which inherited the descriptor and never uses it.)", pid)
	s.arrive(n, packets, 0)
	const attachCount = cli + "attach xdp veth3 builtin:count --priority 10"
	out, err := s.try(ctx, attachCount)
	s.check(err != nil && strings.Contains(out, fmt.Sprintf("pid %d ", pid)) && strings.Contains(out, fmt.Sprintf("link %d ", id)),
		"attach is refused, and says that process %d holds link %d", pid, id)
	s.heldBy(ctx, pid)

	s.say("The link now gets a chain, with the app's program as a member, while %s sends as fast as it can.", keptEnds.bad)
	bad, good := n.underFlood(func() { s.run(ctx, fmt.Sprintf("dispatcher --bpffs $BPFFS adopt --link %d", id), attachCount) })
	s.run(ctx, cli+"list xdp veth3")
	c := s.chainOn(ctx, s.kept())
	s.check(c.LinkID == id && c.Protected() && within(c, count, app), "count and app are members of a chain on the same link, %d", c.LinkID)
	s.heldBack(keptEnds, bad, good, 0)
	saw := s.rise(n, func() []uint64 { return []uint64{protocolCount(programID(c, count), unix.IPPROTO_UDP)} })
	s.equal(saw, []uint64{2 * packets}, "count saw %d, before app dropped %d of them", saw[0], packets)

	s.run(ctx, cli+"detach xdp veth3 --all")
	c = s.chainOn(ctx, s.kept())
	s.check(len(c.Members) == 0 && c.LinkID == 0, "the device is free")
	s.arrive(n, packets, packets)
	fd, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, keptFD))
	s.check(strings.Contains(fd, "bpf"), "process %d still runs and has its descriptor, but the link is attached to nothing", pid)
	s.show(fmt.Sprintf("kill %d", pid))
	o.kill()
}

// kept is the app's hook.
func (s *stage) kept() dispatcher.Target { return dispatcher.XDP(keptDevice).In(s.vars["NS"]) }

// heldBy shows what is on the device and which process holds it, and checks that
// no other process does.
func (s *stage) heldBy(ctx context.Context, pid int) {
	s.run(ctx, cli+"holders xdp veth3")
	h := value(dispatcher.HoldersOn(ctx, s.kept(), "", dispatcher.HoldersOnOptions{BPFFS: s.bpffs}))[0].Holders
	s.check(len(h.Processes) == 1 && h.Processes[0].PID == pid && len(h.Pins) == 0, "process %d holds it, and there is no pin", pid)
	if h.Counted == 0 {
		s.notHere("BPF iterators, which would show whether that is all")
		return
	}
	s.equal([...]int{h.Found, h.Counted}, [...]int{1, 1}, "that is %d of the %d references that the kernel counts", h.Found, h.Counted)
}

// keep attaches a program by a link that another process holds. It returns the process
// and the id of the link. The process is sleep: a link is a descriptor, and children
// inherit descriptors.
func (s *stage) keep(ctx context.Context) (*owner, uint32) {
	l := s.attachLink(keptDevice, ebpf.AttachXDP, dropFrom(keptEnds.bad))
	defer l.Close()
	info := value(l.Info())
	id := uint32(info.ID)
	s.made.links[id] = true
	s.made.addProgram(uint32(info.Program))
	file := os.NewFile(uintptr(value(unix.FcntlInt(uintptr(l.FD()), unix.F_DUPFD_CLOEXEC, 0))), app)
	defer file.Close()
	o := &owner{Cmd: s.command(ctx, "sleep 3600")}
	o.ExtraFiles = []*os.File{file}
	must(o.Start())
	s.later(o.kill)
	return o, id
}

// dropFrom returns a program that drops IPv4 from one address.
func dropFrom(from netip.Addr) *ebpf.ProgramSpec {
	// offsets in struct xdp_md, linux/bpf.h, and in a frame
	const data, dataEnd = 0, 4
	const etherType, source, length = 12, 14 + 12, 14 + 20
	address := from.As4()
	return &ebpf.ProgramSpec{
		Name: app, Type: ebpf.XDP, AttachType: ebpf.AttachXDP,
		Instructions: asm.Instructions{
			asm.LoadMem(asm.R2, asm.R1, data, asm.Word),
			asm.LoadMem(asm.R3, asm.R1, dataEnd, asm.Word),
			asm.Mov.Reg(asm.R4, asm.R2),
			asm.Add.Imm(asm.R4, length),
			asm.JGT.Reg(asm.R4, asm.R3, "pass"),
			asm.LoadMem(asm.R3, asm.R2, etherType, asm.Half),
			asm.HostTo(asm.BE, asm.R3, asm.Half),
			asm.JNE.Imm(asm.R3, unix.ETH_P_IP, "pass"),
			asm.LoadMem(asm.R3, asm.R2, source, asm.Word),
			asm.HostTo(asm.BE, asm.R3, asm.Word),
			asm.JNE.Imm(asm.R3, int32(binary.BigEndian.Uint32(address[:])), "pass"),
			asm.Mov.Imm(asm.R0, int32(hook.Drop)),
			asm.Return(),
			asm.Mov.Imm(asm.R0, int32(hook.Pass)).WithSymbol("pass"),
			asm.Return(),
		},
	}
}
