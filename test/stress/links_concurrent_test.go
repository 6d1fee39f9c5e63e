package stress

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// linkWorker is a [worker] on a hook where each member has a link of its own.
type linkWorker struct {
	Target   dispatcher.Target
	BPFFS    string
	Name     string
	Seed     uint64
	Programs []ebpf.ProgramID

	rand *rand.Rand
	link *dispatcher.Link
	at   membership
}

func init() {
	testenv.RegisterHelper("link worker", func(args []string) {
		var w linkWorker
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
func (w *linkWorker) act(ctx context.Context) (err error) {
	what := "attach"
	if w.link == nil {
		err = w.attach(ctx)
	} else {
		what = []string{"update", "update", "set", "set", "set", "set", "close", "detach"}[w.rand.IntN(8)]
		err = map[string]func(context.Context) error{"update": w.update, "set": w.set, "close": w.close, "detach": w.detach}[what](ctx)
	}
	if err == nil && w.link != nil {
		var m *hook.Member
		if m, err = w.link.Info(ctx); err == nil {
			err = w.at.differsOnLink(m)
		}
	}
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// differsOnLink is differs for a member with a link of its own.
func (at membership) differsOnLink(m *hook.Member) error {
	if m.Priority != at.Settings.Priority || m.Program.ID != uint32(at.Program) || m.State != hook.StateRunning {
		return fmt.Errorf("it is %+v, and should be %+v", *m, at)
	}
	return nil
}

func (w *linkWorker) attach(ctx context.Context) (err error) {
	w.at = membership{Member: true, Settings: w.settings(), Program: w.Programs[0]}
	return w.arrive(func() error {
		w.link, err = dispatcher.Attach(ctx, w.Target, dispatcher.ProgramID(w.at.Program), dispatcher.Options{
			Name: w.Name, Priority: w.at.Settings.Priority, ContinueOn: w.at.Settings.ContinueOn, OnMissing: w.at.Settings.OnMissing, BPFFS: w.BPFFS,
		})
		return err
	})
}

func (w *linkWorker) update(ctx context.Context) error {
	w.at.Program = w.Programs[(slices.Index(w.Programs, w.at.Program)+1)%len(w.Programs)]
	return w.link.Update(ctx, dispatcher.ProgramID(w.at.Program))
}

// set may leave the member where it is, when that will do: then it has not arrived among its new equals at any time.
func (w *linkWorker) set(ctx context.Context) error {
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
	if err == nil && after.LinkID == before.LinkID {
		if w.at.Arrived = [2]int64{0, math.MaxInt64}; after.Priority == before.Priority {
			w.at.Arrived = arrived
		}
	}
	return err
}

func (w *linkWorker) close(context.Context) error {
	w.at = membership{}
	err := w.link.Close()
	w.link = nil
	return err
}

func (w *linkWorker) detach(ctx context.Context) error {
	if err := w.link.Detach(ctx); err != nil {
		return err
	}
	return w.close(ctx)
}

func (w *linkWorker) settings() hook.Settings {
	return scene.Priority([]int{10, 50, 90}[w.rand.IntN(3)])
}

func (w *linkWorker) arrive(fn func() error) error {
	w.at.Arrived[0] = monotonic()
	defer func() { w.at.Arrived[1] = monotonic() }()
	return fn()
}

// linkCrowd are workers on one hook.
type linkCrowd struct {
	*scene.LinkScene
	workers map[string]*testenv.Proc
	numbers map[ebpf.ProgramID]int
}

func newLinkCrowd(t *testing.T, s *scene.LinkScene, workers int) *linkCrowd {
	t.Helper()
	c := &linkCrowd{s, map[string]*testenv.Proc{}, map[ebpf.ProgramID]int{}}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	for i := range workers {
		w := linkWorker{Target: s.Target, BPFFS: s.BPFFS, Name: fmt.Sprintf("w%d", i), Seed: seed + uint64(i)}
		for range 2 {
			number := 10 + len(c.numbers) // none is a guard
			id := scene.ID(t, s.Tracer(t, number))
			w.Programs = append(w.Programs, id)
			c.numbers[id] = number
		}
		arg, err := json.Marshal(w)
		qt.Assert(t, qt.IsNil(err))
		c.workers[w.Name] = testenv.StartHelper(t, "link worker", string(arg))
	}
	return c
}

func (c *linkCrowd) start(operations int) {
	for _, w := range c.workers {
		w.Send(fmt.Sprint(operations))
	}
}

func (c *linkCrowd) wait(t *testing.T) map[string]membership {
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

// compare looks whether what is on the hook is what the workers together say, each at its place.
func (c *linkCrowd) compare(t *testing.T, reports map[string]membership) {
	t.Helper()
	want := map[string]bool{}
	for name, m := range reports {
		if m.Member {
			want[name] = true
		}
	}
	scene.Soon(t, func() bool { return len(c.Read(t).Members) <= len(want) }) // those who left by Close, or were killed
	chain := c.Read(t)
	var order []int
	for i, m := range chain.Members {
		qt.Assert(t, qt.IsTrue(want[m.Name]), qt.Commentf("%s is there", m.Name))
		delete(want, m.Name)
		at := reports[m.Name]
		qt.Check(t, qt.IsNil(at.differsOnLink(&chain.Members[i])))
		order = append(order, c.numbers[at.Program])
		for _, before := range chain.Members[:i] {
			qt.Check(t, qt.IsTrue(before.Priority <= m.Priority), qt.Commentf("%s before %s in %s", before.Name, m.Name, scene.Summary(chain)))
			if before.Priority == m.Priority && at.Arrived[1] < reports[before.Name].Arrived[0] {
				t.Errorf("%s came before %s, and does not stand before it in %s", m.Name, before.Name, scene.Summary(chain))
			}
		}
	}
	qt.Check(t, qt.HasLen(want, 0), qt.Commentf("missing in %s", scene.Summary(chain)))
	c.WantRun(t, order...)
}

// Many who come, change, move and go at once, and some who are killed at it: whoever was told that it worked is there, with
// its name and where it belongs.
func TestConcurrentLinks(t *testing.T) {
	for _, h := range []hook.Hook{hook.TCXIngress, hook.CgroupConnect4} {
		t.Run(string(h), func(t *testing.T) {
			s := scene.NewBusyLinkScene(t, h)
			c := newLinkCrowd(t, s, 20)
			for _, operations := range []int{1, 4, 4} {
				c.start(operations)
				c.compare(t, c.wait(t))
			}
			c.start(4)
			for i := range 5 {
				name := fmt.Sprintf("w%d", i)
				time.Sleep(time.Duration(rand.IntN(50)) * time.Millisecond) // any moment will do
				c.workers[name].Kill()
				delete(c.workers, name)
			}
			c.compare(t, c.wait(t))
			c.start(1)
			c.compare(t, c.wait(t))
			for _, w := range c.workers {
				qt.Check(t, qt.IsNil(w.Stop()))
			}
			c.WantNothingLeft(t)
		})
	}
}

// Goroutines of one process are no different.
func TestConcurrentGoroutines(t *testing.T) {
	for _, h := range []hook.Hook{hook.TCXEgress, hook.CgroupConnect4, hook.TCIngress} {
		t.Run(string(h), func(t *testing.T) {
			s := scene.NewBusyLinkScene(t, h)
			ctx := t.Context()
			const members = 8
			links := make([]*dispatcher.Link, members)
			priorities := make([]int, members)
			var all sync.WaitGroup
			for i := range members {
				programs := []*ebpf.Program{s.Tracer(t, 10+i), s.Tracer(t, 20+i)}
				all.Go(func() {
					link, err := dispatcher.Attach(ctx, s.Target, dispatcher.Program(programs[0]), dispatcher.Options{
						Name: fmt.Sprint(i), Priority: 50, BPFFS: s.BPFFS, Persistent: s.Filters(),
					})
					for n := range 4 {
						if err == nil {
							err = link.Update(ctx, dispatcher.Program(programs[(n+1)%2]))
						}
						if err == nil {
							priorities[i] = 1 + rand.IntN(members)
							err = link.Set(ctx, scene.Priority(priorities[i]))
						}
						if err == nil {
							_, err = link.Chain(ctx)
						}
					}
					if err != nil {
						t.Errorf("%d: %v", i, err)
					}
					links[i] = link
				})
			}
			all.Wait()
			if t.Failed() {
				return
			}
			chain := s.Read(t)
			qt.Assert(t, qt.HasLen(chain.Members, members))
			var order []int
			for i, m := range chain.Members {
				var n int
				fmt.Sscan(m.Name, &n)
				qt.Check(t, qt.Equals(m.Priority, priorities[n]))
				qt.Check(t, qt.IsTrue(i == 0 || chain.Members[i-1].Priority <= m.Priority), qt.Commentf("%s", scene.Summary(chain)))
				order = append(order, 10+n)
			}
			s.WantRun(t, order...)
			for _, l := range links {
				qt.Check(t, qt.IsNil(l.Detach(ctx)))
				qt.Check(t, qt.IsNil(l.Close()))
			}
			s.WantRunSoon(t)
		})
	}
}
