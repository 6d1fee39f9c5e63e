package observe

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// A watching is a Watch that runs beside the test.
type watching struct {
	events  chan hook.Event
	sources hook.WatchSources
}

// watch begins to watch, what concerns the devices and cgroups of the test only.
func watch(t testing.TB, s *scene.Scene, o dispatcher.WatchOptions) *watching {
	t.Helper()
	o.BPFFS = s.BPFFS
	w := &watching{events: make(chan hook.Event, 1000)}
	started, ended := make(chan struct{}), make(chan struct{})
	o.Started = func(sources hook.WatchSources) {
		w.sources = sources
		close(started)
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		defer close(ended)
		for e, err := range dispatcher.Watch(ctx, o) {
			if err != nil {
				t.Error(err)
				break
			}
			if o.NetNS != "" || ofTest(&e.EventTarget) || e.From != nil && ofTest(e.From) {
				w.events <- e
			}
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	<-started
	return w
}

// ofTest tells whether a place is one that this process made.
func ofTest(p *hook.EventTarget) bool {
	ours := fmt.Sprintf("ldt-%d-", os.Getpid())
	return strings.Contains(p.NetNS.Name, ours) || strings.Contains(p.Target, ours)
}

// next waits for the next event.
func (w *watching) next(t testing.TB) hook.Event {
	t.Helper()
	select {
	case e := <-w.events:
		return e
	case <-time.After(10 * time.Second):
		t.Fatal("no event")
		panic("unreachable")
	}
}

// want waits for events, in that order: see words.
func (w *watching) want(t testing.TB, want ...string) (got []hook.Event) {
	t.Helper()
	for _, text := range want {
		e := w.next(t)
		qt.Assert(t, qt.Equals(words(&e), text), qt.Commentf("%+v", e))
		got = append(got, e)
	}
	return got
}

// wantAll waits for events of several hooks, in any order: a look may come while
// the device is on its way. They are returned as they were asked for.
func (w *watching) wantAll(t testing.TB, want ...string) []hook.Event {
	t.Helper()
	got := make([]hook.Event, len(want))
	for left := slices.Clone(want); len(left) > 0; {
		e := w.next(t)
		i := slices.Index(left, words(&e))
		if i < 0 {
			t.Fatalf("unexpected: %s, not one of %q\n%+v", words(&e), left, e)
		}
		got[slices.Index(want, left[i])] = e
		left = slices.Delete(left, i, i+1)
	}
	return got
}

// wantNone waits a while, in which nothing may come.
func (w *watching) wantNone(t testing.TB) {
	t.Helper()
	select {
	case e := <-w.events:
		t.Fatalf("unexpected: %s\n%+v", words(&e), e)
	case <-time.After(300 * time.Millisecond):
	}
}

// words is an event as "updated count 2>2/3": the place before, after, and how many
// there are. Others than members have their kind behind the name.
func words(e *hook.Event) string {
	if e.Entry == "" {
		return strings.TrimSpace(fmt.Sprintf("%s %s %s", e.Kind, e.Hook, e.Target))
	}
	name := e.Name
	if e.Entry != hook.KindMember {
		name += "(" + string(e.Entry) + ")"
	}
	place := fmt.Sprintf("%d>%d/%d", e.PositionBefore, e.PositionAfter, e.Entries)
	return fmt.Sprintf("%s %s %s", e.Kind, name, place)
}

// by checks which process did it.
func by(t testing.TB, e hook.Event, pid int, call string) {
	t.Helper()
	qt.Assert(t, qt.IsNotNil(e.Who), qt.Commentf("%+v", e))
	qt.Check(t, qt.Equals(e.Who.PID, pid))
	qt.Check(t, qt.Equals(e.Who.Call, call))
	qt.Check(t, qt.Not(qt.Equals(e.Who.Comm, "")))
}

func watchHere(s *scene.Scene) dispatcher.WatchOptions {
	return dispatcher.WatchOptions{NetNS: s.Server.Name}
}

// What members of a chain do is told, and by whom.
func TestWatchChain(t *testing.T) {
	s := scene.New(t)
	w := watch(t, s, watchHere(s))
	t.Logf("relies on %+v", w.sources)

	a := s.AttachIn(t, s.Tracer(t, 1, testenv.XDPPass), dispatcher.Options{Name: "a"})
	by(t, w.want(t, "attached a 0>1/1")[0], a.Pid, "BPF_LINK_CREATE")
	b := s.AttachIn(t, s.Tracer(t, 2, testenv.XDPPass), dispatcher.Options{Name: "b", Priority: 60})
	by(t, w.want(t, "attached b 0>2/2")[0], b.Pid, "BPF_LINK_UPDATE")

	qt.Assert(t, qt.IsNil(b.Do(t, s.Command(scene.Command{Op: "update", Program: scene.ID(t, s.Tracer(t, 3, testenv.XDPPass))}))))
	e := w.want(t, "updated b 2>2/2")[0]
	by(t, e, b.Pid, "BPF_MAP_UPDATE_ELEM")
	qt.Check(t, qt.Equals(e.Before.Program.Name, "ldt_trace_2"))
	qt.Check(t, qt.Equals(e.After.Program.Name, "ldt_trace_3"))

	qt.Assert(t, qt.IsNil(b.Do(t, s.Command(scene.Command{Op: "set", Settings: scene.Priority(70)}))))
	by(t, w.want(t, "set b 2>2/2")[0], b.Pid, "BPF_LINK_UPDATE")
	qt.Assert(t, qt.IsNil(b.Do(t, s.Command(scene.Command{Op: "set", Settings: scene.Priority(5)}))))
	e = w.want(t, "reordered b 2>1/2")[0]
	by(t, e, b.Pid, "BPF_LINK_UPDATE")
	qt.Check(t, qt.Equals(e.Before.Priority, 70))
	qt.Check(t, qt.Equals(e.After.Priority, 5))

	qt.Assert(t, qt.IsNil(a.Do(t, s.Command(scene.Command{Op: "pin"}))))
	w.want(t, "pinned a 2>2/2")
	qt.Assert(t, qt.IsNil(a.Do(t, s.Command(scene.Command{Op: "unpin"}))))
	w.want(t, "unpinned a 2>2/2")

	b.Kill()
	by(t, w.want(t, "emptied b 1>1/2")[0], b.Pid, "exit")
	s.Detach(t, "b")
	w.want(t, "left b 1>0/1")
	a.Kill()
	by(t, w.want(t, "left a 1>0/0")[0], a.Pid, "exit")
	w.wantNone(t)
}

// Members with links of their own, and what else is there.
func TestWatchLinks(t *testing.T) {
	s := scene.New(t)
	cg := testenv.NewCgroup(t)
	for h, target := range map[hook.Hook]dispatcher.Target{
		hook.TCXIngress:       dispatcher.On(hook.TCXIngress, s.ServerDev).In(s.Server.Name),
		hook.CgroupSKBIngress: dispatcher.On(hook.CgroupSKBIngress, cg.Path),
	} {
		t.Run(strings.ReplaceAll(string(h), "/", "_"), func(t *testing.T) {
			scene.NeedPlaces(t, h)
			s := s.OnDevice(target)
			o := dispatcher.WatchOptions{}
			o.Hooks = []hook.Hook{h}
			w := watch(t, s, o)
			prog := func(name string) *ebpf.Program { return testenv.VerdictProgram(t, name, s.GoOn(), s.On()) }

			a := s.AttachIn(t, prog("ldt_a"), dispatcher.Options{Name: "a"})
			by(t, w.want(t, "attached a 0>1/1")[0], a.Pid, "BPF_LINK_CREATE")
			b := s.AttachIn(t, prog("ldt_b"), dispatcher.Options{Name: "b", Priority: 60})
			by(t, w.want(t, "attached b 0>2/2")[0], b.Pid, "BPF_LINK_CREATE")
			qt.Assert(t, qt.IsNil(b.Do(t, s.Command(scene.Command{Op: "set", Settings: scene.Priority(5)}))))
			e := w.want(t, "reordered b 2>1/2")[0]
			by(t, e, b.Pid, "BPF_LINK_CREATE")
			qt.Check(t, qt.Not(qt.Equals(e.Before.LinkID, e.After.LinkID)))
			qt.Assert(t, qt.IsNil(b.Do(t, s.Command(scene.Command{Op: "update", Program: scene.ID(t, prog("ldt_c"))}))))
			by(t, w.want(t, "updated b 1>1/2")[0], b.Pid, "BPF_LINK_UPDATE")
			qt.Assert(t, qt.IsNil(os.Remove(s.Pinned(t, prog("ldt_d"))))) // another pin at the same time
			qt.Assert(t, qt.IsNil(a.Do(t, s.Command(scene.Command{Op: "pin"}))))
			by(t, w.want(t, "pinned a 2>2/2")[0], a.Pid, "BPF_OBJ_PIN")
			qt.Assert(t, qt.IsNil(a.Do(t, s.Command(scene.Command{Op: "unpin"}))))
			w.want(t, "unpinned a 2>2/2")

			// Of others: a link before ours, and a program without one.
			foreign, _ := s.Foreign(t, prog("ldt_foreign"), kernel.Before(0, false))
			es := w.want(t, "attached ldt_foreign(foreign) 0>1/3", "overtaken b 1>2/3")
			by(t, es[0], os.Getpid(), "BPF_LINK_CREATE")
			qt.Check(t, qt.Equals(es[1].By.Name, "ldt_foreign"))
			by(t, es[1], os.Getpid(), "BPF_LINK_CREATE")
			foreign.Close()
			w.want(t, "left ldt_foreign(foreign) 1>0/2")

			bare := prog("ldt_bare")
			s.Linkless(t, bare, map[bool]uint32{true: unix.BPF_F_ALLOW_MULTI}[h.OnCgroup()])
			by(t, w.want(t, "attached ldt_bare(legacy) 0>3/3")[0], os.Getpid(), "BPF_PROG_ATTACH")
			qt.Assert(t, qt.IsNil(s.Unlink(t, bare)))
			by(t, w.want(t, "left ldt_bare(legacy) 3>0/2")[0], os.Getpid(), "BPF_PROG_DETACH")

			b.Kill()
			by(t, w.want(t, "left b 1>0/1")[0], b.Pid, "exit")
			s.Detach(t, "a")
			by(t, w.want(t, "left a 1>0/0")[0], os.Getpid(), "BPF_LINK_DETACH")
			w.wantNone(t)
		})
	}
}

// What comes through netlink: programs without a link, filters, adoption.
func TestWatchLegacy(t *testing.T) {
	s := scene.New(t)
	w := watch(t, s, watchHere(s))
	one := testenv.VerdictProgram(t, "ldt_one", testenv.XDPPass)
	s.AttachLegacy(t, one)
	e := w.want(t, "attached ldt_one(legacy) 0>1/1")[0]
	qt.Check(t, qt.IsNil(e.Who))
	two := testenv.VerdictProgram(t, "ldt_two", testenv.XDPPass)
	s.Server.Do(t, func() {
		c, err := rtnl.Dial()
		qt.Assert(t, qt.IsNil(err))
		defer c.Close()
		qt.Assert(t, qt.IsNil(c.ReplaceXDP(s.ServerIfindex, two.FD(), one.FD(), hook.ModeNative)))
	})
	w.want(t, "updated ldt_two(legacy) 1>1/1")
	l, err := dispatcher.Adopt(t.Context(), s.Target, dispatcher.AdoptOptions{BPFFS: s.BPFFS, Name: "two"})
	qt.Assert(t, qt.IsNil(err))
	e = w.next(t)
	if e.Kind == hook.EventLeft { // the gap was long enough to be seen
		qt.Check(t, qt.Equals(words(&e), "left ldt_two(legacy) 1>0/0"))
		e = w.want(t, "attached two 0>1/1")[0]
	} else {
		qt.Check(t, qt.Equals(words(&e), "adopted two 1>1/1"))
	}
	by(t, e, os.Getpid(), "BPF_LINK_CREATE")
	qt.Assert(t, qt.IsNil(l.Close()))
	w.want(t, "left two 1>0/0")

	s.Server.TC(t, "qdisc", "add", "dev", s.ServerDev, "clsact")
	pinned := s.BPFFS + "/filter"
	qt.Assert(t, qt.IsNil(testenv.VerdictProgram(t, "ldt_filter", testenv.TCNext, testenv.On(hook.TCIngress)).Pin(pinned)))
	s.Server.TC(t, "filter", "add", "dev", s.ServerDev, "ingress", "pref", "7", "bpf", "da", "object-pinned", pinned)
	e = w.next(t)
	qt.Check(t, qt.Equals(e.Kind, hook.EventAttached))
	qt.Check(t, qt.Equals(e.Hook, hook.TCIngress))
	s.Server.TC(t, "qdisc", "del", "dev", s.ServerDev, "clsact")
	e = w.next(t)
	qt.Check(t, qt.Equals(e.Kind, hook.EventLeft))
	w.wantNone(t)
}
