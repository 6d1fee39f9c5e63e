package flood

import (
	"errors"
	"fmt"
	"io/fs"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// floodCrash is a change of a member that the victim dies of while packets come in. The member is a recorder, which the
// witness before it is the measure of: it drops what comes to one port and lets go on what comes to the other.
type floodCrash struct {
	name   string
	hook   hook.Hook
	before func(*testing.T, *scene.Scene, *recorder)
	first  []scene.Command
	fatal  scene.Command
}

// A process is killed while it changes the place of a persistent member: not one packet passes a member that drops, and none is
// counted twice or not at all, neither while the operation is at it nor until the next one has cleaned up, nor after that.
func TestLinkCrashUnderFlood(t *testing.T) {
	member := func(t *testing.T, s *scene.Scene, r *recorder) {
		link := s.Attach(t, r.Program, dispatcher.Options{Name: "moved", Priority: 50, Persistent: true})
		qt.Assert(t, qt.IsNil(link.Close()))
	}
	open := []scene.Command{{Op: "open", Member: "moved"}}
	adopt := scene.Command{Op: "adopt", Member: "moved", Persistent: true}
	for _, c := range []floodCrash{
		{"up", hook.TCXIngress, member, open, scene.Command{Op: "set", Settings: scene.Priority(20)}},
		{"down", hook.TCXIngress, member, open, scene.Command{Op: "set", Settings: scene.Priority(90)}},
		{"adopt", hook.TCXIngress, func(t *testing.T, s *scene.Scene, r *recorder) { s.Linkless(t, r.Program, 0) }, nil, adopt},
		{"adopt", hook.TCIngress, func(t *testing.T, s *scene.Scene, r *recorder) {
			s.Filter(t, r.Program, "pref 10 handle 1 bpf direct-action")
		}, nil, adopt},
	} {
		t.Run(fmt.Sprintf("%s on %s", c.name, c.hook), func(t *testing.T) {
			testenv.Need(t, testenv.FeatureTCX) // on which the others are
			s := scene.NewOn(t, c.hook)
			for n := 1; c.dies(t, s, n); n++ {
			}
		})
	}
}

func (c floodCrash) dies(t *testing.T, s *scene.Scene, n int) bool {
	t.Helper()
	onTCX := s.SameOn(hook.TCXIngress)
	witness, moved := newRecorder(t, "ldt_witness", testenv.TCNext, 0), newRecorder(t, "ldt_moved", testenv.TCDrop, 0)
	others := []*dispatcher.Link{onTCX.Attach(t, witness.Program, dispatcher.Options{Priority: 1})}
	for _, prio := range []int{30, 70} {
		pass := testenv.VerdictProgram(t, "ldt_pass", testenv.TCNext, s.On())
		others = append(others, onTCX.Attach(t, pass, dispatcher.Options{Name: fmt.Sprint(prio), Priority: prio}))
	}
	c.before(t, s, moved)
	victim := scene.NewApp(t)
	defer victim.Kill()
	for _, cmd := range c.first {
		qt.Assert(t, qt.IsNil(victim.Do(t, s.Command(cmd))))
	}

	floods := []*testenv.Flood{s.Flood(t, scene.Port, scene.MarkerPort), s.Flood(t, scene.Port+1)}
	scene.Flow(t, floods...)
	fatal := s.Command(c.fatal)
	fatal.DieAt = n
	got := victim.Try(t, fatal)
	qt.Assert(t, qt.IsNil(got.Err()))
	victim.Kill()
	scene.Flow(t, floods...)
	for range 2 { // the next ones
		err := dispatcher.Detach(t.Context(), onTCX.Target, "nobody", s.Leave())
		qt.Assert(t, qt.ErrorIs(err, fs.ErrNotExist))
		scene.Flow(t, floods...)
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
	clearAll(t, onTCX)
	if s.Filters() {
		clearAll(t, s)
	}
	onTCX.WantFree(t)
	return got.Died != ""
}

// clearAll takes everything off the hook, whosever it is.
func clearAll(t *testing.T, s *scene.Scene) {
	t.Helper()
	for _, m := range s.Read(t).Members {
		ref := hook.ProgramRef(m.Program.ID)
		if m.LinkID != 0 {
			ref = hook.LinkRef(m.LinkID)
		}
		err := dispatcher.Detach(t.Context(), s.Target, ref, dispatcher.DetachOptions{BPFFS: s.BPFFS, Force: true})
		qt.Assert(t, qt.IsTrue(err == nil || errors.Is(err, fs.ErrNotExist)), qt.Commentf("%v", err))
	}
}
