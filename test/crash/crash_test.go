package crash

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// crash is an operation that a process dies of. The programs are tracers,
// called by their number; 9 is a persistent guard that comes last and drops.
type crash struct {
	name string
	only []string // families of hooks, where not on all
	// before is what there is; the victim has done first when it comes to fatal.
	before func(*testing.T, *scene.Scene)
	first  []scene.Command
	fatal  scene.Command

	// before, after: what a packet sees before the operation, and after it when
	// nobody died. dead: what it may see once the victim is dead.
	from, to []int
	dead     [][]int
	// between, on a hook without a dispatcher: what may run besides while the operation is at it, and also once the victim
	// is dead, until the next operation.
	between [][]int
}

// A process may be killed at any moment. Whatever it was doing, packets see the
// chain as it was or as it was to become, readers see the same,
// others can go on working, and nothing stays behind.
func TestCrash(t *testing.T) {
	attach := func(c scene.Command) scene.Command {
		c.Op = "attach"
		return c
	}
	for _, c := range []crash{
		// The first member.
		{
			name:  "start a chain",
			fatal: attach(scene.Command{Program: 2}),
			to:    []int{2},
			dead:  [][]int{nil},
		}, {
			name:  "start a persistent chain",
			fatal: attach(scene.Command{Program: 2, Persistent: true}),
			to:    []int{2},
			dead:  [][]int{nil, {2}},
		},
		// Members that join and leave.
		{
			name:   "join",
			before: with(9),
			fatal:  attach(scene.Command{Program: 2}),
			from:   []int{9}, to: []int{2, 9},
			dead: [][]int{{9}},
		}, {
			name:   "join for good",
			before: with(9),
			fatal:  attach(scene.Command{Program: 2, Persistent: true}),
			from:   []int{9}, to: []int{2, 9},
			dead: [][]int{{9}, {2, 9}},
		}, {
			name:   "join for good with maps",
			before: with(9),
			fatal:  attach(scene.Command{Maps: true, Persistent: true}),
			from:   []int{9}, to: []int{9},
			dead: [][]int{{9}},
		}, {
			name: "come back to a closed door",
			before: func(t *testing.T, s *scene.Scene) {
				with(9)(t, s)
				door := s.Attach(t, s.Tracer(t, 2, scene.Pass), dispatcher.Options{Name: "2", OnMissing: hook.MissingDrop})
				qt.Assert(t, qt.IsNil(door.Close()))
				s.WantRunSoon(t)
			},
			fatal: attach(scene.Command{Program: 2, Persistent: true, Settings: hook.Settings{OnMissing: hook.MissingDrop}}),
			to:    []int{2, 9},
			dead:  [][]int{nil, {2, 9}},
		}, {
			name:   "leave",
			before: with(9),
			first:  []scene.Command{attach(scene.Command{Program: 2})},
			fatal:  scene.Command{Op: "leave"},
			from:   []int{2, 9}, to: []int{9},
			dead: [][]int{{9}},
		}, {
			name:   "detach one of several",
			before: with(2, 9),
			fatal:  scene.Command{Op: "detach", Member: "2"},
			from:   []int{2, 9}, to: []int{9},
			dead: [][]int{{2, 9}, {9}},
		}, {
			name:   "detach the last",
			before: with(2),
			fatal:  scene.Command{Op: "detach", Member: "2"},
			from:   []int{2},
			dead:   [][]int{{2}, nil},
		}, {
			name: "detach the last from its living owner",
			before: func(t *testing.T, s *scene.Scene) {
				s.Attach(t, s.Tracer(t, 2, scene.Pass), dispatcher.Options{Name: "2"})
			},
			fatal: scene.Command{Op: "detach", Member: "2"},
			from:  []int{2},
			dead:  [][]int{{2}, nil},
		}, {
			name:   "detach all",
			before: with(2, 3),
			fatal:  scene.Command{Op: "clear"},
			from:   []int{2, 3},
			dead:   [][]int{{2, 3}, nil},
		},
		// Changes of a member.
		{
			name:   "replace",
			before: with(2, 9),
			first:  []scene.Command{{Op: "open", Member: "2"}},
			fatal:  scene.Command{Op: "update", Program: 3},
			from:   []int{2, 9}, to: []int{3, 9},
			dead: [][]int{{2, 9}, {3, 9}},
		}, {
			name:   "replace one with maps",
			before: with(9),
			first:  []scene.Command{attach(scene.Command{Maps: true, Persistent: true})},
			fatal:  scene.Command{Op: "update", Maps: true},
			from:   []int{9}, to: []int{9},
			dead: [][]int{{9}},
		}, {
			name:   "set",
			before: with(2, 3, 9),
			first:  []scene.Command{{Op: "open", Member: "2"}},
			fatal:  scene.Command{Op: "set", Settings: scene.Priority(60)},
			from:   []int{2, 3, 9}, to: []int{3, 2, 9},
			dead: [][]int{{2, 3, 9}, {3, 2, 9}},
		}, {
			name:   "pin",
			before: with(9),
			first:  []scene.Command{attach(scene.Command{Program: 2})},
			fatal:  scene.Command{Op: "pin"},
			from:   []int{2, 9}, to: []int{2, 9},
			dead: [][]int{{9}, {2, 9}},
		}, {
			name:  "pin the first",
			first: []scene.Command{attach(scene.Command{Program: 2})},
			fatal: scene.Command{Op: "pin"},
			from:  []int{2}, to: []int{2},
			dead: [][]int{nil, {2}},
		}, {
			name:   "unpin",
			before: with(2, 9),
			first:  []scene.Command{{Op: "open", Member: "2"}},
			fatal:  scene.Command{Op: "unpin"},
			from:   []int{2, 9}, to: []int{2, 9},
			dead: [][]int{{2, 9}, {9}},
		}, {
			name:   "unpin the last",
			before: with(2),
			first:  []scene.Command{{Op: "open", Member: "2"}},
			fatal:  scene.Command{Op: "unpin"},
			from:   []int{2}, to: []int{2},
			dead: [][]int{{2}, nil},
		},
		// Watching changes nothing that packets see.
		{
			name:   "measure",
			before: with(2, 9),
			fatal:  scene.Command{Op: "measure"},
			from:   []int{2, 9}, to: []int{2, 9},
			dead: [][]int{{2, 9}},
		},
		// Taking over what netlink attached. Between the old program and the
		// chain there is a gap, and death may come in it.
		{
			name:   "adopt",
			before: legacy,
			fatal:  scene.Command{Op: "adopt", Member: "2"},
			from:   []int{2}, to: []int{2},
			dead: [][]int{{2}, nil},
		}, {
			name:   "adopt for good",
			before: legacy,
			fatal:  scene.Command{Op: "adopt", Member: "2", Persistent: true},
			from:   []int{2}, to: []int{2},
			dead: [][]int{{2}, nil},
		}, {
			name:   "adopt for good without a gap",
			before: legacy,
			fatal:  scene.Command{Op: "adopt", Member: "2", Persistent: true, NoGap: true},
			from:   []int{2}, to: []int{2},
			dead: [][]int{{2}, nil},
		}, {
			name: "protect",
			before: func(t *testing.T, s *scene.Scene) {
				legacy(t, s)
				link, err := dispatcher.Adopt(t.Context(), s.Target, dispatcher.AdoptOptions{
					NoGap: true, Name: "2", Persistent: true, BPFFS: s.BPFFS,
				})
				qt.Assert(t, qt.IsNil(err))
				qt.Assert(t, qt.IsNil(link.Close()))
			},
			fatal: scene.Command{Op: "adopt"},
			from:  []int{2}, to: []int{2},
			dead: [][]int{{2}, nil},
		},
	} {
		t.Run(c.name, func(t *testing.T) { c.run(t, scene.New(t)) })
	}
}

// run lets the victim die at each step.
func (c crash) run(t *testing.T, s *scene.Scene) {
	n := 1
	for ; c.dies(t, s, n); n++ {
	}
	qt.Assert(t, qt.IsTrue(n > 1), qt.Commentf("nobody has died"))
}

// with begins a crash with persistent members.
func with(members ...int) func(*testing.T, *scene.Scene) {
	return func(t *testing.T, s *scene.Scene) {
		for _, n := range members {
			s.Member(t, n)
		}
	}
}

// legacy begins a crash with a program that is attached without a link.
func legacy(t *testing.T, s *scene.Scene) {
	s.AttachLegacy(t, s.Tracer(t, 2, scene.Pass))
}

// strike lets the victim die at the n-th step of its operation, and checks what packets see before it, and after it when
// nobody died.
func (c crash) strike(t *testing.T, s *scene.Scene, n int) (scene.Answer, qt.Comment) {
	t.Helper()
	if c.before != nil {
		c.before(t, s)
	}
	victim := scene.NewApp(t)
	defer victim.Kill()
	for _, cmd := range c.first {
		qt.Assert(t, qt.IsNil(victim.Do(t, tracers(t, s, cmd))))
	}
	s.WantRun(t, c.from...)

	fatal := tracers(t, s, c.fatal)
	fatal.DieAt = n
	got := victim.Try(t, fatal)
	if got.Died == "" {
		qt.Assert(t, qt.IsNil(got.Err()))
		s.WantRun(t, c.to...)
	}
	return got, qt.Commentf("died at step %d, %q", n, got.Died)
}

// dies lets the victim die at the n-th step of its operation, and returns
// false when it has fewer.
func (c crash) dies(t *testing.T, s *scene.Scene, n int) bool {
	t.Helper()
	got, at := c.strike(t, s, n)
	if got.Died == "adopt: before the gap" {
		s.WantRun(t, c.from...)
	}

	// Packets, and Read.
	possible := append(slices.Clone(c.dead), c.from, c.to)
	qt.Assert(t, qt.IsTrue(scene.OneOf(s.Ran(t), possible)), at)
	guarded := slices.Contains(c.from, 9) || slices.Contains(c.to, 9)
	scene.Soon(t, func() bool {
		ran, read := s.Ran(t), s.Read(t)
		qt.Assert(t, qt.IsTrue(scene.OneOf(ran, possible)), at)
		return scene.OneOf(ran, c.dead) && slices.Equal(ran, scene.Running(read))
	})
	if guarded {
		qt.Assert(t, qt.IsTrue(s.Drops(t)), at)
	}

	// The next one.
	next, err := dispatcher.Attach(t.Context(), s.Target, dispatcher.Program(s.Tracer(t, 8, scene.Pass)),
		dispatcher.Options{Name: "8", Priority: 1, BPFFS: s.BPFFS})
	if errors.Is(err, dispatcher.ErrBusy) {
		next, err = dispatcher.Adopt(t.Context(), s.Target, dispatcher.AdoptOptions{BPFFS: s.BPFFS})
	}
	qt.Assert(t, qt.IsNil(err), at)
	ran := s.Ran(t)
	if ran[0] == 8 {
		ran = ran[1:]
	}
	if len(ran) == 0 {
		ran = nil
	}
	qt.Assert(t, qt.IsTrue(scene.OneOf(ran, possible)), at)
	if guarded {
		qt.Assert(t, qt.IsTrue(s.Drops(t)), at)
	}
	qt.Assert(t, qt.IsNil(next.Close()), at)

	s.Clear(t)
	s.WantFree(t)
	return got.Died != ""
}

// tracers completes a command in which a tracer's number stands for the program.
func tracers(t *testing.T, s *scene.Scene, c scene.Command) scene.Command {
	t.Helper()
	if n := c.Program; n != 0 {
		if c.Member == "" {
			c.Member = fmt.Sprint(n)
		}
		c.Program = scene.ID(t, s.Tracer(t, int(n)))
	}
	if s.Filters() && c.Op == "attach" {
		c.Persistent = true
	}
	return s.Command(c)
}
