package demo

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

const (
	keptDevice = "veth3"
	keptFD     = 3     // the first descriptor that a child inherits
	app        = "app" // XDP: drops packets from one address
)

// keptEnds are the addresses of a second pair of devices.
var keptEnds = ends{netip.MustParseAddr("10.67.0.1"), netip.MustParseAddr("10.67.0.66"), netip.MustParseAddr("10.67.0.2")}

func (s *stage) adoptKept(ctx context.Context) error {
	n, err := s.joinAgain(ctx)
	if err != nil {
		return err
	}
	o, id, err := s.keep(keptDevice, keptEnds.bad)
	if err != nil {
		return err
	}
	pid := o.cmd.Process.Pid
	s.say("On veth3 an app was first that does not know libdispatcher: its program drops packets from %s,", keptEnds.bad)
	s.say("and process %d keeps the link's descriptor. (It is sleep, which inherited the descriptor and never uses it.)", pid)
	if err := s.arriveOn(n, packets, 0); err != nil {
		return err
	}
	const attachCount = cli + "attach xdp veth3 builtin:count --priority 10"
	out, err := s.try(ctx, attachCount)
	if err := s.check(err != nil && strings.Contains(out, fmt.Sprintf("pid %d ", pid)) && strings.Contains(out, fmt.Sprintf("link %d ", id)),
		"attach is refused, and says that process %d holds link %d", pid, id); err != nil {
		return err
	}
	if err := s.heldBy(ctx, pid); err != nil {
		return err
	}

	s.say("The link now gets a chain, with the app's program as a member, while %s sends as fast as it can.", keptEnds.bad)
	bad, good, err := n.underFlood(func() error {
		return s.run(ctx, fmt.Sprintf("dispatcher --bpffs $BPFFS adopt --link %d", id), attachCount)
	})
	if err != nil {
		return err
	}
	if err := s.run(ctx, cli+"list xdp veth3"); err != nil {
		return err
	}
	c, err := s.chainOn(ctx, s.kept())
	if err != nil {
		return err
	}
	if err := s.check(c.LinkID == id && c.Protected() && within(c, count, app), "count and app are members of a chain on the same link, %d", c.LinkID); err != nil {
		return err
	}
	if err := s.check(bad.sent > 0 && bad.arrived == 0 && good.arrived > 0,
		"meanwhile, of %s packets from %s, %s arrived; of %s from %s, %s", grouped(bad.sent), keptEnds.bad, grouped(bad.arrived),
		grouped(good.sent), keptEnds.good, grouped(good.arrived)); err != nil {
		return err
	}
	if err := s.countsAll(n, programID(c, count)); err != nil {
		return err
	}
	return s.freeKept(ctx, n, o)
}

// kept is the app's hook.
func (s *stage) kept() dispatcher.Target { return dispatcher.XDP(keptDevice).In(s.vars["NS"]) }

// joinAgain joins the namespaces by a second pair of devices.
func (s *stage) joinAgain(ctx context.Context) (*network, error) {
	err := s.run(ctx,
		"ip -n $CLIENT link add veth2 type veth peer name veth3 netns $NS",
		fmt.Sprintf("ip -n $CLIENT address add %s/24 dev veth2", keptEnds.good),
		fmt.Sprintf("ip -n $CLIENT address add %s/24 dev veth2", keptEnds.bad),
		fmt.Sprintf("ip -n $NS address add %s/24 dev veth3", keptEnds.server),
		"ip -n $CLIENT link set dev veth2 up",
		"ip -n $NS link set dev veth3 up",
	)
	if err != nil {
		return nil, err
	}
	return s.openNetwork(keptEnds)
}

// heldBy shows what is on the device and which process holds it, and checks that
// no other process does.
func (s *stage) heldBy(ctx context.Context, pid int) error {
	if err := s.run(ctx, cli+"holders xdp veth3"); err != nil {
		return err
	}
	held, err := dispatcher.HoldersOn(ctx, s.kept(), "", dispatcher.HoldersOnOptions{BPFFS: s.bpffs})
	if err != nil {
		return err
	}
	h := held[0].Holders
	if err := s.check(len(h.Processes) == 1 && h.Processes[0].PID == pid && len(h.Pins) == 0, "process %d holds it, and there is no pin", pid); err != nil {
		return err
	}
	if h.Counted == 0 {
		s.notHere("BPF iterators, which would show whether that is all")
		return nil
	}
	return s.equal([...]int{h.Found, h.Counted}, [...]int{1, 1}, "that is %d of the %d references that the kernel counts", h.Found, h.Counted)
}

// countsAll sends packets, half of which app drops, and checks that count has
// seen all of them.
func (s *stage) countsAll(n *network, program uint32) error {
	saw := func() (packets uint64, err error) {
		err = readMapOf(program, "protocols", func(m *ebpf.Map) error {
			packets, err = sum(m, unix.IPPROTO_UDP)
			return err
		})
		return packets, err
	}
	before, err := saw()
	if err != nil {
		return err
	}
	if err := s.arriveOn(n, packets, 0); err != nil {
		return err
	}
	after, err := saw()
	if err != nil {
		return err
	}
	return s.equal(after-before, uint64(2*packets), "count saw %d, before app dropped %d of them", after-before, packets)
}

// freeKept detaches the chain from the device; the app still keeps the link.
func (s *stage) freeKept(ctx context.Context, n *network, o *owner) error {
	if err := s.run(ctx, cli+"detach xdp veth3 --all"); err != nil {
		return err
	}
	c, err := s.chainOn(ctx, s.kept())
	if err != nil {
		return err
	}
	if err := s.check(len(c.Members) == 0 && c.LinkID == 0, "the device is free"); err != nil {
		return err
	}
	if err := s.arriveOn(n, packets, packets); err != nil {
		return err
	}
	pid := o.cmd.Process.Pid
	fd, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, keptFD))
	if err := s.check(strings.Contains(fd, "bpf"), "process %d still runs and has its descriptor, but the link is attached to nothing", pid); err != nil {
		return err
	}
	s.show(fmt.Sprintf("kill %d", pid))
	return o.kill()
}

// keep attaches a program that drops XDP packets from an address, by a link
// that another process holds. It returns the process and the id of the link.
// The process is sleep: a link is a descriptor, and children inherit
// descriptors.
func (s *stage) keep(device string, drops netip.Addr) (*owner, uint32, error) {
	prog, err := ebpf.NewProgram(dropFrom(drops))
	if err != nil {
		return nil, 0, err
	}
	defer prog.Close()
	l, err := s.attachXDP(device, prog)
	if err != nil {
		return nil, 0, err
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		return nil, 0, err
	}
	id := uint32(info.ID)
	s.made.links[id] = true
	s.made.addProgram(uint32(info.Program))
	fd, err := unix.FcntlInt(uintptr(l.FD()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, 0, err
	}
	file := os.NewFile(uintptr(fd), app)
	defer file.Close()

	path, err := exec.LookPath("sleep")
	if err != nil {
		return nil, 0, err
	}
	o := &owner{cmd: s.command(context.Background(), path+" 3600"), done: make(chan struct{})}
	o.cmd.ExtraFiles = []*os.File{file}
	if err := o.cmd.Start(); err != nil {
		return nil, 0, err
	}
	s.later(o.kill)
	go func() {
		_ = o.cmd.Wait()
		close(o.done)
	}()
	return o, id, nil
}

// attachXDP attaches a program as a tool that does not know the dispatcher.
func (s *stage) attachXDP(device string, prog *ebpf.Program) (l *link.RawLink, err error) {
	ns, err := kernel.OpenNetNS(s.vars["NS"])
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	err = ns.Do(func() error {
		ifi, err := net.InterfaceByName(device)
		if err != nil {
			return err
		}
		l, err = link.AttachRawLink(link.RawLinkOptions{Program: prog, Attach: ebpf.AttachXDP, Target: ifi.Index})
		return err
	})
	return l, err
}

// dropFrom returns a program that drops IPv4 from one address.
func dropFrom(from netip.Addr) *ebpf.ProgramSpec {
	// offsets in struct xdp_md, linux/bpf.h, and in a frame
	const data, dataEnd = 0, 4
	const etherType, source, length = 12, 14 + 12, 14 + 20
	address := from.As4()
	return &ebpf.ProgramSpec{
		Name: app, Type: ebpf.XDP, AttachType: ebpf.AttachXDP, License: "Dual BSD/GPL",
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
