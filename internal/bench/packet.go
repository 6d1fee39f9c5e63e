package main

import (
	"encoding/binary"
	"fmt"
	"runtime"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

const readOnly = unix.BPF_F_RDONLY_PROG

// alone is the row of one program without a chain, with which the others are compared.
const alone = "one program alone"

const (
	packetRounds = 20
	packetTime   = 4 * time.Millisecond // of each sample; each call also waits that long for RCU
)

// packetSection runs every chain by test run, in turns.
func packetSection(b *bench, s *Section) {
	s.Title = "Per packet"
	s.About = []string{
		"Chains of 1 to 32 members run by BPF_PROG_TEST_RUN on one CPU. A figure is the CPU time of the thread, divided " +
			"by the number of runs. All chains take turns in each round, so that other work on the machine affects them " +
			"alike. Each figure includes the cost of the test run itself: compare it with the row of one program alone.",
		"Empty members return XDP_PASS. Members that work parse Ethernet, IPv4 and UDP and look up the port in a hash map " +
			"of their own.",
	}
	within := b.rounds(packetRounds)
	for _, kind := range kinds {
		t := s.table(Table{Name: kind, Title: kindTitle(kind), Unit: "ns", Axis: "members", Plot: true})
		measurePackets(b, t, kind, within)
	}
	s.Notes = append(s.Notes, ratios(s.Tables)...)
}

func kindTitle(kind string) string {
	if kind == "empty" {
		return "Empty members"
	}
	return "Members that work"
}

// A subject is a chain to measure.
type subject struct {
	row     string
	n       int
	prog    *ebpf.Program
	repeat  int
	samples []float64
}

// subjects builds all chains of a kind.
func subjects(w *workshop, kind string) []*subject {
	all := []*subject{{row: alone, n: 1, prog: w.alone(kind, 0, 1)}}
	for _, way := range ways {
		for _, n := range merges {
			if way.most == 0 || n <= way.most {
				all = append(all, &subject{row: way.Name, n: n, prog: way.build(w, kind, n)})
			}
		}
	}
	return all
}

func measurePackets(b *bench, t *Table, kind string, rounds int) {
	w := newWorkshop(b.scope)
	onOneCPU(b.scope, func() {
		all := subjects(w, kind)
		runner := newRunner(b.scope, all[0].prog)
		for _, s := range all {
			s.repeat = runner.repeats(s.prog)
		}
		for round := range rounds {
			b.progress("%s, round %d of %d", kind, round+1, rounds)
			for _, s := range all {
				s.samples = append(s.samples, runner.perRun(s.prog, s.repeat))
			}
		}
		for _, s := range all {
			t.put(s.row, s.n, statOf(s.samples))
		}
	})
}

// ratios compares the ways with each other, at ten members.
func ratios(tables []*Table) []string {
	var notes []string
	for _, t := range tables {
		slots, ok := t.get("slots", 10)
		if !ok {
			continue
		}
		text := fmt.Sprintf("%s, 10 slots against the others, medians:", t.Title)
		for _, way := range ways {
			if other, ok := t.get(way.Name, 10); ok && way.Name != "slots" {
				text += fmt.Sprintf(" %.2f of %s;", slots.Median/other.Median, way.Name)
			}
		}
		notes = append(notes, text[:len(text)-1]+".")
	}
	return notes
}

// packet returns a UDP datagram to port 7000 for test runs.
func packet() []byte {
	p := make([]byte, 64)
	copy(p, []byte{2, 0x77, 0, 0, 0, 2, 2, 0x77, 0, 0, 0, 1, 8, 0}) // Ethernet
	copy(p[14:], []byte{0x45, 0, 0, 50, 0, 0, 0x40, 0, 64, 17, 0, 0, 10, 77, 0, 1, 10, 77, 0, 2})
	binary.BigEndian.PutUint16(p[34:], 40000)
	binary.BigEndian.PutUint16(p[36:], 7000)
	binary.BigEndian.PutUint16(p[38:], 30)
	return p
}

// onOneCPU runs fn on a thread that stays on one CPU, the last one that the
// process may use.
func onOneCPU(t *scope, fn func()) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var all, one unix.CPUSet
	t.must(unix.SchedGetaffinity(0, &all))
	for cpu := range 1024 {
		if all.IsSet(cpu) {
			one.Zero()
			one.Set(cpu)
		}
	}
	t.must(unix.SchedSetaffinity(0, &one))
	defer unix.SchedSetaffinity(0, &all)
	fn()
}

// A runner runs programs by test run. Each such call has a cost of its own: the kernel makes the program one
// that it calls directly, and patches its own code for that (bpf_prog_change_xdp).
type runner struct {
	*scope
	data []byte
	call time.Duration // the cost of a call
}

func newRunner(t *scope, prog *ebpf.Program) *runner {
	r := &runner{scope: t, data: packet()}
	var calls []float64
	for range 50 {
		calls = append(calls, float64(r.run(prog, 2)))
	}
	r.call = time.Duration(statOf(calls).Median)
	return r
}

// run returns the CPU time of repeat runs.
func (r *runner) run(prog *ebpf.Program, repeat int) time.Duration {
	begin := cpuTime()
	verdict, err := prog.Run(&ebpf.RunOptions{
		Data: r.data, Repeat: uint32(repeat),
		//lint:ignore SA1019 what is recommended in its place is for whole benchmarks
		Reset: func() { begin = cpuTime() }, // after a signal the test run begins again
	})
	took := cpuTime() - begin
	r.must(err)
	if verdict != 2 {
		r.Fatalf("verdict %d, want pass", verdict)
	}
	return took
}

// repeats returns how many runs take packetTime.
func (r *runner) repeats(prog *ebpf.Program) int {
	const first = 5000
	r.run(prog, first)
	return int(float64(packetTime)/r.perRun(prog, first)) + 1
}

// perRun returns how many nanoseconds a run of the program takes, from repeat runs. The kernel's own
// figure has no fractions.
func (r *runner) perRun(prog *ebpf.Program, repeat int) float64 {
	return max(float64(r.run(prog, repeat)-r.call)/float64(repeat), 0.01)
}
