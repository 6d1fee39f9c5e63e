package concurrent

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// Two processes move the same member at once: it ends where one of them wants it, and is there once.
func TestConcurrentMoves(t *testing.T) {
	for _, h := range []hook.Hook{hook.TCXIngress, hook.CgroupConnect4, hook.TCIngress} {
		t.Run(string(h), func(t *testing.T) {
			s := scene.NewOn(t, h)
			for _, n := range []int{2, 4, 6} {
				s.Member(t, n)
			}
			var movers []*scene.App
			for range 2 {
				a := scene.NewApp(t)
				qt.Assert(t, qt.IsNil(a.Do(t, s.Command(scene.Command{Op: "open", Member: "4"}))))
				movers = append(movers, a)
			}
			for round := range 15 {
				targets := []int{10, 70}
				if round%2 == 1 {
					targets = []int{50, 10}
				}
				var all sync.WaitGroup
				errs := make([]error, len(movers))
				for i, a := range movers {
					all.Go(func() { errs[i] = a.Do(t, scene.Command{Op: "set", Settings: scene.Priority(targets[i])}) })
				}
				all.Wait()
				for _, err := range errs {
					qt.Assert(t, qt.IsNil(err))
				}
				chain := s.Read(t)
				qt.Assert(t, qt.HasLen(chain.Members, 3), qt.Commentf("round %d: %s", round, scene.Summary(chain)))
				want := map[int][]int{10: {4, 2, 6}, 50: {2, 4, 6}, 70: {2, 6, 4}}[chain.Member("4").Priority]
				qt.Assert(t, qt.DeepEquals(s.Ran(t), want), qt.Commentf("round %d", round))
			}
		})
	}
}

// A process that does not see the lock changes the program of a link in the middle of its move. Whatever becomes of the move,
// the link runs what it was told to run, and once.
func TestUpdateInAMove(t *testing.T) {
	for _, h := range []hook.Hook{hook.TCXIngress, hook.CgroupConnect4} {
		for direction, to := range map[string]hook.Position{"up": {First: true}, "down": {Last: true}} {
			t.Run(direction+" on "+string(h), func(t *testing.T) {
				for at := 1; ; at++ {
					s := scene.NewOn(t, h)
					s = s.WithoutBPFFS(t)
					ctx := t.Context()
					join := func(n int) *dispatcher.Link {
						return s.Attach(t, s.Tracer(t, n), dispatcher.Options{Name: fmt.Sprint(n), Position: hook.Position{Last: true}})
					}
					order := map[string][]int{"up": {1, 3}, "down": {3, 1}}[direction]
					links := map[int]*dispatcher.Link{}
					for _, n := range order {
						links[n] = join(n)
					}
					m, err := links[3].Info(ctx)
					qt.Assert(t, qt.IsNil(err))
					stranger := s.Open(t, string(hook.LinkRef(m.LinkID)))
					steps, name := 0, ""
					other := s.Tracer(t, 4)
					updated := make(chan error, 1)
					kernel.OnStep = func(step string) {
						if strings.HasPrefix(step, "replace:") {
							return // the update's own
						}
						if steps++; steps == at {
							name = step
							go func() { updated <- stranger.Update(ctx, dispatcher.Program(other)) }()
							select { // it may have to wait until the move is over
							case update := <-updated:
								updated <- update
							case <-time.After(20 * time.Millisecond):
							}
						}
					}
					err = links[3].Move(ctx, to)
					var update error
					if steps >= at {
						update = <-updated
					}
					kernel.OnStep = nil
					if steps < at {
						qt.Assert(t, qt.IsNil(err))
						return
					}
					said := qt.Commentf("at step %d, %q: the update gave %v, the move %v", at, name, update, err)
					ran := s.Ran(t)
					slices.Sort(ran)
					qt.Check(t, qt.IsTrue(scene.OneOf(ran, [][]int{{1, 3}, {1, 4}})), said, qt.Commentf("%v", ran))
					if update == nil {
						qt.Check(t, qt.IsTrue(slices.Contains(ran, 4)), said)
					}
					for _, l := range []*dispatcher.Link{stranger, links[1], links[3]} {
						qt.Assert(t, qt.IsNil(l.Close()))
					}
				}
			})
		}
	}
}
