package crash

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// A process may be killed at any moment, here too.
func TestLinkCrash(t *testing.T) {
	attach := func(c scene.Command) scene.Command {
		c.Op = "attach"
		return c
	}
	set := func(to int) scene.Command { return scene.Command{Op: "set", Settings: scene.Priority(to)} }
	open := []scene.Command{{Op: "open", Member: "3"}}
	for _, c := range []crash{
		{
			name:  "attach",
			only:  []string{"tcx", "cgroup"},
			fatal: attach(scene.Command{Program: 2}),
			to:    []int{2},
			dead:  [][]int{nil},
		}, {
			name:   "attach between others",
			only:   []string{"tcx", "cgroup"},
			before: with(1, 9),
			fatal:  attach(scene.Command{Program: 2, Settings: scene.Priority(20)}),
			from:   []int{1, 9}, to: []int{1, 2, 9},
			dead: [][]int{{1, 9}},
		}, {
			name:   "attach for good",
			before: with(1, 3),
			fatal:  attach(scene.Command{Program: 2, Settings: scene.Priority(20), Persistent: true}),
			from:   []int{1, 3}, to: []int{1, 2, 3},
			dead: [][]int{{1, 3}, {1, 2, 3}},
		}, {
			name:   "attach for good with maps",
			before: with(1, 3),
			fatal:  attach(scene.Command{Maps: true, Settings: scene.Priority(20), Persistent: true}),
			from:   []int{1, 3}, to: []int{1, 3},
			dead: [][]int{{1, 3}},
		}, {
			name:   "leave",
			only:   []string{"tcx", "cgroup"},
			before: with(1, 9),
			first:  []scene.Command{attach(scene.Command{Program: 2, Settings: scene.Priority(20)})},
			fatal:  scene.Command{Op: "leave"},
			from:   []int{1, 2, 9}, to: []int{1, 9},
			dead: [][]int{{1, 9}},
		}, {
			name:   "detach one of several",
			before: with(1, 2, 3),
			fatal:  scene.Command{Op: "detach", Member: "2"},
			from:   []int{1, 2, 3}, to: []int{1, 3},
			dead: [][]int{{1, 2, 3}, {1, 3}},
		}, {
			name:   "detach the last",
			before: with(2),
			fatal:  scene.Command{Op: "detach", Member: "2"},
			from:   []int{2},
			dead:   [][]int{{2}, nil},
		}, {
			name:   "detach all",
			before: with(1, 2, 3),
			fatal:  scene.Command{Op: "clear"},
			from:   []int{1, 2, 3},
			dead:   [][]int{{1, 2, 3}, {2, 3}, {3}, nil}, // one after the other
		}, {
			name:   "replace",
			before: with(1, 3),
			first:  open,
			fatal:  scene.Command{Op: "update", Program: 2},
			from:   []int{1, 3}, to: []int{1, 2},
			dead: [][]int{{1, 3}, {1, 2}},
		}, {
			name:   "replace one with maps",
			before: with(1, 3),
			first:  []scene.Command{attach(scene.Command{Maps: true, Persistent: true})},
			fatal:  scene.Command{Op: "update", Maps: true},
			from:   []int{1, 3}, to: []int{1, 3},
			dead: [][]int{{1, 3}},
		}, {
			name:   "set without a move",
			before: with(1, 3, 5),
			first:  open,
			fatal:  set(35),
			from:   []int{1, 3, 5}, to: []int{1, 3, 5},
			dead: [][]int{{1, 3, 5}},
		}, {
			name:   "move up",
			before: with(1, 2, 3, 4),
			first:  open,
			fatal:  set(5),
			from:   []int{1, 2, 3, 4}, to: []int{3, 1, 2, 4},
			dead: [][]int{{1, 2, 3, 4}, {3, 1, 2, 4}},
		}, {
			name:   "move down",
			before: with(1, 3, 4, 5),
			first:  open,
			fatal:  set(60),
			from:   []int{1, 3, 4, 5}, to: []int{1, 4, 5, 3},
			dead: [][]int{{1, 3, 4, 5}, {1, 4, 5, 3}},
		}, {
			name:   "move up one's own",
			only:   []string{"tcx", "cgroup"},
			before: with(1, 2, 4),
			first:  []scene.Command{attach(scene.Command{Program: 3, Settings: scene.Priority(30)})},
			fatal:  set(5),
			from:   []int{1, 2, 3, 4}, to: []int{3, 1, 2, 4},
			dead: [][]int{{1, 2, 4}},
		}, {
			name: "move down one's own that another holds too",
			only: []string{"tcx", "cgroup"},
			before: func(t *testing.T, s *scene.Scene) {
				with(1, 4, 5)(t, s)
			},
			first: []scene.Command{attach(scene.Command{Program: 3, Settings: scene.Priority(30)})},
			fatal: set(60),
			from:  []int{1, 3, 4, 5}, to: []int{1, 4, 5, 3},
			dead: [][]int{{1, 4, 5}},
		}, {
			name:   "pin",
			only:   []string{"tcx", "cgroup"},
			before: with(1, 3),
			first:  []scene.Command{attach(scene.Command{Program: 2, Settings: scene.Priority(20)})},
			fatal:  scene.Command{Op: "pin"},
			from:   []int{1, 2, 3}, to: []int{1, 2, 3},
			dead: [][]int{{1, 3}, {1, 2, 3}},
		}, {
			name:   "unpin",
			only:   []string{"tcx", "cgroup"},
			before: with(1, 3),
			first:  open,
			fatal:  scene.Command{Op: "unpin"},
			from:   []int{1, 3}, to: []int{1, 3},
			dead: [][]int{{1}, {1, 3}},
		},
	} {
		for _, h := range []hook.Hook{hook.TCXIngress, hook.TCIngress, hook.CgroupConnect4} {
			if c.only != nil && !slices.Contains(c.only, h.Family()) {
				continue
			}
			t.Run(fmt.Sprintf("%s on %s", c.name, h), func(t *testing.T) {
				s := scene.NewOn(t, h)
				c.both(s)
				for n := 1; c.diesOnLinks(t, s, n); n++ {
				}
			})
		}
	}
}

// both adds to what may run what the documentation says of cgroups and clsact: a program that moves is at both places for
// a moment.
func (c *crash) both(s *scene.Scene) {
	if s.Target.Hook.Family() == "tcx" || len(c.from) != len(c.to) || slices.Equal(c.from, c.to) || c.fatal.Op != "set" {
		return
	}
	if c.from[1] == 3 {
		c.between = append(c.between, append(slices.Clone(c.from), 3))
	} else {
		c.between = append(c.between, append([]int{3}, c.from...))
	}
}

// diesOnLinks is dies on a hook without a dispatcher.
func (c crash) diesOnLinks(t *testing.T, s *scene.Scene, n int) bool {
	t.Helper()
	got, at := c.strike(t, s, n)

	// Packets, and Read, which shows no member twice unless packets meet it twice.
	possible := append(slices.Clone(c.dead), c.from, c.to)
	ran := s.Ran(t)
	qt.Assert(t, qt.IsTrue(scene.OneOf(ran, append(slices.Clone(possible), c.between...))), at)
	scene.Soon(t, func() bool { return scene.OneOf(s.Ran(t), append(slices.Clone(c.dead), c.between...)) })
	read := scene.Running(s.Read(t))
	if ran := s.Ran(t); !slices.Equal(read, ran) && !scene.OneOf(read, c.dead) {
		t.Errorf("died at step %d, %q: packets see %v, and Read shows %v", n, got.Died, ran, read)
	}

	// The next one.
	next, err := dispatcher.Attach(t.Context(), s.Target, dispatcher.Program(s.Tracer(t, 8)),
		dispatcher.Options{Name: "8", Priority: 1, BPFFS: s.BPFFS, Persistent: s.Filters()})
	qt.Assert(t, qt.IsNil(err), at)
	after := func() []int {
		ran := s.Ran(t)
		qt.Assert(t, qt.IsTrue(len(ran) > 0 && ran[0] == 8), at)
		return append([]int(nil), ran[1:]...)
	}
	if c.only == nil && s.Target.Hook.Family() == "tcx" { // nothing that goes by itself, in its own time
		qt.Check(t, qt.IsTrue(scene.OneOf(after(), c.dead)), at)
	}
	wantWhole(t, s)
	if ran = after(); !scene.OneOf(ran, c.dead) {
		t.Errorf("died at step %d, %q: after the next operation packets see %v, and not one of %v", n, got.Died, ran, c.dead)
	}
	qt.Assert(t, qt.IsNil(next.Detach(t.Context())), at)
	qt.Assert(t, qt.IsNil(next.Close()), at)

	// A link that nobody holds any more may go on by itself until now.
	if err := dispatcher.DetachAll(t.Context(), s.Target, s.Leave()); !errors.Is(err, fs.ErrNotExist) {
		qt.Assert(t, qt.IsNil(err), at)
	}
	s.WantFree(t)
	return got.Died != ""
}

// wantWhole checks what is known about the members against what runs: each is there once, under its own name, with its own
// program, and nothing is left of a move. The kernel frees links in its own time, so another operation may have to find
// that one is gone.
func wantWhole(t *testing.T, s *scene.Scene) {
	t.Helper()
	var wrong []string
	start := time.Now()
	for {
		_ = dispatcher.Detach(t.Context(), s.Target, "nobody", s.Leave())
		if wrong = blemishes(t, s); len(wrong) == 0 {
			return
		}
		if time.Since(start) > scene.Patience {
			t.Errorf("%s: %s", scene.Summary(s.Read(t)), strings.Join(wrong, "; "))
			return
		}
	}
}

func blemishes(t *testing.T, s *scene.Scene) (wrong []string) {
	t.Helper()
	chain := s.Read(t)
	names, links := map[string]bool{}, map[uint32]bool{}
	for _, m := range chain.Members {
		if names[m.Name] {
			wrong = append(wrong, m.Name+" is there twice")
		}
		if m.Kind != hook.KindMember || strings.HasPrefix(m.Program.Name, "ld_") {
			wrong = append(wrong, fmt.Sprintf("%s is %s with program %s", m.Name, m.Kind, m.Program.Name))
		}
		names[m.Name], links[m.LinkID] = true, true
	}
	for _, name := range s.Pins(t) {
		if strings.HasPrefix(name, "move_") || strings.HasPrefix(name, "tmp_") {
			wrong = append(wrong, "the pin "+name+" is left")
		}
	}
	return wrong
}

// A process was killed while it moved a member. When another one replaces the program, its maps are kept, and a Link has the member's
// program, not what stands in for it.
func TestReplaceAfterDeadMove(t *testing.T) {
	for _, h := range []hook.Hook{hook.TCXIngress, hook.CgroupConnect4} {
		t.Run(string(h), func(t *testing.T) {
			s := scene.NewOn(t, h)
			s.Member(t, 4)
			from := dispatcher.Spec(scene.CountingOn(h), dispatcher.LoadOptions{})
			for n := 1; ; n++ {
				link, err := dispatcher.Attach(t.Context(), s.Target, from,
					dispatcher.Options{Name: "3", Priority: 30, Persistent: true, BPFFS: s.BPFFS})
				qt.Assert(t, qt.IsNil(err))
				defer link.Close()
				m, err := link.Info(t.Context())
				qt.Assert(t, qt.IsNil(err))
				s.WantRun(t, 4)
				victim := scene.NewApp(t)
				qt.Assert(t, qt.IsNil(victim.Do(t, s.Command(scene.Command{Op: "open", Member: "3"}))))
				got := victim.Try(t, scene.Command{Op: "set", Settings: scene.Priority(50), DieAt: n})
				qt.Assert(t, qt.IsNil(got.Err()))
				victim.Kill()
				at := qt.Commentf("died at step %d, %q", n, got.Died)

				prog, err := link.Program(t.Context())
				qt.Assert(t, qt.IsNil(err), at)
				qt.Check(t, qt.Equals(uint32(scene.ID(t, prog)), m.Program.ID), at)
				qt.Assert(t, qt.IsNil(prog.Close()))
				reader := s.Open(t, "3")
				info, err := reader.Info(t.Context())
				qt.Assert(t, qt.IsNil(err), at)
				qt.Check(t, qt.Equals(info.Program.ID, m.Program.ID), at)
				qt.Assert(t, qt.IsNil(reader.Close()))

				pin := func() uint64 {
					t.Helper()
					paths, err := filepath.Glob(s.BPFFS + "/libdispatcher/*/member_3/map_ldt_counts")
					qt.Assert(t, qt.IsNil(err))
					qt.Assert(t, qt.HasLen(paths, 1), at)
					return scene.PinnedCount(t, paths[0])
				}
				s.WantRun(t, 4)
				counted := pin()
				qt.Assert(t, qt.IsTrue(counted > 0), at)
				qt.Assert(t, qt.IsNil(link.Update(t.Context(), from)), at)
				s.WantRun(t, 4)
				qt.Check(t, qt.IsTrue(pin() > counted), at)
				qt.Assert(t, qt.IsNil(link.Detach(t.Context())))
				qt.Assert(t, qt.IsNil(link.Close()))
				wantWhole(t, s)
				if got.Died == "" {
					break
				}
			}
			s.Detach(t, "4")
			s.WantFree(t)
		})
	}
}
