package main

import (
	"fmt"
	"net"
	"os"
	"strconv"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// otherTool stands for programs that do not know members:
//
//	othertool link NETNS DEVICE PIN [HOOK]     attach a program by a link, and pin the link
//	othertool bare NETNS DEVICE HOOK           attach a program without a link
//	othertool link CGROUP CGROUP PIN HOOK      the same on a cgroup
//	othertool bare CGROUP CGROUP HOOK [ALLOW]  ALLOW is multi, override or nothing
//	othertool pin ID PIN                       pin a program
//
// The programs are named ldt_other, and those without a link ldt_bare.
func otherTool() {
	kernel.RaiseMemlock()
	var err error
	switch args := append(os.Args[1:], make([]string, 5)...); args[0] {
	case "link":
		err = linkOther(args[1], args[2], args[3], hook.Hook(args[4]))
	case "bare":
		err = attachBare(args[1], args[2], hook.Hook(args[3]), args[4])
	case "pin":
		err = pinProgram(args[1], args[2])
	default:
		err = fmt.Errorf("bad arguments %q", args)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "othertool:", err)
		os.Exit(1)
	}
}

// harmless loads a program that lets everything pass.
func harmless(name string, h hook.Hook) (*ebpf.Program, error) {
	if h == hook.XDP {
		return ebpf.NewProgram(testenv.VerdictSpec(name, testenv.XDPPass))
	}
	verdict := testenv.TCNext
	if h.OnCgroup() {
		verdict = testenv.CgroupAllow
	}
	return ebpf.NewProgram(testenv.VerdictSpec(name, verdict, testenv.On(h)))
}

func linkOther(netns, target, pin string, h hook.Hook) error {
	if h == "" {
		h = hook.XDP
	}
	prog, err := harmless("ldt_other", h)
	if err != nil {
		return err
	}
	defer prog.Close()
	var l link.Link
	if h.OnCgroup() {
		l, err = link.AttachCgroup(link.CgroupOptions{Path: target, Attach: testenv.AttachType(h), Program: prog})
	} else {
		err = onDevice(netns, target, func(index int) error {
			if h == hook.XDP {
				l, err = link.AttachXDP(link.XDPOptions{Program: prog, Interface: index})
			} else {
				l, err = link.AttachTCX(link.TCXOptions{Program: prog, Interface: index, Attach: testenv.AttachType(h)})
			}
			return err
		})
	}
	if err != nil {
		return err
	}
	defer l.Close()
	return l.Pin(pin)
}

func attachBare(netns, target string, h hook.Hook, allow string) error {
	prog, err := harmless("ldt_bare", h)
	if err != nil {
		return err
	}
	defer prog.Close()
	attach := func(target int) error {
		return kernel.AttachProgram(prog, target, testenv.AttachType(h), map[string]uint32{
			"multi": unix.BPF_F_ALLOW_MULTI, "override": unix.BPF_F_ALLOW_OVERRIDE,
		}[allow], nil)
	}
	if !h.OnCgroup() {
		return onDevice(netns, target, attach)
	}
	folder, err := os.Open(target)
	if err != nil {
		return err
	}
	defer folder.Close()
	return attach(int(folder.Fd()))
}

func onDevice(netns, device string, fn func(index int) error) error {
	ns, err := kernel.OpenNetNS(netns)
	if err != nil {
		return err
	}
	defer ns.Close()
	return ns.Do(func() error {
		dev, err := net.InterfaceByName(device)
		if err != nil {
			return err
		}
		return fn(dev.Index)
	})
}

func pinProgram(id, pin string) error {
	n, err := strconv.ParseUint(id, 10, 32)
	if err != nil {
		return err
	}
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(n))
	if err != nil {
		return err
	}
	defer prog.Close()
	return prog.Pin(pin)
}
