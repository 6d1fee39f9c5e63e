package concurrent

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// Many processes come, change, move and go at once, and some are killed at it: one that was told that it worked is there, with
// its name and where it belongs.
func TestConcurrentLinks(t *testing.T) {
	for _, h := range []hook.Hook{hook.TCXIngress, hook.CgroupConnect4} {
		t.Run(string(h), func(t *testing.T) {
			s := scene.NewOn(t, h)
			c := newCrowd(t, s, 20, func() string { return s.BPFFS })
			noStrangers(t, s)
			for _, operations := range []int{1, 4, 4} {
				c.start(operations)
				c.compare(t, c.wait(t))
			}
			c.start(4)
			for _, name := range c.names[:5] {
				time.Sleep(time.Duration(rand.IntN(50)) * time.Millisecond) // any moment will do
				c.workers[name].Kill()
				delete(c.workers, name)
			}
			c.compare(t, c.wait(t))
			c.start(1)
			c.compare(t, c.wait(t))
			c.stop(t)
		})
	}
}

// noStrangers reads the hook until the test ends: whatever is attached has its name from the beginning.
func noStrangers(t *testing.T, s *scene.Scene) {
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan bool)
	go func() {
		defer close(ended)
		for ctx.Err() == nil {
			chain, err := dispatcher.Read(ctx, s.Target, dispatcher.ReadOptions{BPFFS: s.BPFFS})
			if err == nil && slices.ContainsFunc(chain.Members, func(m hook.Member) bool { return m.Kind != hook.KindMember }) {
				t.Errorf("a member is called a stranger: %s", scene.Summary(chain))
				return
			}
		}
	}()
	t.Cleanup(func() { stop(); <-ended })
}

// Goroutines of one process are no different.
func TestLinksManyGoroutines(t *testing.T) {
	for _, h := range []hook.Hook{hook.TCXEgress, hook.CgroupConnect4, hook.TCIngress} {
		t.Run(string(h), func(t *testing.T) {
			s := scene.NewOn(t, h)
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
