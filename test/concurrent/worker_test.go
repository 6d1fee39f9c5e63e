package concurrent

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// worker is a process that joins a chain, changes its member, leaves, and so
// on, without knowing of the others that do the same.
type worker struct {
	Target   dispatcher.Target
	BPFFS    string
	Name     string
	Seed     uint64
	Programs []ebpf.ProgramID // that it changes between
	// Seals: it is a persistent member, and seals and unseals the chain as well.
	Seals bool

	rand *rand.Rand
	link *dispatcher.Link
	at   membership
}

// membership is what a worker says that it is.
type membership struct {
	Member   bool
	Settings hook.Settings
	Program  ebpf.ProgramID
	// Arrived is when it came to the place among its equals where it is: some
	// time between the two (CLOCK_MONOTONIC).
	Arrived [2]int64
	Error   string
}

func init() {
	testenv.RegisterHelper("worker", func(args []string) {
		var w worker
		if err := json.Unmarshal([]byte(args[0]), &w); err != nil {
			panic(err)
		}
		w.rand = rand.New(rand.NewPCG(w.Seed, 0))
		for in := bufio.NewScanner(os.Stdin); in.Scan(); {
			var operations int
			fmt.Sscan(in.Text(), &operations)
			for range operations {
				if err := w.act(context.Background()); err != nil {
					w.at.Error = err.Error()
					break
				}
			}
			report, _ := json.Marshal(w.at)
			fmt.Printf("report %s\n", report)
		}
	})
}

// chained says whether the members are in a chain, and not links of their own.
func (w *worker) chained() bool { return w.Target.Hook == hook.XDP }

// act does one thing and looks whether it is so.
func (w *worker) act(ctx context.Context) error {
	acts := map[string]func(context.Context) error{
		"attach": w.attach, "update": w.update, "set": w.set, "close": w.close, "detach": w.detach, "reopen": w.reopen,
		"seal": w.seal, "unseal": w.unseal,
	}
	choice := []string{"update", "update", "set", "set", "set", "close", "detach", "reopen"}
	switch {
	case w.link == nil:
		choice = []string{"attach"}
	case w.Seals:
		choice = []string{"update", "update", "set", "seal", "seal", "unseal", "detach", "reopen"}
	case !w.chained():
		choice = []string{"update", "update", "set", "set", "set", "set", "close", "detach"}
	}
	what := choice[w.rand.IntN(len(choice))]
	err := acts[what](ctx)
	if err == nil && w.link != nil {
		var m *hook.Member
		if m, err = w.link.Info(ctx); err == nil {
			err = w.at.differs(m, w.chained())
		}
	}
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

func (w *worker) attach(ctx context.Context) (err error) {
	w.at = membership{Member: true, Settings: w.settings(), Program: w.program()}
	return w.arrive(func() error {
		w.link, err = dispatcher.Attach(ctx, w.Target, dispatcher.ProgramID(uint32(w.at.Program)), dispatcher.Options{
			Name: w.Name, Priority: w.at.Settings.Priority, ContinueOn: w.at.Settings.ContinueOn, OnMissing: w.at.Settings.OnMissing,
			Persistent: w.Seals, BPFFS: w.BPFFS,
		})
		return err
	})
}

func (w *worker) update(ctx context.Context) error {
	w.at.Program = w.program()
	return w.link.Update(ctx, dispatcher.ProgramID(uint32(w.at.Program)))
}

// set may leave a link where it is, when that will do: then it has not arrived among its new equals at any time.
func (w *worker) set(ctx context.Context) error {
	before, err := w.link.Info(ctx)
	if err != nil {
		return err
	}
	w.at.Settings = w.settings()
	arrived := w.at.Arrived
	if err := w.arrive(func() error { return w.link.Set(ctx, w.at.Settings) }); err != nil {
		return err
	}
	after, err := w.link.Info(ctx)
	if err != nil || after.LinkID != before.LinkID {
		return err
	}
	if after.Priority == before.Priority {
		w.at.Arrived = arrived
	} else if !w.chained() {
		w.at.Arrived = [2]int64{0, math.MaxInt64}
	}
	return nil
}

func (w *worker) close(context.Context) error {
	w.at = membership{}
	err := w.link.Close()
	w.link = nil
	return err
}

func (w *worker) detach(ctx context.Context) error {
	if err := w.link.Detach(ctx); err != nil {
		return err
	}
	return w.close(ctx)
}

// reopen hands the member over to another Link.
func (w *worker) reopen(ctx context.Context) error {
	heir, err := dispatcher.Open(ctx, w.Target, hook.Ref(w.Name), dispatcher.ReadOptions{BPFFS: w.BPFFS})
	if err != nil {
		return err
	}
	err = w.link.Close()
	w.link = heir
	return err
}

func (w *worker) seal(ctx context.Context) error {
	_, err := dispatcher.Seal(ctx, w.Target, dispatcher.SealOptions{BPFFS: w.BPFFS})
	return err
}

func (w *worker) unseal(ctx context.Context) error {
	return dispatcher.Unseal(ctx, w.Target, dispatcher.ReadOptions{BPFFS: w.BPFFS})
}

func (w *worker) program() ebpf.ProgramID { return w.Programs[w.rand.IntN(len(w.Programs))] }

// settings are such that there are many equals.
func (w *worker) settings() hook.Settings {
	s := scene.Priority([]int{10, 50, 90}[w.rand.IntN(3)])
	if w.chained() {
		s.ContinueOn = []hook.VerdictSet{hook.SetOf(hook.Pass), hook.SetOf(hook.Pass, hook.TX)}[w.rand.IntN(2)]
		s.OnMissing = hook.MissingContinue
	}
	return s
}

func (w *worker) arrive(fn func() error) error {
	w.at.Arrived[0] = monotonic()
	defer func() { w.at.Arrived[1] = monotonic() }()
	return fn()
}

func monotonic() int64 {
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return ts.Nano()
}

// differs tells in what a member is not as its owner says.
func (at membership) differs(m *hook.Member, chained bool) error {
	settings := m.Settings
	if !chained { // a priority is all that is set
		settings = scene.Priority(m.Priority)
	}
	if settings != at.Settings || m.Program.ID != uint32(at.Program) || m.State != hook.StateRunning {
		return fmt.Errorf("it is %+v, and should be %+v", *m, at)
	}
	return nil
}

// crowd are workers on one target.
type crowd struct {
	*scene.Scene
	names   []string
	workers map[string]*testenv.Proc
	numbers map[ebpf.ProgramID]int // of the tracers
}

func newCrowd(t *testing.T, s *scene.Scene, workers int, bpffs func() string) *crowd {
	t.Helper()
	c := &crowd{s, nil, map[string]*testenv.Proc{}, map[ebpf.ProgramID]int{}}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	for i := range workers {
		w := worker{Target: s.Target, BPFFS: bpffs(), Name: fmt.Sprintf("w%d", i), Seed: seed + uint64(i), Seals: s.Coded}
		tracers := []func(n int) *ebpf.Program{
			func(n int) *ebpf.Program { return s.Tracer(t, n) },
			func(n int) *ebpf.Program { return s.Tracer(t, n) },
		}
		if s.Coded { // and one that cannot be sealed
			tracers = append(tracers, func(n int) *ebpf.Program { return s.Trace.Program(t, n, scene.Pass) })
		}
		for _, tracer := range tracers {
			number := 10 + len(c.numbers) // none is a guard
			id := scene.ID(t, tracer(number))
			w.Programs = append(w.Programs, id)
			c.numbers[id] = number
		}
		arg, err := json.Marshal(w)
		qt.Assert(t, qt.IsNil(err))
		c.names = append(c.names, w.Name)
		c.workers[w.Name] = testenv.StartHelper(t, "worker", string(arg))
	}
	return c
}

func (c *crowd) start(operations int) {
	for _, w := range c.workers {
		w.Send(fmt.Sprint(operations))
	}
}

// wait waits for the reports of all workers.
func (c *crowd) wait(t *testing.T) map[string]membership {
	t.Helper()
	reports := map[string]membership{}
	for name, w := range c.workers {
		var m membership
		qt.Assert(t, qt.IsNil(json.Unmarshal([]byte(w.Expect(t, "report")), &m)))
		qt.Check(t, qt.Equals(m.Error, ""), qt.Commentf("%s", name))
		reports[name] = m
	}
	return reports
}

// compare looks whether the chain is what its members together say.
func (c *crowd) compare(t *testing.T, reports map[string]membership) {
	t.Helper()
	want := map[string]bool{}
	for name, m := range reports {
		if m.Member {
			want[name] = true
		}
	}
	chained := c.Target.Hook == hook.XDP
	var chain *hook.Chain
	var run []*hook.Member
	scene.Soon(t, func() bool { // those that left by Close, or were killed
		chain, run = c.Read(t), nil
		for i, m := range chain.Members {
			if !chained || m.State == hook.StateRunning {
				run = append(run, &chain.Members[i])
			}
		}
		return len(run) <= len(want)
	})

	var numbers []int
	for i, m := range run {
		qt.Assert(t, qt.IsTrue(want[m.Name]), qt.Commentf("%s is there", m.Name))
		delete(want, m.Name)
		at := reports[m.Name]
		qt.Check(t, qt.IsNil(at.differs(m, chained)))
		numbers = append(numbers, c.numbers[at.Program])
		for _, before := range run[:i] {
			qt.Check(t, qt.IsTrue(before.Priority <= m.Priority), qt.Commentf("%s before %s in %s", before.Name, m.Name, scene.Summary(chain)))
			if before.Priority == m.Priority && at.Arrived[1] < reports[before.Name].Arrived[0] {
				t.Errorf("%s came before %s, and does not stand before it in %s", m.Name, before.Name, scene.Summary(chain))
			}
		}
	}
	qt.Check(t, qt.HasLen(want, 0), qt.Commentf("missing in %s", scene.Summary(chain)))
	c.WantRunSoon(t, numbers...)
}

// stop ends all workers, and checks that nothing is left of them.
func (c *crowd) stop(t *testing.T) {
	t.Helper()
	for _, w := range c.workers {
		qt.Check(t, qt.IsNil(w.Stop()))
	}
	c.WantFree(t)
}
