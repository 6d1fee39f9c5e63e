package dispatcher_test

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
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// linkCrash is a [crash] on a hook without a dispatcher.
type linkCrash struct {
	name   string
	only   []string // families of hooks, where not on all
	before func(*testing.T, *linkScene)
	first  []command
	fatal  command

	// from, to, dead: as of crash. between: what may run besides while the operation is at it, and also once the victim is
	// dead, until the next operation.
	from, to      []int
	dead, between [][]int
}

// A process may be killed at any moment, here too.
func TestLinkCrash(t *testing.T) {
	attach := func(c command) command {
		c.Op = "attach"
		return c
	}
	set := func(to int) command { return command{Op: "set", Settings: priority(to)} }
	open := []command{{Op: "open", Member: "3"}}
	for _, c := range []linkCrash{
		{
			name:  "attach",
			only:  []string{"tcx", "cgroup"},
			fatal: attach(command{Program: 2}),
			to:    []int{2},
			dead:  [][]int{nil},
		}, {
			name:   "attach between others",
			only:   []string{"tcx", "cgroup"},
			before: members(1, 9),
			fatal:  attach(command{Program: 2, Settings: priority(20)}),
			from:   []int{1, 9}, to: []int{1, 2, 9},
			dead: [][]int{{1, 9}},
		}, {
			name:   "attach for good",
			before: members(1, 3),
			fatal:  attach(command{Program: 2, Settings: priority(20), Persistent: true}),
			from:   []int{1, 3}, to: []int{1, 2, 3},
			dead: [][]int{{1, 3}, {1, 2, 3}},
		}, {
			name:   "attach for good with maps",
			before: members(1, 3),
			fatal:  attach(command{Maps: true, Settings: priority(20), Persistent: true}),
			from:   []int{1, 3}, to: []int{1, 3},
			dead: [][]int{{1, 3}},
		}, {
			name:   "leave",
			only:   []string{"tcx", "cgroup"},
			before: members(1, 9),
			first:  []command{attach(command{Program: 2, Settings: priority(20)})},
			fatal:  command{Op: "leave"},
			from:   []int{1, 2, 9}, to: []int{1, 9},
			dead: [][]int{{1, 9}},
		}, {
			name:   "detach one of several",
			before: members(1, 2, 3),
			fatal:  command{Op: "detach", Member: "2"},
			from:   []int{1, 2, 3}, to: []int{1, 3},
			dead: [][]int{{1, 2, 3}, {1, 3}},
		}, {
			name:   "detach the last",
			before: members(2),
			fatal:  command{Op: "detach", Member: "2"},
			from:   []int{2},
			dead:   [][]int{{2}, nil},
		}, {
			name:   "detach all",
			before: members(1, 2, 3),
			fatal:  command{Op: "clear"},
			from:   []int{1, 2, 3},
			dead:   [][]int{{1, 2, 3}, {2, 3}, {3}, nil}, // one after the other
		}, {
			name:   "replace",
			before: members(1, 3),
			first:  open,
			fatal:  command{Op: "update", Program: 2},
			from:   []int{1, 3}, to: []int{1, 2},
			dead: [][]int{{1, 3}, {1, 2}},
		}, {
			name:   "replace one with maps",
			before: members(1, 3),
			first:  []command{attach(command{Maps: true, Persistent: true})},
			fatal:  command{Op: "update", Maps: true},
			from:   []int{1, 3}, to: []int{1, 3},
			dead: [][]int{{1, 3}},
		}, {
			name:   "set without a move",
			before: members(1, 3, 5),
			first:  open,
			fatal:  set(35),
			from:   []int{1, 3, 5}, to: []int{1, 3, 5},
			dead: [][]int{{1, 3, 5}},
		}, {
			name:   "move up",
			before: members(1, 2, 3, 4),
			first:  open,
			fatal:  set(5),
			from:   []int{1, 2, 3, 4}, to: []int{3, 1, 2, 4},
			dead: [][]int{{1, 2, 3, 4}, {3, 1, 2, 4}},
		}, {
			name:   "move down",
			before: members(1, 3, 4, 5),
			first:  open,
			fatal:  set(60),
			from:   []int{1, 3, 4, 5}, to: []int{1, 4, 5, 3},
			dead: [][]int{{1, 3, 4, 5}, {1, 4, 5, 3}},
		}, {
			name:   "move up one's own",
			only:   []string{"tcx", "cgroup"},
			before: members(1, 2, 4),
			first:  []command{attach(command{Program: 3, Settings: priority(30)})},
			fatal:  set(5),
			from:   []int{1, 2, 3, 4}, to: []int{3, 1, 2, 4},
			dead: [][]int{{1, 2, 4}},
		}, {
			name: "move down one's own that another holds too",
			only: []string{"tcx", "cgroup"},
			before: func(t *testing.T, s *linkScene) {
				members(1, 4, 5)(t, s)
			},
			first: []command{attach(command{Program: 3, Settings: priority(30)})},
			fatal: set(60),
			from:  []int{1, 3, 4, 5}, to: []int{1, 4, 5, 3},
			dead: [][]int{{1, 4, 5}},
		}, {
			name:   "pin",
			only:   []string{"tcx", "cgroup"},
			before: members(1, 3),
			first:  []command{attach(command{Program: 2, Settings: priority(20)})},
			fatal:  command{Op: "pin"},
			from:   []int{1, 2, 3}, to: []int{1, 2, 3},
			dead: [][]int{{1, 3}, {1, 2, 3}},
		}, {
			name:   "unpin",
			only:   []string{"tcx", "cgroup"},
			before: members(1, 3),
			first:  open,
			fatal:  command{Op: "unpin"},
			from:   []int{1, 3}, to: []int{1, 3},
			dead: [][]int{{1}, {1, 3}},
		},
	} {
		for _, h := range []hook.Hook{hook.TCXIngress, hook.TCIngress, hook.CgroupConnect4} {
			if c.only != nil && !slices.Contains(c.only, h.Family()) {
				continue
			}
			t.Run(fmt.Sprintf("%s on %s", c.name, h), func(t *testing.T) {
				s := newLinkScene(t, h)
				c.both(s)
				for n := 1; c.dies(t, s, n); n++ {
				}
			})
		}
	}
}

// both adds to what may run what the documentation says of cgroups and clsact: a program that moves is at both places for
// a moment.
func (c *linkCrash) both(s *linkScene) {
	if s.hook.Family() == "tcx" || len(c.from) != len(c.to) || slices.Equal(c.from, c.to) || c.fatal.Op != "set" {
		return
	}
	if c.from[1] == 3 {
		c.between = append(c.between, append(slices.Clone(c.from), 3))
	} else {
		c.between = append(c.between, append([]int{3}, c.from...))
	}
}

// members begins a crash with persistent members.
func members(numbers ...int) func(*testing.T, *linkScene) {
	return func(t *testing.T, s *linkScene) {
		for _, n := range numbers {
			s.member(t, n)
		}
	}
}

// dies lets the victim die at the n-th step of its operation, and returns false when it has fewer.
func (c linkCrash) dies(t *testing.T, s *linkScene, n int) bool {
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

	// Packets, and Read, which shows no member twice unless packets meet it twice.
	possible := append(slices.Clone(c.dead), c.from, c.to)
	ran := s.ran(t)
	qt.Assert(t, qt.IsTrue(oneOf(ran, append(slices.Clone(possible), c.between...))), at)
	soon(t, func() bool { return oneOf(s.ran(t), append(slices.Clone(c.dead), c.between...)) })
	read := running(s.read(t))
	if ran := s.ran(t); !slices.Equal(read, ran) && !oneOf(read, c.dead) {
		t.Errorf("died at step %d, %q: packets see %v, and Read shows %v", n, got.Died, ran, read)
	}

	// The next one.
	next, err := dispatcher.Attach(t.Context(), s.target, dispatcher.Program(s.tracer(t, 8)),
		dispatcher.Options{Name: "8", Settings: priority(1), BPFFS: s.bpffs, Persistent: s.filters()})
	qt.Assert(t, qt.IsNil(err), at)
	after := func() []int {
		ran := s.ran(t)
		qt.Assert(t, qt.IsTrue(len(ran) > 0 && ran[0] == 8), at)
		return append([]int(nil), ran[1:]...)
	}
	if c.only == nil && s.hook.Family() == "tcx" { // nothing that goes by itself, in its own time
		qt.Check(t, qt.IsTrue(oneOf(after(), c.dead)), at)
	}
	s.wantWhole(t)
	if ran = after(); !oneOf(ran, c.dead) {
		t.Errorf("died at step %d, %q: after the next operation packets see %v, and not one of %v", n, got.Died, ran, c.dead)
	}
	qt.Assert(t, qt.IsNil(next.Detach(t.Context())), at)
	qt.Assert(t, qt.IsNil(next.Close()), at)

	if err := dispatcher.DetachAll(t.Context(), s.target, s.leave()); err != nil && len(ran) > 0 {
		qt.Assert(t, qt.IsNil(err))
	}
	s.wantNothingLeft(t)
	return got.Died != ""
}

// wantWhole checks what is known about the members against what runs: each is there once, under its own name, with its own
// program, and nothing is left of a move. The kernel frees links in its own time, so another operation may have to find
// that one is gone.
func (s *linkScene) wantWhole(t *testing.T) {
	t.Helper()
	var wrong []string
	start := time.Now()
	for {
		_ = dispatcher.Detach(t.Context(), s.target, "nobody", s.leave())
		if wrong = s.blemishes(t); len(wrong) == 0 {
			return
		}
		if time.Since(start) > kernelPatience {
			t.Errorf("%s: %s", summary(s.read(t)), strings.Join(wrong, "; "))
			return
		}
	}
}

func (s *linkScene) blemishes(t *testing.T) (wrong []string) {
	t.Helper()
	chain := s.read(t)
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
	for _, name := range s.pins(t) {
		if strings.HasPrefix(name, "move_") || strings.HasPrefix(name, "tmp_") {
			wrong = append(wrong, "the pin "+name+" is left")
		}
	}
	for link := range s.registry(t) {
		if !links[link] {
			wrong = append(wrong, fmt.Sprintf("the registry has a record of link %d", link))
		}
	}
	return wrong
}

// tracers completes a command in which a tracer's number stands for the program.
func (s *linkScene) tracers(t *testing.T, c command) command {
	t.Helper()
	if n := c.Program; n != 0 {
		if c.Member == "" {
			c.Member = fmt.Sprint(n)
		}
		c.Program = idOf(t, s.tracer(t, int(n)))
	}
	if s.filters() && c.Op == "attach" {
		c.Persistent = true
	}
	return s.command(c)
}

// floodCrash is a change of a member that the victim dies of while packets come in. The member is a recorder, which the
// witness before it is the measure of: it drops what comes to one port and lets go on what comes to the other.
type floodCrash struct {
	name   string
	hook   hook.Hook
	before func(*testing.T, *linkScene, *recorder)
	first  []command
	fatal  command
}

// A persistent member whose place somebody changes who dies of it: not one packet passes a member that drops, and none is
// counted twice or not at all, neither while the operation is at it nor until the next one has cleaned up, nor after that.
func TestLinkCrashUnderFlood(t *testing.T) {
	member := func(t *testing.T, s *linkScene, r *recorder) {
		link := s.attach(t, r.Program, dispatcher.Options{Name: "moved", Settings: priority(50), Persistent: true})
		qt.Assert(t, qt.IsNil(link.Close()))
	}
	open := []command{{Op: "open", Member: "moved"}}
	adopt := command{Op: "adopt", Member: "moved", Persistent: true}
	for _, c := range []floodCrash{
		{"up", hook.TCXIngress, member, open, command{Op: "set", Settings: priority(20)}},
		{"down", hook.TCXIngress, member, open, command{Op: "set", Settings: priority(90)}},
		{"adopt", hook.TCXIngress, func(t *testing.T, s *linkScene, r *recorder) { s.linkless(t, r.Program, 0) }, nil, adopt},
		{"adopt", hook.TCIngress, func(t *testing.T, s *linkScene, r *recorder) {
			s.filter(t, r.Program, "pref 10 handle 1 bpf direct-action")
		}, nil, adopt},
	} {
		t.Run(fmt.Sprintf("%s on %s", c.name, c.hook), func(t *testing.T) {
			testenv.Need(t, testenv.FeatureTCX) // on which the others are
			s := newBusyLinkScene(t, c.hook)
			for n := 1; c.dies(t, s, n); n++ {
			}
		})
	}
}

func (c floodCrash) dies(t *testing.T, s *linkScene, n int) bool {
	t.Helper()
	onTCX := s.sameOn(hook.TCXIngress)
	witness, moved := newRecorder(t, "ldt_witness", testenv.TCNext, 0), newRecorder(t, "ldt_moved", testenv.TCDrop, 0)
	others := []*dispatcher.Link{onTCX.attach(t, witness.Program, dispatcher.Options{Settings: priority(1)})}
	for _, prio := range []int{30, 70} {
		pass := testenv.VerdictProgram(t, "ldt_pass", testenv.TCNext, s.on())
		others = append(others, onTCX.attach(t, pass, dispatcher.Options{Name: fmt.Sprint(prio), Settings: priority(prio)}))
	}
	c.before(t, s, moved)
	victim := newApp(t)
	defer victim.Kill()
	for _, cmd := range c.first {
		qt.Assert(t, qt.IsNil(victim.do(t, s.command(cmd))))
	}

	floods := []*testenv.Flood{s.Flood(t, port, markerPort), s.Flood(t, port+1)}
	flow(t, floods...)
	fatal := s.command(c.fatal)
	fatal.DieAt = n
	got := victim.try(t, fatal)
	qt.Assert(t, qt.IsNil(got.err()))
	victim.Kill()
	flow(t, floods...)
	for range 2 { // the next ones
		err := dispatcher.Detach(t.Context(), onTCX.target, "nobody", s.leave())
		qt.Assert(t, qt.ErrorIs(err, fs.ErrNotExist))
		flow(t, floods...)
	}
	_, received := floods[0].Stop()
	floods[1].Stop()
	_, marker := floods[0].Marker()
	qt.Check(t, qt.IsTrue(marker > 0))
	if missed, doubled := moved.compare(t, witness, 500); missed+doubled > 0 || received > 0 {
		t.Errorf("died at step %d, %q: of the datagrams %d were missed, %d met twice, and %d got through", n, got.Died, missed, doubled, received)
	}
	for _, l := range others {
		qt.Assert(t, qt.IsNil(l.Detach(t.Context())))
		qt.Assert(t, qt.IsNil(l.Close()))
	}
	onTCX.clearAll(t)
	if s.filters() {
		s.clearAll(t)
	}
	onTCX.wantNothingLeft(t)
	return got.Died != ""
}

// clearAll takes everything off the hook, whosever it is.
func (s *linkScene) clearAll(t *testing.T) {
	t.Helper()
	for _, m := range s.read(t).Members {
		ref := hook.ProgramRef(m.Program.ID)
		if m.LinkID != 0 {
			ref = hook.LinkRef(m.LinkID)
		}
		err := dispatcher.Detach(t.Context(), s.target, string(ref), dispatcher.DetachOptions{BPFFS: s.bpffs, Force: true})
		qt.Assert(t, qt.IsTrue(err == nil || errors.Is(err, fs.ErrNotExist)), qt.Commentf("%v", err))
	}
}

// Whoever replaces the program of a member whose move somebody died at goes on with its maps, and a Link to it has its
// program, not what stands in for it.
func TestReplaceAfterDeadMove(t *testing.T) {
	for _, h := range []hook.Hook{hook.TCXIngress, hook.CgroupConnect4} {
		t.Run(string(h), func(t *testing.T) {
			s := newLinkScene(t, h)
			s.member(t, 4)
			from := dispatcher.Spec(countingOn(h), dispatcher.LoadOptions{})
			for n := 1; ; n++ {
				link, err := dispatcher.Attach(t.Context(), s.target, from,
					dispatcher.Options{Name: "3", Settings: priority(30), Persistent: true, BPFFS: s.bpffs})
				qt.Assert(t, qt.IsNil(err))
				defer link.Close()
				m, err := link.Info(t.Context())
				qt.Assert(t, qt.IsNil(err))
				s.wantRun(t, 4)
				victim := newApp(t)
				qt.Assert(t, qt.IsNil(victim.do(t, s.command(command{Op: "open", Member: "3"}))))
				got := victim.try(t, command{Op: "set", Settings: priority(50), DieAt: n})
				qt.Assert(t, qt.IsNil(got.err()))
				victim.Kill()
				at := qt.Commentf("died at step %d, %q", n, got.Died)

				prog, err := link.Program()
				qt.Assert(t, qt.IsNil(err), at)
				qt.Check(t, qt.Equals(uint32(idOf(t, prog)), m.Program.ID), at)
				qt.Assert(t, qt.IsNil(prog.Close()))
				reader := s.open(t, "3")
				info, err := reader.Info(t.Context())
				qt.Assert(t, qt.IsNil(err), at)
				qt.Check(t, qt.Equals(info.Program.ID, m.Program.ID), at)
				qt.Assert(t, qt.IsNil(reader.Close()))

				pin := func() uint64 {
					t.Helper()
					paths, err := filepath.Glob(s.bpffs + "/libdispatcher/*/member_3/map_ldt_counts")
					qt.Assert(t, qt.IsNil(err))
					qt.Assert(t, qt.HasLen(paths, 1), at)
					return pinnedCount(t, paths[0])
				}
				s.wantRun(t, 4)
				counted := pin()
				qt.Assert(t, qt.IsTrue(counted > 0), at)
				qt.Assert(t, qt.IsNil(link.Update(t.Context(), from)), at)
				s.wantRun(t, 4)
				qt.Check(t, qt.IsTrue(pin() > counted), at)
				qt.Assert(t, qt.IsNil(link.Detach(t.Context())))
				qt.Assert(t, qt.IsNil(link.Close()))
				s.wantWhole(t)
				if got.Died == "" {
					break
				}
			}
			s.detach(t, "4")
			s.wantNothingLeft(t)
		})
	}
}
