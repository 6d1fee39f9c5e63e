package dispatcher_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
)

// crash is an operation that a process dies of. The programs are tracers,
// called by their number; 9 is a persistent guard that comes last and drops.
type crash struct {
	name string
	// before is what there is; the victim has done first when it comes to fatal.
	before func(*testing.T, *scene)
	first  []command
	fatal  command

	// before, after: what a packet sees before the operation, and after it when
	// nobody died. dead: what it may see once the victim is dead.
	from, to []int
	dead     [][]int
}

// A process may be killed at any moment. Whatever it was doing, packets see the
// chain as it was or as it was to become, whoever reads it sees the same,
// others can go on working, and nothing stays behind.
func TestCrash(t *testing.T) {
	attach := func(c command) command {
		c.Op = "attach"
		return c
	}
	for _, c := range []crash{
		// The first member.
		{
			name:  "start a chain",
			fatal: attach(command{Program: 2}),
			to:    []int{2},
			dead:  [][]int{nil},
		}, {
			name:  "start a persistent chain",
			fatal: attach(command{Program: 2, Persistent: true}),
			to:    []int{2},
			dead:  [][]int{nil, {2}},
		},
		// Members that join and leave.
		{
			name:   "join",
			before: with(9),
			fatal:  attach(command{Program: 2}),
			from:   []int{9}, to: []int{2, 9},
			dead: [][]int{{9}},
		}, {
			name:   "join for good",
			before: with(9),
			fatal:  attach(command{Program: 2, Persistent: true}),
			from:   []int{9}, to: []int{2, 9},
			dead: [][]int{{9}, {2, 9}},
		}, {
			name:   "join for good with maps",
			before: with(9),
			fatal:  attach(command{Maps: true, Persistent: true}),
			from:   []int{9}, to: []int{9},
			dead: [][]int{{9}},
		}, {
			name: "come back to a closed door",
			before: func(t *testing.T, s *scene) {
				with(9)(t, s)
				door := s.attach(t, s.tracer(t, 2, pass), dispatcher.Options{Name: "2", Settings: hook.Settings{OnMissing: hook.MissingDrop}})
				qt.Assert(t, qt.IsNil(door.Close()))
				s.wantRunSoon(t)
			},
			fatal: attach(command{Program: 2, Persistent: true, Settings: hook.Settings{OnMissing: hook.MissingDrop}}),
			to:    []int{2, 9},
			dead:  [][]int{nil, {2, 9}},
		}, {
			name:   "leave",
			before: with(9),
			first:  []command{attach(command{Program: 2})},
			fatal:  command{Op: "leave"},
			from:   []int{2, 9}, to: []int{9},
			dead: [][]int{{9}},
		}, {
			name:   "detach one of several",
			before: with(2, 9),
			fatal:  command{Op: "detach", Member: "2"},
			from:   []int{2, 9}, to: []int{9},
			dead: [][]int{{2, 9}, {9}},
		}, {
			name:   "detach the last",
			before: with(2),
			fatal:  command{Op: "detach", Member: "2"},
			from:   []int{2},
			dead:   [][]int{{2}, nil},
		}, {
			name: "detach the last from its living owner",
			before: func(t *testing.T, s *scene) {
				s.attach(t, s.tracer(t, 2, pass), dispatcher.Options{Name: "2"})
			},
			fatal: command{Op: "detach", Member: "2"},
			from:  []int{2},
			dead:  [][]int{{2}, nil},
		}, {
			name:   "detach all",
			before: with(2, 3),
			fatal:  command{Op: "clear"},
			from:   []int{2, 3},
			dead:   [][]int{{2, 3}, nil},
		},
		// Changes of a member.
		{
			name:   "replace",
			before: with(2, 9),
			first:  []command{{Op: "open", Member: "2"}},
			fatal:  command{Op: "update", Program: 3},
			from:   []int{2, 9}, to: []int{3, 9},
			dead: [][]int{{2, 9}, {3, 9}},
		}, {
			name:   "replace one with maps",
			before: with(9),
			first:  []command{attach(command{Maps: true, Persistent: true})},
			fatal:  command{Op: "update", Maps: true},
			from:   []int{9}, to: []int{9},
			dead: [][]int{{9}},
		}, {
			name:   "set",
			before: with(2, 3, 9),
			first:  []command{{Op: "open", Member: "2"}},
			fatal:  command{Op: "set", Settings: priority(60)},
			from:   []int{2, 3, 9}, to: []int{3, 2, 9},
			dead: [][]int{{2, 3, 9}, {3, 2, 9}},
		}, {
			name:   "pin",
			before: with(9),
			first:  []command{attach(command{Program: 2})},
			fatal:  command{Op: "pin"},
			from:   []int{2, 9}, to: []int{2, 9},
			dead: [][]int{{9}, {2, 9}},
		}, {
			name:  "pin the first",
			first: []command{attach(command{Program: 2})},
			fatal: command{Op: "pin"},
			from:  []int{2}, to: []int{2},
			dead: [][]int{nil, {2}},
		}, {
			name:   "unpin",
			before: with(2, 9),
			first:  []command{{Op: "open", Member: "2"}},
			fatal:  command{Op: "unpin"},
			from:   []int{2, 9}, to: []int{2, 9},
			dead: [][]int{{2, 9}, {9}},
		}, {
			name:   "unpin the last",
			before: with(2),
			first:  []command{{Op: "open", Member: "2"}},
			fatal:  command{Op: "unpin"},
			from:   []int{2}, to: []int{2},
			dead: [][]int{{2}, nil},
		},
		// Watching changes nothing that packets see.
		{
			name:   "measure",
			before: with(2, 9),
			fatal:  command{Op: "measure"},
			from:   []int{2, 9}, to: []int{2, 9},
			dead: [][]int{{2, 9}},
		},
		// Taking over what netlink attached. Between the old program and the
		// chain there is a gap, and death may come in it.
		{
			name:   "adopt",
			before: legacy,
			fatal:  command{Op: "adopt", Member: "2"},
			from:   []int{2}, to: []int{2},
			dead: [][]int{{2}, nil},
		}, {
			name:   "adopt for good",
			before: legacy,
			fatal:  command{Op: "adopt", Member: "2", Persistent: true},
			from:   []int{2}, to: []int{2},
			dead: [][]int{{2}, nil},
		}, {
			name:   "adopt for good without a gap",
			before: legacy,
			fatal:  command{Op: "adopt", Member: "2", Persistent: true, NoGap: true},
			from:   []int{2}, to: []int{2},
			dead: [][]int{{2}, nil},
		}, {
			name: "protect",
			before: func(t *testing.T, s *scene) {
				legacy(t, s)
				link, err := dispatcher.Adopt(t.Context(), s.target, dispatcher.AdoptOptions{
					NoGap: true, Options: dispatcher.Options{Name: "2", Persistent: true, BPFFS: s.bpffs},
				})
				qt.Assert(t, qt.IsNil(err))
				qt.Assert(t, qt.IsNil(link.Close()))
			},
			fatal: command{Op: "adopt"},
			from:  []int{2}, to: []int{2},
			dead: [][]int{{2}, nil},
		},
	} {
		t.Run(c.name, func(t *testing.T) { c.run(t, newScene(t)) })
	}
}

// The same while a chain is sealed, or about to be: whoever is killed, packets run what is in the slots.
func TestCrashSealed(t *testing.T) {
	attach := func(c command) command {
		c.Op = "attach"
		return c
	}
	for _, c := range []crash{
		{
			name:   "seal",
			before: with(2, 9),
			fatal:  command{Op: "seal"},
			from:   []int{2, 9}, to: []int{2, 9},
			dead: [][]int{{2, 9}},
		}, {
			name: "seal with a guest and an empty slot",
			before: func(t *testing.T, s *scene) {
				with(2, 9)(t, s)
				s.attach(t, s.tracer(t, 4, pass), dispatcher.Options{Name: "4", Settings: priority(70)})
				s.wantRun(t, 2, 4, 9)
				qt.Assert(t, qt.IsNil(s.attach(t, s.tracer(t, 3, pass), dispatcher.Options{Name: "3", Settings: priority(60)}).Close()))
				s.wantRunSoon(t, 2, 4, 9)
			},
			fatal: command{Op: "seal"},
			from:  []int{2, 4, 9}, to: []int{2, 4, 9},
			dead: [][]int{{2, 4, 9}},
		}, {
			name:   "unseal",
			before: sealed(2, 9),
			fatal:  command{Op: "unseal"},
			from:   []int{2, 9}, to: []int{2, 9},
			dead: [][]int{{2, 9}},
		}, {
			name:   "replace",
			before: sealed(2, 9),
			first:  []command{{Op: "open", Member: "2"}},
			fatal:  command{Op: "update", Program: 3},
			from:   []int{2, 9}, to: []int{3, 9},
			dead: [][]int{{2, 9}, {3, 9}},
		}, {
			name:   "replace the guard",
			before: sealed(2, 9),
			first:  []command{{Op: "open", Member: "9"}},
			fatal:  command{Op: "update", Program: 9},
			from:   []int{2, 9}, to: []int{2, 9},
			dead: [][]int{{2, 9}},
		}, {
			name:   "replace one with maps",
			before: with(9),
			first:  []command{attach(command{Maps: true, Persistent: true}), {Op: "seal"}},
			fatal:  command{Op: "update", Maps: true},
			from:   []int{9}, to: []int{9},
			dead: [][]int{{9}},
		}, {
			name:   "set",
			before: sealed(2, 3, 9),
			first:  []command{{Op: "open", Member: "2"}},
			fatal:  command{Op: "set", Settings: priority(60)},
			from:   []int{2, 3, 9}, to: []int{3, 2, 9},
			dead: [][]int{{2, 3, 9}, {3, 2, 9}},
		}, {
			name:   "join",
			before: sealed(9),
			fatal:  attach(command{Program: 2}),
			from:   []int{9}, to: []int{2, 9},
			dead: [][]int{{9}},
		}, {
			name:   "join for good",
			before: sealed(9),
			fatal:  attach(command{Program: 2, Persistent: true}),
			from:   []int{9}, to: []int{2, 9},
			dead: [][]int{{9}, {2, 9}},
		}, {
			name:   "detach one of several",
			before: sealed(2, 9),
			fatal:  command{Op: "detach", Member: "2"},
			from:   []int{2, 9}, to: []int{9},
			dead: [][]int{{2, 9}, {9}},
		}, {
			name:   "detach all",
			before: sealed(2, 3),
			fatal:  command{Op: "clear"},
			from:   []int{2, 3},
			dead:   [][]int{{2, 3}, nil},
		}, {
			name:   "unpin",
			before: sealed(2, 9),
			first:  []command{{Op: "open", Member: "2"}},
			fatal:  command{Op: "unpin"},
			from:   []int{2, 9}, to: []int{2, 9},
			dead: [][]int{{2, 9}, {9}},
		},
	} {
		t.Run(c.name, func(t *testing.T) { c.run(t, newSealScene(t)) })
	}
}

// run lets the victim die at each step.
func (c crash) run(t *testing.T, s *scene) {
	n := 1
	for ; c.dies(t, s, n); n++ {
	}
	qt.Assert(t, qt.IsTrue(n > 1), qt.Commentf("nobody has died"))
}

// sealed begins a crash with persistent members that are linked into the dispatcher.
func sealed(members ...int) func(*testing.T, *scene) {
	return func(t *testing.T, s *scene) {
		with(members...)(t, s)
		var names []string
		for _, n := range members {
			names = append(names, fmt.Sprint(n))
		}
		s.seal(t, strings.Join(names, " "))
	}
}

// with begins a crash with persistent members.
func with(members ...int) func(*testing.T, *scene) {
	return func(t *testing.T, s *scene) {
		for _, n := range members {
			verdict, prio := pass, 50
			if n == 9 {
				verdict, prio = drop, 90
			}
			s.attach(t, s.tracer(t, n, verdict), dispatcher.Options{Name: fmt.Sprint(n), Settings: priority(prio), Persistent: true}).Close()
		}
	}
}

// legacy begins a crash with a program that is attached without a link.
func legacy(t *testing.T, s *scene) {
	s.attachLegacy(t, s.tracer(t, 2, pass))
}

// dies lets the victim die at the n-th step of its operation, and returns
// false when it has fewer.
func (c crash) dies(t *testing.T, s *scene, n int) bool {
	t.Helper()
	if c.before != nil {
		c.before(t, s)
	}
	victim := newApp(t)
	defer victim.Kill()
	for _, cmd := range c.first {
		qt.Assert(t, qt.IsNil(victim.do(t, s.tracers(t, cmd))))
	}
	s.wantRun(t, c.from...)

	fatal := s.tracers(t, c.fatal)
	fatal.DieAt = n
	got := victim.try(t, fatal)
	at := qt.Commentf("died at step %d, %q", n, got.Died)
	if got.Died == "" {
		qt.Assert(t, qt.IsNil(got.err()))
		s.wantRun(t, c.to...)
	}
	victim.Kill()
	if got.Died == "adopt: before the gap" {
		s.wantRun(t, c.from...)
	}

	// Packets, and Read.
	possible := append(slices.Clone(c.dead), c.from, c.to)
	qt.Assert(t, qt.IsTrue(oneOf(s.ran(t), possible)), at)
	guarded := slices.Contains(c.from, 9) || slices.Contains(c.to, 9)
	soon(t, func() bool {
		ran, read := s.ran(t), s.read(t)
		qt.Assert(t, qt.IsTrue(oneOf(ran, possible)), at)
		return oneOf(ran, c.dead) && slices.Equal(ran, running(read))
	})
	if guarded {
		qt.Assert(t, qt.IsTrue(s.drops(t)), at)
	}

	// The next one.
	next, err := dispatcher.Attach(t.Context(), s.target, dispatcher.Program(s.tracer(t, 8, pass)),
		dispatcher.Options{Name: "8", Settings: priority(1), BPFFS: s.bpffs})
	if errors.Is(err, dispatcher.ErrBusy) {
		next, err = dispatcher.Adopt(t.Context(), s.target, dispatcher.AdoptOptions{Options: dispatcher.Options{BPFFS: s.bpffs}})
	}
	qt.Assert(t, qt.IsNil(err), at)
	ran := s.ran(t)
	if ran[0] == 8 {
		ran = ran[1:]
	}
	if len(ran) == 0 {
		ran = nil
	}
	qt.Assert(t, qt.IsTrue(oneOf(ran, possible)), at)
	if guarded {
		qt.Assert(t, qt.IsTrue(s.drops(t)), at)
	}
	qt.Assert(t, qt.IsNil(next.Close()), at)

	s.clear(t)
	s.wantFree(t)
	return got.Died != ""
}

// tracers completes a command in which a tracer's number stands for the
// program.
func (s *scene) tracers(t *testing.T, c command) command {
	t.Helper()
	if n := c.Program; n != 0 {
		if c.Member == "" {
			c.Member = fmt.Sprint(n)
		}
		verdict := pass
		if n == 9 {
			verdict = drop
		}
		c.Program = idOf(t, s.tracer(t, int(n), verdict))
	}
	return s.command(c)
}

func oneOf(run []int, possible [][]int) bool {
	return slices.ContainsFunc(possible, func(p []int) bool { return slices.Equal(run, p) })
}

// running returns which tracers a packet must meet, by what Read says.
func running(c *hook.Chain) (numbers []int) {
	for _, m := range c.Members {
		var n int
		if m.State != hook.StateRunning {
			if m.OnMissing == hook.MissingDrop {
				break
			}
			continue
		}
		if _, err := fmt.Sscanf(m.Program.Name, "ldt_trace_%d", &n); err == nil {
			numbers = append(numbers, n)
		}
	}
	return numbers
}
