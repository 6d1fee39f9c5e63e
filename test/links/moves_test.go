package links

import (
	"fmt"
	"io/fs"
	"path/filepath"
	"testing"

	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// ownLinkHooks are one of each kind of hook where members have links of their own.
var ownLinkHooks = []hook.Hook{hook.TCXIngress, hook.TCXEgress, hook.CgroupConnect4}

// A member goes where it is told, and everything else keeps its order, also what is not ours. 5 and 6 are.
func TestMoveOrder(t *testing.T) {
	for _, h := range ownLinkHooks {
		t.Run(string(h), func(t *testing.T) {
			s := scene.NewOn(t, h)
			links := map[int]*dispatcher.Link{}
			join := func(n, prio int) {
				links[n] = s.Attach(t, s.Tracer(t, n), dispatcher.Options{
					Name: fmt.Sprint(n), Priority: prio, Position: hook.Position{Last: true},
				})
			}
			join(1, 10)
			_, foreign := s.Foreign(t, s.Tracer(t, 5))
			join(2, 20)
			bare := s.Tracer(t, 6)
			s.Linkless(t, bare, map[bool]uint32{true: unix.BPF_F_ALLOW_MULTI}[h.OnCgroup()])
			join(3, 30)
			join(4, 40)
			s.WantRun(t, 1, 5, 2, 6, 3, 4)

			ctx := t.Context()
			for _, step := range []struct {
				what  string
				do    func() error
				prio  int // of the member that moved, then
				moved int
				want  []int
			}{
				{"to the last priority", func() error { return links[1].Set(ctx, scene.Priority(50)) }, 50, 1, []int{5, 2, 6, 3, 4, 1}},
				{"behind its equals", func() error { return links[1].Set(ctx, scene.Priority(30)) }, 30, 1, []int{5, 2, 6, 3, 1, 4}},
				{"no need to", func() error { return links[3].Set(ctx, scene.Priority(20)) }, 20, 3, []int{5, 2, 6, 3, 1, 4}},
				{"before the first member", func() error { return links[3].Set(ctx, scene.Priority(15)) }, 15, 3, []int{5, 3, 2, 6, 1, 4}},
				{"first of all", func() error { return links[4].Move(ctx, hook.Position{First: true}) }, 15, 4, []int{4, 5, 3, 2, 6, 1}},
				{"last of all", func() error { return links[2].Move(ctx, hook.Position{Last: true}) }, 50, 2, []int{4, 5, 3, 6, 1, 2}},
				{"behind a foreign link", func() error { return links[1].Move(ctx, hook.Position{After: hook.LinkRef(foreign)}) }, 15, 1, []int{4, 5, 1, 3, 6, 2}},
				{"before one", func() error { return links[3].Move(ctx, hook.Position{Before: hook.LinkRef(foreign)}) }, 15, 3, []int{4, 3, 5, 1, 6, 2}},
				{"behind a member", func() error { return links[3].Move(ctx, hook.Position{After: "2"}) }, 50, 3, []int{4, 5, 1, 6, 2, 3}},
				{"before a program", func() error {
					return links[3].Move(ctx, hook.Position{Before: hook.ProgramRef(uint32(scene.ID(t, bare)))})
				}, 50, 3, []int{4, 5, 1, 3, 6, 2}},
				{"where it is", func() error { return links[3].Move(ctx, hook.Position{After: "1"}) }, 50, 3, []int{4, 5, 1, 3, 6, 2}},
			} {
				qt.Assert(t, qt.IsNil(step.do()), qt.Commentf("%s", step.what))
				qt.Assert(t, qt.DeepEquals(s.Ran(t), step.want), qt.Commentf("%s", step.what))
				m := s.Read(t).Member(fmt.Sprint(step.moved))
				qt.Check(t, qt.Equals(m.Priority, step.prio), qt.Commentf("%s", step.what))
				qt.Check(t, qt.DeepEquals(scene.Running(s.Read(t)), step.want), qt.Commentf("%s", step.what))
			}
			for _, refused := range []hook.Position{{Before: "3"}, {After: "3"}, {After: "nobody"}, {Before: "link:4294967295"}} {
				qt.Check(t, qt.ErrorIs(links[3].Move(ctx, refused), fs.ErrNotExist), qt.Commentf("%+v", refused))
			}
			s.WantRun(t, 4, 5, 1, 3, 6, 2)
		})
	}
}

// A member that is pinned can be moved by a process that is not its owner. The owner's Links go on with it, its counters
// go on, and so do the pins of its maps.
func TestMoveByAnother(t *testing.T) {
	for _, h := range ownLinkHooks {
		t.Run(string(h), func(t *testing.T) {
			s := scene.NewOn(t, h)
			s.Member(t, 4)
			link, err := dispatcher.Attach(t.Context(), s.Target, dispatcher.Spec(scene.CountingOn(h), dispatcher.LoadOptions{}),
				dispatcher.Options{Name: "3", Priority: 30, Persistent: true, BPFFS: s.BPFFS})
			qt.Assert(t, qt.IsNil(err))
			defer link.Close()
			reader := s.Open(t, "3")
			mapPin := func() string {
				t.Helper()
				var found []string
				for _, path := range s.Read(t).Pins {
					if filepath.Base(path) == "map_ldt_counts" {
						found = append(found, path)
					}
				}
				qt.Assert(t, qt.HasLen(found, 1))
				return found[0]
			}
			s.WantRun(t, 4)
			before := s.Read(t).Member("3")
			counted := scene.PinnedCount(t, mapPin())
			qt.Assert(t, qt.IsTrue(counted > 0))

			for _, prio := range []int{50, 10, 50} {
				other := scene.NewApp(t)
				for _, cmd := range []scene.Command{{Op: "open", Member: "3"}, {Op: "set", Settings: scene.Priority(prio)}} {
					qt.Assert(t, qt.IsNil(other.Do(t, s.Command(cmd))))
				}
				qt.Assert(t, qt.IsNil(other.Stop()))
			}
			s.WantChain(t, "4* 3*")
			s.WantRun(t, 4)
			after := s.Read(t).Member("3")
			qt.Check(t, qt.Not(qt.Equals(after.LinkID, before.LinkID)))
			qt.Check(t, qt.Equals(after.Program.ID, before.Program.ID))
			qt.Check(t, qt.Equals(after.Owner, before.Owner))
			qt.Check(t, qt.IsTrue(scene.PinnedCount(t, mapPin()) > counted))

			// Links that were open still work.
			for _, l := range []*dispatcher.Link{reader, link} {
				m, err := l.Info(t.Context())
				qt.Assert(t, qt.IsNil(err))
				qt.Check(t, qt.DeepEquals(m, after))
				c, err := l.Chain(t.Context())
				qt.Assert(t, qt.IsNil(err))
				qt.Check(t, qt.Equals(scene.Summary(c), "4* 3*"))
			}
			qt.Assert(t, qt.IsNil(link.Set(t.Context(), scene.Priority(20))))
			s.WantChain(t, "3* 4*")
			qt.Assert(t, qt.IsNil(reader.Update(t.Context(), dispatcher.Program(s.Tracer(t, 3)))))
			s.WantRun(t, 3, 4)
			qt.Assert(t, qt.IsNil(reader.Unpin(t.Context())))
			s.WantChain(t, "3 4*")
			qt.Assert(t, qt.IsNil(link.Close()))
			s.WantRun(t, 3, 4) // the reader has it
			qt.Assert(t, qt.IsNil(reader.Close()))
			s.WantRunSoon(t, 4)
			s.Detach(t, "4")
			s.WantFree(t)
		})
	}
}

// One that is not pinned only its owner can move: if another did, it would be that one's, and leave with it.
func TestMoveOfOthers(t *testing.T) {
	for _, h := range ownLinkHooks {
		t.Run(string(h), func(t *testing.T) {
			s := scene.NewOn(t, h)
			s.Member(t, 4)
			owner := s.AttachIn(t, s.Tracer(t, 3), dispatcher.Options{Name: "3", Priority: 30})
			link := s.Open(t, "3")
			for what, err := range map[string]error{
				"set":  link.Set(t.Context(), scene.Priority(50)),
				"move": link.Move(t.Context(), hook.Position{Last: true}),
			} {
				qt.Check(t, qt.ErrorIs(err, dispatcher.ErrBusy))
				qt.Check(t, qt.ErrorMatches(err, what+` .*member "3" is not pinned, and this Link has not attached it; .*pin it first`))
			}
			s.WantRun(t, 3, 4)
			qt.Check(t, qt.IsNil(link.Set(t.Context(), scene.Priority(40)))) // stays where it is

			qt.Assert(t, qt.IsNil(owner.Do(t, scene.Command{Op: "set", Settings: scene.Priority(50)})))
			s.WantRun(t, 4, 3)
			m, err := link.Info(t.Context()) // takes hold of the new one
			qt.Assert(t, qt.IsNil(err))
			qt.Check(t, qt.Equals(m.Priority, 50))
			owner.Kill()
			s.WantRun(t, 4, 3)
			qt.Assert(t, qt.IsNil(scene.Second(link.Pin(t.Context()))))
			qt.Assert(t, qt.IsNil(link.Set(t.Context(), scene.Priority(10))))
			s.WantRun(t, 3, 4)
			qt.Assert(t, qt.IsNil(link.Set(t.Context(), scene.Priority(50)))) // it is its own now
			s.WantRun(t, 4, 3)
			qt.Assert(t, qt.IsNil(link.Detach(t.Context())))
			s.Detach(t, "4")
			s.WantFree(t)
		})
	}
}

// What is loaded from a file for tc moves as well: it is loaded as it was written.
func TestMoveFromFile(t *testing.T) {
	s := scene.NewOn(t, hook.TCXIngress)
	s.Member(t, 4)
	link, err := dispatcher.Attach(t.Context(), s.Target, dispatcher.File("../testdata/several.o", dispatcher.LoadOptions{Program: "ldt_tc"}),
		dispatcher.Options{Name: "tc", Priority: 60, BPFFS: s.BPFFS})
	qt.Assert(t, qt.IsNil(err))
	defer link.Close()
	s.WantRun(t, 4)
	qt.Assert(t, qt.IsNil(link.Set(t.Context(), scene.Priority(30))))
	s.WantRun(t) // it ends the run
	s.WantChain(t, "tc 4*")
	qt.Assert(t, qt.IsNil(link.Set(t.Context(), scene.Priority(60))))
	s.WantRun(t, 4)
}

// Where there is no bpffs there is no lock and no name, and a link moves all the same, for the process that has it.
func TestMoveWithoutBPFFS(t *testing.T) {
	for _, h := range ownLinkHooks {
		t.Run(string(h), func(t *testing.T) {
			s := scene.NewOn(t, h)
			s = s.WithoutBPFFS(t)
			first := s.Attach(t, s.Tracer(t, 1), dispatcher.Options{Name: "1", Priority: 10})
			s.Attach(t, s.Tracer(t, 2), dispatcher.Options{Name: "2", Priority: 20})
			s.WantRun(t, 1, 2)
			qt.Assert(t, qt.IsNil(first.Move(t.Context(), hook.Position{Last: true})))
			s.WantRun(t, 2, 1)
			qt.Assert(t, qt.IsNil(first.Move(t.Context(), hook.Position{First: true})))
			s.WantRun(t, 1, 2)
		})
	}
}
