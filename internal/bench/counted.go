package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
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

// countedKernel is where instructions are counted.
const countedKernel = "7.2"

// countedWords have its kernel take the clock for what it is, one tick an instruction, and not measure it.
const countedWords = "tsc_early_khz=1000000 tsc=reliable"

// instructionsSection has instructions counted, in a virtual machine whose clock goes by them.
func instructionsSection(b *bench, s *Section) {
	s.Title = "Instructions per packet"
	s.About = []string{
		"The same chains on Linux " + countedKernel + " in a virtual machine whose clock goes by the instructions that its processor " +
			"executes (qemu, tcg with -icount). What a test run reports there as time is a number of instructions: it is exact, and the " +
			"same each time. It knows nothing of cache misses and branches that were guessed wrong. The figures are what a chain executes " +
			"beyond what a test run of one such program alone does.",
	}
	r, err := countedReport(b.ctx, b.matrix)
	b.must(err)
	for _, t := range r.Sections[0].Tables {
		s.table(*t)
	}
	s.Notes = append(s.Notes, ratios(s.Tables)...)
}

// countedReport is what this program finds out in the machine.
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

// countedSection is for a machine whose clock goes by instructions.
func countedSection(b *bench, s *Section) {
	loader := xdpLoader()
	for _, kind := range kinds {
		w := newWorkshop(b.scope)
		t := s.table(Table{Name: kind, Title: kindTitle(kind), Unit: "instructions", Axis: "members", Plot: true})
		onOneCPU(b.scope, func() {
			one := clockPerInstruction(w)
			base := typical(w.scope, w.alone(kind, 0, 1)) / one
			for _, c := range subjects(w, kind) {
				t.put(c.row, c.n, exactly(whole(typical(w.scope, c.prog)/one-base)))
			}
			s.Notes = append(s.Notes, fmt.Sprintf("%s: a test run of one alone executes %.0f instructions, of %.3f ns each.", kindTitle(kind), base, one))
			for _, n := range merges {
				if n > libxdp.MaxMembers {
					continue
				}
				w.behindLibxdp(kind, n, func(prog *ebpf.Program) {
					t.put("libxdp's protocol, from here", n, exactly(whole(typical(w.scope, prog)/one-base)))
				})
				if loader != "" {
					w.behindLoader(loader, kind, n, func(prog *ebpf.Program) {
						t.put("libxdp", n, exactly(whole(typical(w.scope, prog)/one-base)))
					})
				}
			}
		})
	}
}

func whole(v float64) float64 { return float64(int(v + 0.5)) }

// typical is what most runs of a program take. It is the kernel's own figure: what is around the runs is not in
// it. The samples are so short that a tick of the timer is in few of them.
func typical(t *scope, prog *ebpf.Program) float64 {
	const samples, short = 15, 150_000
	took := func(repeat int) float64 {
		_, took, err := prog.Benchmark(packet(), repeat, nil)
		t.must(err)
		return float64(took)
	}
	repeat := min(max(int(short/(took(100)+1)), 50), 1000)
	var all []float64
	for range samples {
		all = append(all, took(repeat))
	}
	return statOf(all).Median
}

// clockPerInstruction is what the clock makes of an instruction.
func clockPerInstruction(w *workshop) float64 {
	const many = 2000 // the kernel's figure has no fractions
	line := func(n int) *ebpf.Program {
		code := asm.Instructions{asm.Mov.Imm(asm.R0, int32(hook.Pass))}
		for range n {
			code = append(code, asm.Mov.Reg(asm.R2, asm.R1))
		}
		return w.load(&ebpf.ProgramSpec{
			Type: ebpf.XDP, AttachType: ebpf.AttachXDP, License: "Dual BSD/GPL", Instructions: append(code, asm.Return()),
		}, nil)
	}
	return (typical(w.scope, line(many)) - typical(w.scope, line(0))) / many
}

// behindLibxdp has the members put behind a dispatcher of libxdp's protocol by package libxdp.
func (w *workshop) behindLibxdp(kind string, n int, measure func(*ebpf.Program)) {
	w.apart(func(t *scope) {
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
	})
}

// xdpLoader is libxdp's own command, empty where there is none.
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

// behindLoader has the members put behind libxdp's own dispatcher by xdp-loader.
func (w *workshop) behindLoader(loader, kind string, n int, measure func(*ebpf.Program)) {
	w.apart(func(t *scope) {
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
	})
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

// apart runs fn in a scope of its own.
func (s *scope) apart(fn func(t *scope)) { s.must(within(s.ctx, fn)) }
