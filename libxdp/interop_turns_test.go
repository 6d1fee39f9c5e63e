package libxdp

import (
	"fmt"
	"math/rand"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
)

// The tools take turns in any order. After each step both see the same chain.
func TestInteropInterleaved(t *testing.T) {
	withTools(t, func(t *testing.T, x *theirs) {
		seed := time.Now().UnixNano()
		t.Logf("seed %d", seed)
		random := rand.New(rand.NewSource(seed))
		type entry struct {
			prio int
			name string
		}
		var want []entry
		order := func() (list []string) {
			slices.SortFunc(want, func(a, b entry) int {
				return rank{Priority: uint32(a.prio), Name: a.name}.compare(rank{Priority: uint32(b.prio), Name: b.name})
			})
			for _, e := range want {
				list = append(list, e.name)
			}
			return list
		}
		theirPrograms := []string{"count", "droplist", "ratelimit", "sample"}
		for step := range 24 {
			prio := 1 + random.Intn(5)
			switch i := 0; {
			case random.Intn(3) > 0 && len(want) < 6:
				name := theirPrograms[random.Intn(4)]
				if random.Intn(2) == 0 {
					name = tracerName(random.Intn(4))
				}
				if slices.ContainsFunc(want, func(e entry) bool { return e.name == name }) {
					continue
				}
				if slices.Contains(theirPrograms, name) {
					x.load(t, name, "-P", fmt.Sprint(prio))
				} else {
					o := at(prio)
					o.Version = x.config
					x.join(t, int(name[len(name)-1]-'0'), o)
				}
				want = append(want, entry{prio, name})
			case len(want) > 0 && random.Intn(3) == 0:
				i = random.Intn(len(want))
				qt.Assert(t, qt.IsNil(x.Set(t.Context(), hook.Ref(want[i].name), hook.Settings{Priority: prio})))
				want[i].prio = prio
			case len(want) > 0:
				i = random.Intn(len(want))
				if random.Intn(2) == 0 {
					x.unload(t, want[i].name)
				} else {
					qt.Assert(t, qt.IsNil(x.Detach(t.Context(), hook.Ref(want[i].name))))
				}
				want = slices.Delete(want, i, i+1)
			}
			var tracers []int
			for _, name := range order() {
				if !slices.Contains(theirPrograms, name) {
					tracers = append(tracers, int(name[len(name)-1]-'0'))
				}
			}
			t.Logf("step %d: %v", step, order())
			x.wantSame(t, order()...)
			x.wantTrace(t, tracers...)
		}
		if len(want) > 0 {
			x.run(t, "unload", x.Name, "--all")
		}
		x.wantSame(t)
	})
}

// All work at once. An operation that reports success was done, and nothing is
// left over.
func TestInteropGoroutines(t *testing.T) {
	withTools(t, func(t *testing.T, x *theirs) {
		const rounds = 4
		o := at(1)
		o.Version = x.config
		x.join(t, 9, o) // so that there is always a chain
		var all sync.WaitGroup
		for n := range 3 {
			all.Go(func() {
				src := x.source(t, n)
				for round := range rounds {
					if _, _, err := x.Attach(t.Context(), src, at(10+n)); err != nil {
						t.Errorf("attach %d, round %d: %v", n, round, err)
						return
					}
					if round == rounds-1 {
						return
					}
					if err := x.Detach(t.Context(), hook.Ref(tracerName(n))); err != nil {
						t.Errorf("detach %d, round %d: %v", n, round, err)
						return
					}
				}
			})
		}
		var mu sync.Mutex
		refusals := map[string]int{}
		for _, name := range []string{"count", "droplist"} {
			all.Go(func() {
				// libxdp gives up after some tries. It also mistakes a chain that it
				// read just before others replaced it for something else.
				until := func(args ...string) bool {
					var out string
					for try := range 200 {
						var err error
						if out, err = x.try(args...); err == nil {
							return true
						}
						mu.Lock()
						refusals[out]++
						mu.Unlock()
						time.Sleep(time.Duration(try) * time.Millisecond)
					}
					t.Errorf("xdp-loader %v: %s", args, out)
					return false
				}
				for round := range rounds {
					if !until(x.loadArgs(t, name)...) {
						return
					}
					if round == rounds-1 {
						return
					}
					c, err := x.Read(t.Context())
					if err != nil {
						t.Error(err)
						return
					}
					m, err := c.Find(hook.Ref(name))
					if err != nil {
						t.Error(err)
						return
					}
					if !until("unload", x.Name, "-i", fmt.Sprint(m.Program.ID)) {
						return
					}
				}
			})
		}
		all.Wait()
		for why, n := range refusals {
			t.Logf("xdp-loader failed %d times: %s", n, why)
		}
		x.wantSame(t, "ldt_trace_9", "ldt_trace_0", "ldt_trace_1", "ldt_trace_2", "count", "droplist")
		x.wantTrace(t, 9, 0, 1, 2)
		x.wantCounted(t)
		x.run(t, "unload", x.Name, "--all")
		x.wantSame(t)
	})
}
