package concurrent

import (
	"context"
	"fmt"
	"sync"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// Many processes that seal and unseal, and change their members, at once: packets run what each was told to be there, whether it is
// sealed in the end or not.
func TestConcurrentSeals(t *testing.T) {
	s := scene.New(t)
	s.Coded = true
	c := newCrowd(t, s, 20, func() string { return s.BPFFS })
	ever := false // the last operation of a round may be an unseal
	for round := 0; round < 3 || !ever && round < 30; round++ {
		c.start(5)
		reports := c.wait(t)
		c.compare(t, reports)
		ever = ever || len(scene.SealedNames(s.Read(t))) > 0
		ran := s.Ran(t)
		s.Unseal(t)
		s.WantRun(t, ran...)
		c.compare(t, reports)
	}
	qt.Check(t, qt.IsTrue(ever), qt.Commentf("nothing was ever sealed"))
	for _, w := range c.workers {
		qt.Check(t, qt.IsNil(w.Stop()))
	}
	s.Clear(t)
	s.WantFree(t)
}

// One process seals the chain and another one, which does not see the lock, puts a program into a slot at the same moment. When
// both have returned packets run that program.
func TestConcurrentSealAndReplace(t *testing.T) {
	s := scene.New(t)
	s.Coded = true
	s.Member(t, 1)
	s.Member(t, 2)
	s.Member(t, 3)
	sealer, owners := scene.NewApp(t), []*scene.App{scene.NewApp(t), scene.NewApp(t)}
	for _, a := range owners {
		open := s.Command(scene.Command{Op: "open", Member: "2"})
		open.BPFFS = t.TempDir()
		qt.Assert(t, qt.IsNil(a.Do(t, open)))
	}
	var programs []*ebpf.Program
	for n := 10; n < 16; n++ {
		prog := s.Tracer(t, n, scene.Pass)
		if n%3 == 0 {
			prog = s.Trace.Program(t, n, scene.Pass)
		}
		programs = append(programs, prog)
	}
	sealed := 0
	for i := range scene.Changes(t, 400) {
		ops := []string{"seal", "unseal", "seal"}
		var all sync.WaitGroup
		all.Go(func() { qt.Check(t, qt.IsNil(sealer.Do(t, s.Command(scene.Command{Op: ops[i%3]})))) })
		for j, a := range owners[:1+i%2] { // sometimes two of them
			prog := scene.ID(t, programs[(i+3*j)%len(programs)])
			all.Go(func() { qt.Check(t, qt.IsNil(a.Do(t, scene.Command{Op: "update", Target: s.Target, Program: prog}))) })
		}
		all.Wait()
		chain := s.Read(t)
		sealed += len(scene.SealedNames(chain))
		qt.Assert(t, qt.DeepEquals(s.Ran(t), scene.Running(chain)), qt.Commentf("round %d, sealed %v", i, scene.SealedNames(chain)))
		if i%2 == 0 {
			qt.Assert(t, qt.Equals(scene.Running(chain)[1], 10+i%len(programs)))
		}
	}
	qt.Check(t, qt.IsTrue(sealed > 0))
	s.Clear(t)
	s.WantFree(t)
}

// Between two processes that cannot see each other's lock: whatever one is at when the other comes, in the end packets run what
// is in the slots.
func TestSealAgainstOthers(t *testing.T) {
	s := scene.NewSealScene(t)
	ctx := t.Context()
	second := 0
	// next is another program for the member each time.
	next := func(programs ...*ebpf.Program) *ebpf.Program {
		second++
		return programs[second%len(programs)]
	}
	withCode := []*ebpf.Program{s.Tracer(t, 10, scene.Pass), s.Tracer(t, 11, scene.Pass), s.Tracer(t, 12, scene.Pass)}
	without := []*ebpf.Program{s.Trace.Program(t, 20, scene.Pass), s.Trace.Program(t, 21, scene.Pass), s.Trace.Program(t, 22, scene.Pass)}

	for what, first := range map[string]func(*dispatcher.Link) error{
		"seal": func(*dispatcher.Link) error {
			_, err := dispatcher.Seal(ctx, s.Target, dispatcher.SealOptions{BPFFS: s.BPFFS})
			return err
		},
		"unseal": func(*dispatcher.Link) error {
			return dispatcher.Unseal(ctx, s.Target, dispatcher.ReadOptions{BPFFS: s.BPFFS})
		},
		"replace":              func(l *dispatcher.Link) error { return l.Update(ctx, dispatcher.Program(next(withCode...))) },
		"replace without code": func(l *dispatcher.Link) error { return l.Update(ctx, dispatcher.Program(next(without...))) },
		"set":                  func(l *dispatcher.Link) error { return l.Set(ctx, scene.Priority(40+second%2)) },
		"detach another":       func(*dispatcher.Link) error { return dispatcher.Detach(ctx, s.Target, "3", s.Leave()) },
	} {
		for with, programs := range map[string][]*ebpf.Program{"with code": withCode, "without": without} {
			for _, sealed := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s and replace %s, sealed %v", what, with, sealed), func(t *testing.T) {
					t.Cleanup(func() { dispatcher.DetachAll(context.Background(), s.Target, s.Leave()) })
					// The step of the first at which the second replaces the program.
					for at := 1; ; at++ {
						s.Member(t, 1)
						qt.Assert(t, qt.IsNil(s.Attach(t, next(withCode...), scene.Persistent("2", 20)).Close()))
						s.Member(t, 3)
						if sealed {
							s.Seal(t, "1 2 3")
						}
						link := s.Open(t, "2")
						other := scene.NewApp(t)
						blind := s.Command(scene.Command{Op: "open", Member: "2"})
						blind.BPFFS = t.TempDir()
						qt.Assert(t, qt.IsNil(other.Do(t, blind)))

						n, name := 0, ""
						err := scene.AtEachStep(func() error { return first(link) }, func(step string) {
							if n++; n != at {
								return
							}
							name = step
							blind.Op, blind.Program = "update", scene.ID(t, next(programs...))
							qt.Assert(t, qt.IsNil(other.Do(t, blind)))
						})
						qt.Assert(t, qt.IsNil(err))
						got := s.Ran(t)
						qt.Assert(t, qt.DeepEquals(got, scene.Running(s.Read(t))), qt.Commentf("replaced at step %d, %q", at, name))
						s.Unseal(t)
						s.WantRun(t, got...)
						qt.Assert(t, qt.IsNil(link.Close()))
						other.Kill()
						s.Clear(t)
						if name == "" {
							break
						}
					}
				})
			}
		}
	}
	s.WantFree(t)
}
