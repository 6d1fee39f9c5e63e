package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/internal/state"
)

const weightRounds = 30

// weightSection measures sizes and memory.
func weightSection(b *bench, s *Section) {
	s.Title = "Weight"
	s.About = []string{
		"A process is timed from fork to exit. Its memory is the most that was resident (VmHWM, when it ends). The C " +
			"program true, which does nothing, shows what a process costs by itself.",
		"Kernel memory is what the kernel reports for a program and its maps (memlock in /proc/self/fdinfo): the " +
			"dispatcher with its code, its description, and a slot for each member. The members' own programs come on top, " +
			"with or without a chain. The kernel allocates the code of several programs from shared pages, but reports whole " +
			"pages here.",
		"Allocations are on the Go heap, in one call.",
	}
	p := newPlayground(b)
	p.binaries(s)
	p.processes(s)
	p.kernelMemory(s)
	p.allocations(s)
}

func (p *playground) binaries(s *Section) {
	t := s.table(Table{Name: "binary", Title: "The command, stripped as make builds it", Unit: "MB"})
	for _, name := range []string{p.tool, "ip", "bpftool"} {
		path, err := exec.LookPath(name)
		if err != nil {
			continue
		}
		info, err := os.Stat(path)
		p.must(err)
		t.put(strings.TrimPrefix(name, "bin/"), 0, exactly(float64(info.Size())/1e6))
	}
}

func (p *playground) processes(s *Section) {
	calls := [][]string{
		{"true"},
		{p.tool, "version"}, {p.tool, "-n", p.Server.Name, "--bpffs", p.bpffs, "list", "xdp", p.ServerDev}, {p.tool, "--bpffs", p.bpffs, "list"},
		{"ip", "-V"}, {"ip", "-n", p.Server.Name, "link", "show", "dev", p.ServerDev},
	}
	if p.bpftool != "" {
		calls = append(calls, []string{"bpftool", "version"}, []string{"bpftool", "link", "show"})
	}
	defer p.attach(p.one, dispatcher.Options{}).Close()
	samples := make([][]float64, len(calls))
	for range p.rounds(weightRounds) {
		p.progress("processes")
		for i, call := range calls {
			var out bytes.Buffer
			cmd := exec.Command(call[0], call[1:]...)
			cmd.Stdout, cmd.Stderr = &out, &out
			took := elapsed(func() {
				if err := cmd.Run(); err != nil {
					p.Fatalf("%v: %v\n%s", call, err, &out)
				}
			})
			samples[i] = append(samples[i], milliseconds(took))
		}
	}
	t := s.table(Table{Name: "process", Title: "A process", Unit: "ms and MB", Labels: []string{"ms", "resident, MB"}})
	for i, call := range calls {
		name := strings.Join(call, " ")
		for _, cut := range [][2]string{{"-n " + p.Server.Name + " ", ""}, {"--bpffs " + p.bpffs + " ", ""}, {p.tool, "dispatcher"}} {
			name = strings.ReplaceAll(name, cut[0], cut[1])
		}
		t.put(name, 0, statOf(samples[i]))
		t.put(name, 1, exactly(peak(p.scope, call)))
	}
}

// peak returns the most memory that a process had resident, in MB. It is read when the process is about to end,
// because wait4 includes the memory of the process that started it.
func peak(t *scope, call []string) float64 {
	runtime.LockOSThread() // the tracer is a thread
	defer runtime.UnlockOSThread()
	cmd := exec.Command(call[0], call[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
	t.must(cmd.Start())
	pid := cmd.Process.Pid
	defer cmd.Process.Release()
	var status unix.WaitStatus
	_, err := unix.Wait4(pid, &status, 0, nil) // until the process begins
	t.must(err)
	t.must(unix.PtraceSetOptions(pid, unix.PTRACE_O_TRACEEXIT|unix.PTRACE_O_EXITKILL))
	most := 0.0
	for signal := 0; ; {
		t.must(unix.PtraceCont(pid, signal))
		_, err := unix.Wait4(pid, &status, 0, nil)
		t.must(err)
		signal = 0
		switch {
		case status.Exited() || status.Signaled():
			return most
		case status.TrapCause() == unix.PTRACE_EVENT_EXIT:
			content, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
			t.must(err)
			for line := range strings.Lines(string(content)) {
				if value, ok := strings.CutPrefix(line, "VmHWM:"); ok {
					fmt.Sscan(value, &most)
					most /= 1024
				}
			}
		case status.StopSignal() != unix.SIGTRAP:
			signal = int(status.StopSignal())
		}
	}
}

func (p *playground) kernelMemory(s *Section) {
	t := s.table(Table{Name: "kernel memory", Title: "Kernel memory of a chain", Unit: "bytes", Axis: "members"})
	w := newWorkshop(p.scope)
	for _, n := range merges {
		chain, slots := p.emptyChain(n)
		prog, err := state.Build(chain, slots, nil)
		p.must(err)
		info, err := prog.Info()
		p.must(err)
		ids, _ := info.MapIDs()
		description, err := ebpf.NewMapFromID(ids[len(ids)-1])
		p.must(err)
		t.put("dispatcher", n, exactly(memlock(w.scope, prog.FD())))
		t.put("description", n, exactly(memlock(w.scope, description.FD())))
		t.put("slots", n, exactly(float64(n)*memlock(w.scope, slots[0].FD())))
		size, _ := info.JitedSize()
		t.put("code of the dispatcher", n, exactly(float64(size)))
		description.Close()
		prog.Close()
	}
}

// memlock returns the memory of a BPF object, from its fdinfo.
func memlock(t *scope, fd int) float64 {
	content, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	t.must(err)
	for line := range strings.Lines(string(content)) {
		if value, ok := strings.CutPrefix(line, "memlock:"); ok {
			n, err := strconv.Atoi(strings.TrimSpace(value))
			t.must(err)
			return float64(n)
		}
	}
	t.Fatal("the kernel does not report the memory of BPF objects")
	return 0
}

func (p *playground) allocations(s *Section) {
	t := s.table(Table{Name: "allocations", Title: "Allocations of a call", Unit: "number and KB", Labels: []string{"allocations", "KB"}})
	var l *dispatcher.Link
	for _, call := range []struct {
		name     string
		fn, undo func() error
	}{
		{"Attach", func() (err error) {
			l, err = dispatcher.Attach(p.ctx, p.target, dispatcher.Program(p.one), p.options())
			return err
		}, func() error { return l.Detach(p.ctx) }},
		{"Update", func() error { return l.Update(p.ctx, dispatcher.Program(p.two)) }, nil},
		{"Read", func() error {
			_, err := dispatcher.Read(p.ctx, p.target, dispatcher.ReadOptions{BPFFS: p.bpffs})
			return err
		}, nil},
		{"List, this namespace", func() error {
			_, err := dispatcher.List(p.ctx, dispatcher.ListOptions{BPFFS: p.bpffs, NetNS: p.Server.Name})
			return err
		}, nil},
	} {
		p.progress("allocations of %s", call.name)
		var number, size []float64
		for range 5 {
			if call.undo == nil && l == nil {
				l = p.attach(p.one, p.options())
			}
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			p.must(call.fn())
			runtime.ReadMemStats(&after)
			number = append(number, float64(after.Mallocs-before.Mallocs))
			size = append(size, float64(after.TotalAlloc-before.TotalAlloc)/1e3)
			if call.undo != nil {
				p.must(call.undo())
				l.Close()
				l = nil
			}
		}
		t.put(call.name, 0, statOf(number))
		t.put(call.name, 1, statOf(size))
	}
}
