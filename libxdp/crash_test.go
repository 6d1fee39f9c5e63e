package libxdp

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// fatal is an operation of a process that dies in it.
type fatal struct {
	Device
	Op    string
	DieAt int // the number of the step
}

func init() { testenv.RegisterHelper("libxdp-victim", victim) }

// victim does the operation, and dies at the given step.
func victim(args []string) {
	var f fatal
	if err := json.Unmarshal([]byte(args[0]), &f); err != nil {
		panic(err)
	}
	n := 0
	kernel.OnStep = func(step string) {
		if n++; n == f.DieAt {
			fmt.Println("died", step)
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
			select {}
		}
	}
	err := f.do(context.Background())
	fmt.Printf("done %v\n", err)
}

func (f fatal) do(ctx context.Context) error {
	const name = "ldt_trace_5"
	src, err := FromSpec(&ebpf.CollectionSpec{Programs: map[string]*ebpf.ProgramSpec{name: {
		Name: name, Type: ebpf.XDP, License: "GPL",
		Instructions: testenv.Typed(name, asm.Instructions{asm.Mov.Imm(asm.R0, pass), asm.Return()}),
	}}}, name, ebpf.CollectionOptions{})
	if err != nil {
		return err
	}
	switch f.Op {
	case "attach":
		_, _, err = f.Attach(ctx, src, at(50))
	case "set":
		err = f.Set(ctx, "ldt_trace_1", hook.Settings{Priority: 80})
	case "replace":
		err = f.Replace(ctx, "ldt_trace_1", src)
	case "detach":
		err = f.Detach(ctx, "ldt_trace_1")
	case "detach all":
		err = f.DetachAll(ctx)
	}
	return err
}

// A process may be killed at any moment of a change. Packets meet the old chain
// or the new one, complete. The next change works, and removes what was left.
func TestCrash(t *testing.T) {
	testenv.NeedFreplace(t)
	for _, c := range []struct {
		name, op string
		from, to []int // chains; 5 is the victim's program, which leaves no trace; 9 drops
	}{
		{"start", "attach", nil, []int{5}},
		{"join", "attach", []int{1, 9}, []int{1, 5, 9}},
		{"set", "set", []int{1, 2, 9}, []int{2, 1, 9}},
		{"replace", "replace", []int{1, 9}, []int{5, 9}},
		{"leave", "detach", []int{1, 9}, []int{9}},
		{"last", "detach", []int{1}, nil},
		{"detach all", "detach all", []int{1, 2, 9}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newScene(t)
			for n := 1; ; n++ {
				for _, m := range c.from {
					verdict := pass
					if m == 9 {
						verdict = drop
					}
					_, _, err := s.Attach(t.Context(), s.sourceOf(t, m, verdict, tracerName(m)), at(10*m))
					qt.Assert(t, qt.IsNil(err))
				}
				s.wantRun(t, c.from...)
				step := s.kill(t, c.op, n)
				comment := qt.Commentf("died at step %d, %q", n, step)

				now := names(s.read(t))
				isOld := slices.Equal(now, tracerNames(c.from))
				isNew := slices.Equal(now, tracerNames(c.to))
				qt.Assert(t, qt.IsTrue(isOld || isNew), comment)
				if step == "" {
					qt.Assert(t, qt.IsTrue(isNew))
				}
				chain := c.to
				if isOld {
					chain = c.from
				}
				if c := s.read(t); c != nil {
					for _, m := range c.Members {
						qt.Assert(t, qt.IsFalse(m.Missing), comment)
					}
				}
				visible := slices.DeleteFunc(slices.Clone(chain), func(n int) bool { return n == 5 })
				s.trace.Reset(t)
				arrived := s.Passed(t, port, 5)
				qt.Assert(t, qt.DeepEquals(s.trace.Last(t), emptyNil(visible)), comment)
				qt.Assert(t, qt.Equals(arrived == 0, slices.Contains(chain, 9)), comment)

				// The next change.
				_, _, err := s.Attach(t.Context(), s.source(t, 8), at(1))
				qt.Assert(t, qt.IsNil(err), comment)
				qt.Assert(t, qt.DeepEquals(names(s.read(t)), tracerNames(append([]int{8}, chain...))), comment)
				s.wantPins(t)
				s.wantTrace(t, append([]int{8}, visible...)...)
				qt.Assert(t, qt.IsNil(s.DetachAll(t.Context())), comment)
				s.wantPins(t)
				if step == "" {
					t.Logf("%d steps", n-1)
					return
				}
			}
		})
	}
}

// kill starts a process that does op and dies at its n-th step. It returns the
// name of the step, or "" when there are fewer steps.
func (s *scene) kill(t *testing.T, op string, n int) string {
	t.Helper()
	arg, err := json.Marshal(fatal{s.Device, op, n})
	qt.Assert(t, qt.IsNil(err))
	p := testenv.StartHelper(t, "libxdp-victim", string(arg))
	line := p.Expect(t, "d") // "ied STEP", "one ERROR"
	if step, ok := strings.CutPrefix(line, "ied "); ok {
		_ = p.Wait()
		return step
	}
	qt.Assert(t, qt.Equals(line, "one <nil>"))
	qt.Assert(t, qt.IsNil(p.Stop()))
	return ""
}

func tracerNames(numbers []int) (list []string) {
	for _, n := range numbers {
		list = append(list, tracerName(n))
	}
	return list
}

func emptyNil(list []int) []int {
	if len(list) == 0 {
		return nil
	}
	return list
}
