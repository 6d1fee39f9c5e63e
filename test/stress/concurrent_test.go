package stress

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// worker is a process that joins a chain, changes its member, leaves, and so
// on, without knowing of the others who do the same.
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

// act does one thing and looks whether it is so.
func (w *worker) act(ctx context.Context) error {
	var err error
	what := "attach"
	acts := map[string]func(context.Context) error{
		"update": w.update, "set": w.set, "close": w.close, "detach": w.detach, "reopen": w.reopen, "seal": w.seal, "unseal": w.unseal,
	}
	choice := []string{"update", "update", "set", "set", "set", "close", "detach", "reopen"}
	if w.Seals {
		choice = []string{"update", "update", "set", "seal", "seal", "unseal", "detach", "reopen"}
	}
	if w.link == nil {
		err = w.attach(ctx)
	} else {
		what = choice[w.rand.IntN(len(choice))]
		err = acts[what](ctx)
	}
	if err == nil {
		err = w.verify(ctx)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

func (w *worker) attach(ctx context.Context) (err error) {
	w.at = membership{Member: true, Settings: w.settings(), Program: w.program()}
	return w.arrive(func() error {
		w.link, err = dispatcher.Attach(ctx, w.Target, dispatcher.ProgramID(w.at.Program), dispatcher.Options{
			Name: w.Name, Priority: w.at.Settings.Priority, ContinueOn: w.at.Settings.ContinueOn, OnMissing: w.at.Settings.OnMissing, Persistent: w.Seals, BPFFS: w.BPFFS,
		})
		return err
	})
}

func (w *worker) update(ctx context.Context) error {
	w.at.Program = w.program()
	return w.link.Update(ctx, dispatcher.ProgramID(w.at.Program))
}

func (w *worker) set(ctx context.Context) error {
	s := w.settings()
	set := func() error { return w.link.Set(ctx, s) }
	moves := s.Priority != w.at.Settings.Priority
	w.at.Settings = s
	if moves {
		return w.arrive(set)
	}
	return set()
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
	heir, err := dispatcher.Open(ctx, w.Target, w.Name, dispatcher.ReadOptions{BPFFS: w.BPFFS})
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
	return dispatcher.Unseal(ctx, w.Target, dispatcher.UnsealOptions{BPFFS: w.BPFFS})
}

func (w *worker) program() ebpf.ProgramID { return w.Programs[w.rand.IntN(len(w.Programs))] }

// settings are such that there are many equals.
func (w *worker) settings() hook.Settings {
	return hook.Settings{
		Priority:   []int{10, 50, 90}[w.rand.IntN(3)],
		ContinueOn: []hook.VerdictSet{hook.SetOf(hook.Pass), hook.SetOf(hook.Pass, hook.TX)}[w.rand.IntN(2)],
		OnMissing:  hook.MissingContinue,
	}
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

// verify checks that the worker is what it believes to be.
func (w *worker) verify(ctx context.Context) error {
	if w.link == nil {
		return nil
	}
	m, err := w.link.Info(ctx)
	if err != nil {
		return fmt.Errorf("and then info: %w", err)
	}
	return w.at.differs(m)
}

// differs tells in what a member is not as its owner says.
func (at membership) differs(m *hook.Member) error {
	if m.Settings != at.Settings || m.Program.ID != uint32(at.Program) || m.State != hook.StateRunning {
		return fmt.Errorf("it is %+v, and should be %+v", *m, at)
	}
	return nil
}

// crowd are workers on one device.
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
		for range 2 {
			number := 1 + len(c.numbers)
			id := scene.ID(t, s.Tracer(t, number, scene.Pass))
			w.Programs = append(w.Programs, id)
			c.numbers[id] = number
		}
		if s.Coded { // and one that cannot be sealed
			number := 1 + len(c.numbers)
			id := scene.ID(t, s.Trace.Program(t, number, scene.Pass))
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
	var chain *hook.Chain
	var run []*hook.Member
	scene.Soon(t, func() bool { // those who left by Close, or were killed
		chain, run = c.Read(t), nil
		for i, m := range chain.Members {
			if m.State == hook.StateRunning {
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
		qt.Check(t, qt.IsNil(at.differs(m)))
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

// Many who come at once, on a machine where all see the same bpffs, and in
// containers where nobody sees another's lock. Whoever was told that it worked
// must be in the chain, and where it belongs.
func TestConcurrent(t *testing.T) {
	for _, tc := range []struct {
		name            string
		workers, rounds int
		operations      int
		locked          bool
	}{
		{"with a lock", 20, 3, 5, true},
		{"without a lock", 8, 3, 7, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := scene.NewBusy(t)
			bpffs := func() string { return s.BPFFS }
			if !tc.locked {
				bpffs = t.TempDir
			}
			c := newCrowd(t, s, tc.workers, bpffs)
			for range tc.rounds {
				c.start(tc.operations)
				c.compare(t, c.wait(t))
			}
			for _, w := range c.workers {
				qt.Check(t, qt.IsNil(w.Stop()))
			}
			c.WantFree(t)
		})
	}
}

// The same when some are killed in the middle of it, wherever they are.
func TestConcurrentKills(t *testing.T) {
	s := scene.NewBusy(t)
	c := newCrowd(t, s, 10, func() string { return s.BPFFS })
	c.start(3)
	c.compare(t, c.wait(t))
	c.start(8)
	for i, name := range c.names[:5] {
		time.Sleep(time.Duration(rand.IntN(100*(i+1))) * time.Millisecond) // any moment will do
		c.workers[name].Kill()
		delete(c.workers, name)
	}
	c.compare(t, c.wait(t))
	c.start(2)
	c.compare(t, c.wait(t))
	for _, w := range c.workers {
		qt.Check(t, qt.IsNil(w.Stop()))
	}
	c.WantFree(t)
}

// A Link may be used by several goroutines; run it with -race.
func TestOneLinkManyGoroutines(t *testing.T) {
	s := scene.New(t)
	ctx := t.Context()
	programs := []*ebpf.Program{s.Tracer(t, 1, scene.Pass), s.Tracer(t, 2, scene.Pass)}
	link := s.Attach(t, programs[0], dispatcher.Options{Name: "shared"})
	var closed sync.WaitGroup
	var all sync.WaitGroup
	each := func(n int, fn func(i int) error) {
		all.Add(1)
		closed.Add(1)
		go func() {
			defer all.Done()
			for i := range n {
				if err := fn(i); err != nil {
					t.Errorf("%d: %v", i, err)
				}
			}
			closed.Done()
			// And some more while it is being closed.
			for i := range n {
				if err := fn(i); err != nil && !errors.Is(err, fs.ErrClosed) {
					t.Errorf("on closing: %v", err)
				}
			}
		}()
	}
	each(5, func(i int) error { return link.Update(ctx, dispatcher.Program(programs[i%2])) })
	each(5, func(i int) error { return link.Set(ctx, scene.Priority(1+i)) })
	each(3, func(int) error { return errors.Join(link.Pin(ctx), link.Unpin(ctx)) })
	each(10, func(int) error { _, err := link.Info(ctx); return err })
	each(10, func(int) error {
		prog, err := link.Program()
		if err == nil {
			err = prog.Close()
		}
		return err
	})
	closed.Wait()
	qt.Assert(t, qt.IsNil(link.Close()))
	all.Wait()
	s.Clear(t) // a Pin may have come without its Unpin
	s.WantFree(t)
}
