package libxdp

import (
	"fmt"
	"math/rand"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

func refOf(name string) hook.Ref { return hook.Ref(name) }

// They start a chain, we join: they list us, and take out their own.
func TestInteropJoinTheirs(t *testing.T) {
	withTools(t, func(t *testing.T, x *theirs) {
		x.load(t, "count")
		x.wantSame(t, "count")
		x.join(t, 1, AttachOptions{Settings: hook.Settings{Priority: 10, ContinueOn: hook.SetOf(hook.Pass, hook.TX)}})
		x.wantSame(t, "ldt_trace_1", "count")
		x.join(t, 2, at(90))
		x.wantSame(t, "ldt_trace_1", "count", "ldt_trace_2")
		x.wantTrace(t, 1, 2)
		x.wantCounted(t)

		x.unload(t, "count")
		x.wantSame(t, "ldt_trace_1", "ldt_trace_2")
		x.wantTrace(t, 1, 2)
		x.unload(t, "ldt_trace_2")
		x.wantSame(t, "ldt_trace_1")
		x.wantTrace(t, 1)
		x.run(t, "unload", x.Name, "--all")
		x.wantSame(t)
		x.wantTrace(t)
	})
}

// We start a chain of their version, they join, we leave.
func TestInteropTheyJoin(t *testing.T) {
	withTools(t, func(t *testing.T, x *theirs) {
		o := at(10)
		o.Version = x.config
		x.join(t, 1, o)
		x.wantSame(t, "ldt_trace_1")
		x.load(t, "count", "-P", "20", "-A", "XDP_PASS,XDP_DROP")
		x.wantSame(t, "ldt_trace_1", "count")
		qt.Assert(t, qt.Equals(x.member(t, "count").ContinueOn, hook.SetOf(hook.Pass, hook.Drop)))
		x.load(t, "droplist", "-P", "5")
		x.wantSame(t, "droplist", "ldt_trace_1", "count")
		x.wantTrace(t, 1)
		x.wantCounted(t)
		x.dropClient(t, true)
		x.wantTrace(t)
		qt.Assert(t, qt.Equals(x.Passed(t, port, 10), 0))

		// We go before them, and take part in what they drop.
		qt.Assert(t, qt.IsNil(x.Set(t.Context(), "ldt_trace_1", hook.Settings{Priority: 1})))
		x.wantSame(t, "ldt_trace_1", "droplist", "count")
		x.wantTrace(t, 1)
		qt.Assert(t, qt.Equals(x.Passed(t, port, 10), 0))

		// Their settings are ours to change as well.
		qt.Assert(t, qt.IsNil(x.Set(t.Context(), "droplist", hook.Settings{Priority: 70, ContinueOn: hook.SetOf(hook.Pass, hook.Drop)})))
		x.wantSame(t, "ldt_trace_1", "count", "droplist")
		qt.Assert(t, qt.Equals(x.Passed(t, port, 10), 10))
		qt.Assert(t, qt.IsNil(x.Replace(t.Context(), "ldt_trace_1", x.source(t, 3))))
		x.wantSame(t, "ldt_trace_3", "count", "droplist")
		x.wantTrace(t, 3)

		qt.Assert(t, qt.IsNil(x.Detach(t.Context(), "droplist")))
		qt.Assert(t, qt.IsNil(x.Detach(t.Context(), "ldt_trace_3")))
		x.wantSame(t, "count")
		x.wantCounted(t)
		qt.Assert(t, qt.IsNil(x.Detach(t.Context(), "count")))
		x.wantSame(t)
	})
}

// They load several at once, and we several at once, and order them alike.
func TestInteropSeveral(t *testing.T) {
	withTools(t, func(t *testing.T, x *theirs) {
		x.run(t, "load", x.Name, object(t, "sample"), object(t, "droplist"), object(t, "count"), "-s", "xdp")
		x.wantSame(t, "count", "droplist", "sample")
		_, _, err := x.AttachAll(t.Context(), []Source{x.source(t, 2), x.sourceOf(t, 1, pass, "a_name_that_the_kernel_cuts_off"), x.sourceOf(t, 3, pass, "e")}, AttachOptions{})
		qt.Assert(t, qt.IsNil(err))
		x.wantSame(t, "a_name_that_the_kernel_cuts_off", "count", "droplist", "e", "ldt_trace_2", "sample")
		x.wantTrace(t, 1, 3, 2)
		x.load(t, "ratelimit")
		x.wantSame(t, "a_name_that_the_kernel_cuts_off", "count", "droplist", "e", "ldt_trace_2", "ratelimit", "sample")
		x.wantTrace(t, 1, 3, 2)
		// Ten at most, for both.
		_, _, err = x.AttachAll(t.Context(), []Source{x.source(t, 4), x.source(t, 5), x.source(t, 6), x.source(t, 7)}, AttachOptions{})
		qt.Assert(t, qt.ErrorIs(err, hook.ErrChainFull))
		_, _, err = x.AttachAll(t.Context(), []Source{x.source(t, 4), x.source(t, 5), x.source(t, 6)}, AttachOptions{})
		qt.Assert(t, qt.IsNil(err))
		x.wantTrace(t, 1, 3, 2, 4, 5, 6)
		x.refused(t, "Not enough free slots", x.loadArgs(t, "count")...)
		qt.Assert(t, qt.HasLen(x.status(t), MaxMembers))
		x.run(t, "unload", x.Name, "--all")
		x.wantSame(t)
	})
}

// Turn by turn, in any order: after each step both see the same chain.
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
				qt.Assert(t, qt.IsNil(x.Set(t.Context(), refOf(want[i].name), hook.Settings{Priority: prio})))
				want[i].prio = prio
			case len(want) > 0:
				i = random.Intn(len(want))
				if random.Intn(2) == 0 {
					x.unload(t, want[i].name)
				} else {
					qt.Assert(t, qt.IsNil(x.Detach(t.Context(), refOf(want[i].name))))
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

// All at once. Whoever says that it is done has done it, and nothing is left over.
func TestInteropConcurrent(t *testing.T) {
	withTools(t, func(t *testing.T, x *theirs) {
		const rounds = 4
		o := at(1)
		o.Version = x.config
		x.join(t, 9, o) // so that the chain is never gone
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
					if err := x.Detach(t.Context(), refOf(tracerName(n))); err != nil {
						t.Errorf("detach %d, round %d: %v", n, round, err)
						return
					}
				}
			})
		}
		var refusals [2]int
		for n, name := range []string{"count", "droplist"} {
			all.Go(func() {
				// libxdp gives up after some tries; and it takes a chain that it read
				// just before others replaced it for something else.
				until := func(args ...string) bool {
					var out string
					for try := range 200 {
						var err error
						if out, err = x.try(args...); err == nil {
							return true
						}
						refusals[n]++
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
					m, err := c.Find(refOf(name))
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
		t.Logf("xdp-loader was refused %d and %d times", refusals[0], refusals[1])
		x.wantSame(t, "ldt_trace_9", "ldt_trace_0", "ldt_trace_1", "ldt_trace_2", "count", "droplist")
		x.wantTrace(t, 9, 0, 1, 2)
		x.wantCounted(t)
		x.run(t, "unload", x.Name, "--all")
		x.wantSame(t)
	})
}

// The dispatcher takes multi-buffer packets while all do, whoever changes it.
func TestInteropFrags(t *testing.T) {
	withTools(t, func(t *testing.T, x *theirs) {
		p, err := ebpf.NewProgram(testenv.VerdictSpec("ldt_frags", pass, testenv.Frags()))
		if err != nil {
			t.Skip("needs frags, which this kernel has not (Linux 5.18)")
		}
		p.Close()
		o := at(10)
		o.Version = x.config
		qt.Assert(t, qt.IsTrue(x.join(t, 1, o, testenv.Frags()).Config.Frags))
		x.load(t, "count")
		qt.Assert(t, qt.IsFalse(x.read(t).Config.Frags))
		x.wantSame(t, "ldt_trace_1", "count")
		qt.Assert(t, qt.IsTrue(x.member(t, "ldt_trace_1").Frags))
		x.unload(t, "count")
		x.wantSame(t, "ldt_trace_1")
		qt.Assert(t, qt.IsTrue(x.read(t).Config.Frags))
		x.run(t, "unload", x.Name, "--all")
		x.wantSame(t)
	})
}
