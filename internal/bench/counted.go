package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/libxdp"
)

// countedKernel is the kernel on which instructions are counted.
const countedKernel = "7.2"

// countedWords tell the kernel the rate of the clock, one tick for each instruction, so that it does not
// measure the rate.
const countedWords = "tsc_early_khz=1000000 tsc=reliable"

// instructionsSection counts instructions in a virtual machine with a clock that counts
// executed instructions.
func instructionsSection(b *bench, s *Section) {
	s.Title = "Instructions per packet"
	s.About = []string{
		"The same chains on Linux " + countedKernel + " in a virtual machine with a clock that counts the instructions of its processor " +
			"(qemu, tcg with -icount). The time that a test run reports there is a number of instructions: it is exact, and the same " +
			"each time. It does not include cache misses and mispredicted branches. The figures are the instructions of a chain beyond " +
			"those of one such program alone.",
	}
	r, err := countedReport(b.ctx, b.matrix)
	b.must(err)
	for _, t := range r.Sections[0].Tables {
		s.table(*t)
	}
	s.Notes = append(s.Notes, ratios(s.Tables)...)
}

// countedReport returns the report of this program from the machine.
func countedReport(ctx context.Context, matrix string) (*Report, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, matrix, "run", "-quiet", "-kernel", countedKernel, "-counted", "-append", countedWords, "-xdp-tools", "sid",
		"-file", self+":/root/bench", "--", "/root/bench", "-only", "counted", "-json", "-")
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s: %w: %s", matrix, err, strings.TrimSpace(stderr.String()))
	}
	var r Report
	if err := json.Unmarshal(stdout.Bytes(), &r); err != nil {
		return nil, fmt.Errorf("the machine's report: %w", err)
	}
	if len(r.Sections) != 1 || len(r.Sections[0].Tables) == 0 {
		return nil, errors.New("the machine's report has no figures")
	}
	return &r, nil
}

// countedSection is for a machine with a clock that counts instructions.
func countedSection(b *bench, s *Section) {
	loader := xdpLoader()
	for _, kind := range kinds {
		w := newWorkshop(b.scope)
		t := s.table(Table{Name: kind, Title: kindTitle(kind), Unit: "instructions", Axis: "members", Plot: true})
		onOneCPU(b.scope, func() {
			m := newMeter(w)
			base := m.count(w.alone(kind, 0, 1))
			for _, c := range subjects(w, kind) {
				t.put(c.row, c.n, exactly(whole(m.count(c.prog)-base)))
			}
			s.Notes = append(s.Notes, fmt.Sprintf("%s: a test run of one alone executes %.0f instructions.", kindTitle(kind), base))
			for _, n := range merges {
				if n > libxdp.MaxMembers {
					continue
				}
				w.behindLibxdp(kind, n, func(prog *ebpf.Program) {
					t.put("libxdp's protocol, from here", n, exactly(whole(m.count(prog)-base)))
				})
				if loader != "" {
					w.behindLoader(loader, kind, n, func(prog *ebpf.Program) {
						t.put("libxdp", n, exactly(whole(m.count(prog)-base)))
					})
				}
			}
		})
	}
}

func whole(v float64) float64 { return math.Round(v) + 0 } // avoids -0

// A meter counts the instructions of a program. The kernel corrects its clock now and then, by up to 2 %, so each
// sample is compared with a program of known length that runs before and after it, and the sample counts only if
// that program took the same time twice.
type meter struct {
	*workshop
	line   *ebpf.Program
	length float64 // instructions of a run of line(lineLength)
}

// lineLength is large enough to make the kernel's figure exact enough without
// fractions.
const lineLength = 3000

func newMeter(w *workshop) *meter {
	line := func(n int) *ebpf.Program {
		code := asm.Instructions{asm.Mov.Imm(asm.R0, int32(hook.Pass))}
		for range n {
			code = append(code, asm.Mov.Reg(asm.R2, asm.R1)) // one instruction when compiled
		}
		return w.load(&ebpf.ProgramSpec{
			Type: ebpf.XDP, AttachType: ebpf.AttachXDP, License: "Dual BSD/GPL", Instructions: append(code, asm.Return()),
		}, nil)
	}
	m := &meter{workshop: w, line: line(lineLength), length: 1}
	none := m.count(line(0)) // as a part of the line, for now
	m.length = lineLength / (1 - none)
	return m
}

// count returns how many instructions a run of the program executes, including those of the test
// run itself.
func (m *meter) count(prog *ebpf.Program) float64 {
	const samples, tries = 5, 100
	const short = 100_000 // ns; short enough that a timer tick is rare
	took := func(prog *ebpf.Program, repeat int) float64 {
		_, took, err := prog.Benchmark(packet(), repeat, nil)
		m.must(err)
		return float64(took)
	}
	repeat := min(max(int(short/(took(prog, 100)+1)), 25), 1000)
	var all []float64
	for range tries {
		before, sample, after := took(m.line, short/lineLength), took(prog, repeat), took(m.line, short/lineLength)
		if before == after {
			all = append(all, sample/before*m.length)
		}
		if len(all) == samples {
			return statOf(all).Min // a timer tick came into the others
		}
	}
	m.Fatal("the machine's clock does not go evenly")
	return 0
}

// behindLibxdp puts the members behind a dispatcher of libxdp's protocol, by package libxdp.
func (w *workshop) behindLibxdp(kind string, n int, measure func(*ebpf.Program)) {
	w.must(within(w.ctx, func(t *scope) {
		pair, bpffs := testenv.NewPair(t), testenv.BPFFS(t)
		var sources []libxdp.Source
		for range n {
			source, err := libxdp.FromSpec(w.spec.Copy(), "alone_"+kind, ebpf.CollectionOptions{})
			t.must(err)
			sources = append(sources, source)
		}
		device := libxdp.Device{Name: pair.ServerDev, NetNS: pair.Server.Name, BPFFS: bpffs}
		chain, _, err := device.AttachAll(t.ctx, sources, libxdp.AttachOptions{Start: true})
		t.must(err)
		prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(chain.Dispatcher.ID))
		t.must(err)
		defer prog.Close()
		measure(prog)
		t.must(libxdp.Remove(t.ctx, bpffs, pair.ServerIfindex, ebpf.ProgramID(chain.Dispatcher.ID)))
	}))
}

// xdpLoader returns the path of libxdp's own command, or "".
func xdpLoader() string {
	if path, err := exec.LookPath("xdp-loader"); err == nil {
		return path
	}
	found, _ := filepath.Glob("/usr/local/bin/xdp-loader-*")
	if len(found) == 0 {
		return ""
	}
	return found[len(found)-1]
}

// behindLoader puts the members behind libxdp's own dispatcher, by xdp-loader.
func (w *workshop) behindLoader(loader, kind string, n int, measure func(*ebpf.Program)) {
	w.must(within(w.ctx, func(t *scope) {
		pair, bpffs := testenv.NewPair(t), testenv.BPFFS(t)
		object := filepath.Join(t.TempDir(), "members.o")
		t.must(os.WriteFile(object, _MembersBytes, 0o600))
		args := []string{"load", "--mode", "native", "--prog-name", "alone_" + kind, pair.ServerDev}
		for range n {
			args = append(args, object)
		}
		call := func(args ...string) {
			cmd := exec.Command(loader, args...)
			cmd.Env = append(os.Environ(), "LIBXDP_BPFFS="+bpffs, "LIBXDP_SKIP_ENVIRON=0")
			pair.Server.Do(t, func() {
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Fatalf("%s %v: %v\n%s", loader, args, err, out)
				}
			})
		}
		call(args...)
		prog := onDevice(t, pair)
		defer prog.Close()
		measure(prog)
		call("unload", "--all", pair.ServerDev)
	}))
}

// onDevice opens the XDP program of the server's device.
func onDevice(t *scope, pair *testenv.Pair) *ebpf.Program {
	var devices []struct {
		XDP struct {
			Prog struct{ ID uint32 }
		}
	}
	t.must(json.Unmarshal([]byte(pair.Server.IP(t, "-j", "-d", "link", "show", "dev", pair.ServerDev)), &devices))
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(devices[0].XDP.Prog.ID))
	t.must(err)
	return prog
}
