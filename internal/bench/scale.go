package main

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

const (
	scaleRounds    = 8
	crowdLinks     = 2000
	crowdProcesses = 200
)

// filled are the numbers of devices with chains in the namespace.
var filled = []int{1, 10, 100, 500}

// scaleSection times operations that look at many objects.
func scaleSection(b *bench, s *Section) {
	s.Title = "Control, as the machine fills"
	s.About = []string{
		"The devices are veth devices of one network namespace, each with a chain of one member. Attach is to a device " +
			"without a chain.",
		fmt.Sprintf("The crowd is %s more bpf_links, on cgroups, open in one process, and %d more processes. Commands are whole processes.", grouped(fmt.Sprint(crowdLinks)), crowdProcesses),
	}
	devices := s.table(Table{Name: "devices", Title: "A namespace that fills", Unit: "ms", Axis: "devices with chains", Plot: true})
	crowd := s.table(Table{Name: "crowd", Title: "A machine that fills", Unit: "ms", Labels: []string{"as it is", "with the crowd"}})
	b.apart(func(b *bench) { b.manyDevices(devices) })
	b.apart(func(b *bench) { b.crowd(crowd) })
}

// A step is a timed operation.
type step struct {
	name string
	do   func()
	undo func() // may be nil; not timed
}

// time runs the steps in turns, and puts their times into the column x.
func (b *bench) time(t *Table, x int, steps []step) {
	samples := make([][]float64, len(steps))
	for range b.rounds(scaleRounds) {
		for i, s := range steps {
			b.progress("%s, %d: %s", t.Name, x, s.name)
			samples[i] = append(samples[i], milliseconds(elapsed(s.do)))
			if s.undo != nil {
				s.undo()
			}
		}
	}
	for i, s := range steps {
		t.put(s.name, x, statOf(samples[i]))
	}
}

func (b *bench) manyDevices(t *Table) {
	p := newPlayground(b)
	most := filled[len(filled)-1] + 1 // one device without a chain
	var batch strings.Builder
	for i := 0; i < most; i += 2 {
		fmt.Fprintf(&batch, "link add d%d type veth peer name d%d\n", i, i+1)
	}
	cmd := exec.Command("ip", "-n", p.Server.Name, "-batch", "-")
	cmd.Stdin = strings.NewReader(batch.String())
	if out, err := cmd.CombinedOutput(); err != nil {
		b.Fatalf("make devices: %v\n%s", err, out)
	}
	target := func(i int) dispatcher.Target { return dispatcher.XDP(fmt.Sprint("d", i)).In(p.Server.Name) }
	attach := func(i int) (*dispatcher.Link, error) {
		return dispatcher.Attach(p.ctx, target(i), dispatcher.Program(p.one), p.options())
	}
	links, have := make([]*dispatcher.Link, most), 0
	b.Cleanup(func() {
		inParallel(links[:have], func(_ int, l *dispatcher.Link) error { return l.Close() })
	})
	for _, n := range filled {
		b.progress("making chains on %d devices", n)
		b.must(inParallel(links[have:n], func(i int, _ *dispatcher.Link) (err error) {
			links[have+i], err = attach(have + i)
			return err
		}))
		have = n
		var joined *dispatcher.Link
		b.time(t, n, []step{
			{"attach", func() {
				var err error
				joined, err = attach(most - 1)
				b.must(err)
			}, func() { b.must(joined.Detach(p.ctx)); joined.Close() }},
			{"read one chain", func() {
				_, err := dispatcher.Read(p.ctx, target(0), dispatcher.ReadOptions{BPFFS: p.bpffs})
				b.must(err)
			}, nil},
			{"list the namespace", func() {
				_, err := dispatcher.List(p.ctx, dispatcher.ListOptions{BPFFS: p.bpffs, NetNS: p.Server.Name})
				b.must(err)
			}, nil},
			{"command: dispatcher list", p.process(p.tool, "-n", p.Server.Name, "--bpffs", p.bpffs, "list"), nil},
			{"command: ip link show", p.process("ip", "-n", p.Server.Name, "link", "show"), nil},
		})
	}
}

// inParallel calls fn for each element, several at a time: most of the time fn
// waits.
func inParallel[T any](all []T, fn func(i int, x T) error) error {
	var wait sync.WaitGroup
	room := make(chan struct{}, 16)
	errs := make([]error, len(all))
	for i, x := range all {
		room <- struct{}{}
		wait.Go(func() {
			defer func() { <-room }()
			errs[i] = fn(i, x)
		})
	}
	wait.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) crowd(t *Table) {
	p := newPlayground(b)
	member := p.attach(p.one, p.options())
	info, err := dispatcher.Read(p.ctx, p.target, dispatcher.ReadOptions{BPFFS: p.bpffs})
	b.must(err)
	steps := []step{
		{"read one chain", func() {
			_, err := dispatcher.Read(p.ctx, p.target, dispatcher.ReadOptions{BPFFS: p.bpffs})
			b.must(err)
		}, nil},
		{"list the machine", func() {
			_, err := dispatcher.List(p.ctx, dispatcher.ListOptions{BPFFS: p.bpffs})
			b.must(err)
		}, nil},
		{"holders of a link", func() {
			_, err := dispatcher.HoldersOf(p.ctx, hook.HolderRef{Kind: hook.HolderLink, ID: info.LinkID}, dispatcher.HoldersOptions{})
			b.must(err)
		}, nil},
		{"holders of a link, by /proc alone", func() {
			_, err := dispatcher.HoldersOf(p.ctx, hook.HolderRef{Kind: hook.HolderLink, ID: info.LinkID}, dispatcher.HoldersOptions{NoIterators: true})
			b.must(err)
		}, nil},
		{"command: dispatcher list", p.process(p.tool, "--bpffs", p.bpffs, "list"), nil},
		{"command: dispatcher holders", p.process(p.tool, "-n", p.Server.Name, "--bpffs", p.bpffs, "holders", "xdp", p.ServerDev), nil},
	}
	if p.bpftool != "" {
		steps = append(steps, step{"command: bpftool link show", p.process(p.bpftool, "link", "show"), nil})
	}
	b.time(t, 0, steps)
	b.progress("gathering the crowd")
	b.gather()
	b.time(t, 1, steps)
	b.must(member.Close())
}

// gather makes many links and processes, for the length of the scope.
func (b *bench) gather() {
	const each = 50 // a cgroup allows 64
	program, _ := testenv.CgroupProgram(b.scope, "ldt_crowd", hook.CgroupSKBEgress, testenv.CgroupAllow)
	var links []link.Link
	b.Cleanup(func() {
		for _, l := range links {
			l.Close()
		}
	})
	top := testenv.NewCgroup(b.scope)
	for i := range crowdLinks / each {
		dir, err := os.Open(top.Child(b.scope, fmt.Sprint(i)).Path)
		b.must(err)
		for range each {
			l, err := link.AttachRawLink(link.RawLinkOptions{Target: int(dir.Fd()), Program: program, Attach: ebpf.AttachCGroupInetEgress})
			b.must(err)
			links = append(links, l)
		}
		dir.Close()
	}
	for range crowdProcesses {
		sleep := exec.Command("sleep", "1000")
		b.must(sleep.Start())
		b.Cleanup(func() {
			sleep.Process.Kill()
			sleep.Wait()
		})
	}
}
