package contract

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// What is asked for wrongly is refused, with the reason, and has changed nothing.
func checkRefuse(t *testing.T, p *place) {
	prog := p.tracer(t, 1)
	one, err := p.tryAttach(t, prog, dispatcher.Options{Name: "one", Priority: 10})
	qt.Assert(t, qt.IsNil(err))
	before, other := p.Read(t), p.tracer(t, 2)
	refused := func(what string, cause error, target dispatcher.Target, o dispatcher.Options) {
		t.Helper()
		o.BPFFS, o.Persistent = p.BPFFS, true
		_, err := dispatcher.Attach(t.Context(), target, dispatcher.Program(other), o)
		qt.Check(t, qt.ErrorIs(err, cause), qt.Commentf("attach %s", what))
		_, err = dispatcher.Plan(t.Context(), target, dispatcher.Program(other), o)
		qt.Check(t, qt.ErrorIs(err, cause), qt.Commentf("plan %s", what))
	}
	refused("a name that is taken", fs.ErrExist, p.Target, dispatcher.Options{Name: "one"})
	for _, name := range []string{"a b", "-x", "link:3", "id:4", "a\x00", "\xff", strings.Repeat("x", 64)} {
		refused(fmt.Sprintf("as %q", name), dispatcher.ErrUsage, p.Target, dispatcher.Options{Name: name})
		refused(fmt.Sprintf("of %q", name), dispatcher.ErrUsage, p.Target, dispatcher.Options{Owner: name})
	}
	for _, prio := range []int{-1, 65536} {
		refused(fmt.Sprint(prio), dispatcher.ErrUsage, p.Target, dispatcher.Options{Priority: prio})
		qt.Check(t, qt.ErrorIs(one.Set(t.Context(), scene.Priority(prio)), dispatcher.ErrUsage))
	}
	if p.Target.Hook != hook.XDP { // which alone has all this
		refused("in a mode", dispatcher.ErrUsage, p.Target, dispatcher.Options{Mode: hook.ModeNative})
		for _, s := range []hook.Settings{{ContinueOn: hook.SetOf(hook.Pass)}, {OnMissing: hook.MissingContinue}} {
			refused(fmt.Sprintf("with %+v", s), dispatcher.ErrUsage, p.Target, dispatcher.Options{Priority: s.Priority, ContinueOn: s.ContinueOn, OnMissing: s.OnMissing})
			qt.Check(t, qt.ErrorIs(one.Set(t.Context(), s), dispatcher.ErrUsage))
		}
	}
	for path, cause := range p.wrongTargets(t) {
		refused(fmt.Sprintf("to %+v", path), cause, path, dispatcher.Options{})
		_, err := dispatcher.Read(t.Context(), path, p.Look())
		qt.Check(t, qt.ErrorIs(err, cause), qt.Commentf("read %+v", path))
		_, err = dispatcher.Open(t.Context(), path, "one", p.Look())
		qt.Check(t, qt.ErrorIs(err, cause), qt.Commentf("open at %+v", path))
		qt.Check(t, qt.ErrorIs(dispatcher.Detach(t.Context(), path, "one", p.Leave()), cause), qt.Commentf("detach at %+v", path))
		qt.Check(t, qt.ErrorIs(dispatcher.DetachAll(t.Context(), path, p.Leave()), cause), qt.Commentf("detach all at %+v", path))
	}
	for ref, cause := range map[hook.Ref]error{"nosuch": fs.ErrNotExist, "": fs.ErrNotExist, "link:x": dispatcher.ErrUsage, "id:0": dispatcher.ErrUsage} {
		_, err := dispatcher.Open(t.Context(), p.Target, ref, p.Look())
		qt.Check(t, qt.ErrorIs(err, cause), qt.Commentf("open %q", ref))
		qt.Check(t, qt.ErrorIs(dispatcher.Detach(t.Context(), p.Target, ref, p.Leave()), cause), qt.Commentf("detach %q", ref))
	}
	_, err = dispatcher.Attach(t.Context(), p.Target, dispatcher.Source{}, dispatcher.Options{BPFFS: p.BPFFS, Persistent: true})
	qt.Check(t, qt.ErrorIs(err, dispatcher.ErrUsage))
	qt.Check(t, qt.ErrorIs(one.Update(t.Context(), dispatcher.Source{}), dispatcher.ErrUsage))

	// TCX takes a program once; elsewhere it may run twice.
	_, err = p.tryAttach(t, prog, dispatcher.Options{Name: "twin"})
	if p.Target.Hook.Family() != "tcx" {
		qt.Assert(t, qt.IsNil(err))
		p.wantRun(t, 1, 1)
		p.Detach(t, "twin")
	} else {
		qt.Check(t, qt.ErrorIs(err, fs.ErrExist))
		two, err := p.tryAttach(t, other, dispatcher.Options{Name: "two"})
		qt.Assert(t, qt.IsNil(err))
		qt.Check(t, qt.ErrorIs(two.Update(t.Context(), dispatcher.Program(prog)), fs.ErrExist))
		p.wantRunning(t, 1, 2)
		qt.Assert(t, qt.IsNil(two.Detach(t.Context())))
	}
	after := p.Read(t)
	after.Revision, after.DispatcherID = before.Revision, before.DispatcherID
	qt.Check(t, qt.DeepEquals(after, before))
	p.wantRunning(t, 1)
}

// wrongTargets are places that are none.
func (p *place) wrongTargets(t testing.TB) map[dispatcher.Target]error {
	t.Helper()
	if p.Cgroup == nil {
		return map[dispatcher.Target]error{
			dispatcher.On(p.Target.Hook, "nosuch").In(p.Server.Name):  fs.ErrNotExist,
			dispatcher.On(p.Target.Hook, "").In(p.Server.Name):        dispatcher.ErrUsage,
			dispatcher.On(p.Target.Hook, p.ServerDev).In("nosuch"):    fs.ErrNotExist,
			dispatcher.On(p.Target.Hook, p.ServerDev).In("/dev/null"): dispatcher.ErrUsage,
		}
	}
	return map[dispatcher.Target]error{
		dispatcher.On(p.Target.Hook, p.Cgroup.Path+"/nosuch"):       fs.ErrNotExist,
		dispatcher.On(p.Target.Hook, "/nosuch"):                     fs.ErrNotExist,
		dispatcher.On(p.Target.Hook, ""):                            dispatcher.ErrUsage,
		dispatcher.On(p.Target.Hook, t.TempDir()):                   dispatcher.ErrUsage,
		dispatcher.On(p.Target.Hook, p.Cgroup.Path+"/cgroup.procs"): dispatcher.ErrUsage,
		p.Target.In(p.aside.Name):                                   dispatcher.ErrUsage,
		p.Target.In("nosuch"):                                       dispatcher.ErrUsage,
	}
}

// A call that gives up has changed nothing.
func checkCancel(t *testing.T, p *place) {
	one := p.join(t, 1, dispatcher.Options{})
	p.join(t, 2, dispatcher.Options{})
	before := p.Read(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	next := dispatcher.Program(p.tracer(t, 3))
	for what, err := range map[string]error{
		"read":       scene.Second(dispatcher.Read(ctx, p.Target, p.Look())),
		"open":       scene.Second(dispatcher.Open(ctx, p.Target, "one", p.Look())),
		"list":       scene.Second(dispatcher.List(ctx, dispatcher.ListOptions{BPFFS: p.BPFFS})),
		"info":       scene.Second(one.Info(ctx)),
		"chain":      scene.Second(one.Chain(ctx)),
		"attach":     scene.Second(dispatcher.Attach(ctx, p.Target, next, dispatcher.Options{Name: "three", BPFFS: p.BPFFS, Persistent: true})),
		"plan":       scene.Second(dispatcher.Plan(ctx, p.Target, next, dispatcher.Options{Name: "three", BPFFS: p.BPFFS, Persistent: true})),
		"update":     one.Update(ctx, next),
		"set":        one.Set(ctx, scene.Priority(70)),
		"move":       one.Move(ctx, hook.Position{Last: true}),
		"pin":        scene.Second(one.Pin(ctx)),
		"link":       one.Detach(ctx),
		"detach":     dispatcher.Detach(ctx, p.Target, "one", p.Leave()),
		"detach all": dispatcher.DetachAll(ctx, p.Target, p.Leave()),
	} {
		qt.Check(t, qt.ErrorIs(err, context.Canceled), qt.Commentf("%s", what))
	}
	qt.Check(t, qt.DeepEquals(p.Read(t), before))
	p.wantRunning(t, 1, 2)
}

// A Link that was closed says so.
func checkClosed(t *testing.T, p *place) {
	one := p.join(t, 1, dispatcher.Options{Persistent: true})
	qt.Assert(t, qt.IsNil(one.Close()))
	qt.Assert(t, qt.IsNil(one.Close()))
	ctx := t.Context()
	for what, err := range map[string]error{
		"update":  one.Update(ctx, dispatcher.Program(p.tracer(t, 2))),
		"set":     one.Set(ctx, scene.Priority(7)),
		"move":    one.Move(ctx, hook.Position{First: true}),
		"pin":     scene.Second(one.Pin(ctx)),
		"detach":  one.Detach(ctx),
		"info":    scene.Second(one.Info(ctx)),
		"chain":   scene.Second(one.Chain(ctx)),
		"program": scene.Second(one.Program(t.Context())),
	} {
		qt.Check(t, qt.ErrorIs(err, fs.ErrClosed), qt.Commentf("%s", what))
	}
	p.wantRunning(t, 1)
}

// A hook that is full says so, and has room again when somebody leaves.
func checkFull(t *testing.T, p *place) {
	var room int
	switch p.Target.Hook.Family() {
	case "xdp":
		room = hook.MaxMembers
	case "tcx":
		room = 63 // BPF_MPROG_MAX
	case "cgroup":
		room = 64 // BPF_CGROUP_MAX_PROGS
	}
	one := p.join(t, 1, dispatcher.Options{Priority: 1})
	var last *dispatcher.Link
	for n := 2; n <= room; n++ {
		prog := testenv.VerdictProgram(t, "ldt_filler", p.GoOn(), testenv.On(p.Target.Hook))
		link, err := p.tryAttach(t, prog, dispatcher.Options{Name: fmt.Sprintf("filler-%d", n)})
		qt.Assert(t, qt.IsNil(err), qt.Commentf("%d", n))
		last = link
	}
	before := p.Read(t)
	qt.Assert(t, qt.HasLen(before.Members, room))
	_, err := p.tryJoin(t, 2, dispatcher.Options{})
	qt.Check(t, qt.ErrorIs(err, dispatcher.ErrChainFull))
	qt.Check(t, qt.DeepEquals(p.Read(t), before))

	// Where the kernel moves no links, there must be room for another one meanwhile.
	err = one.Move(t.Context(), hook.Position{Last: true})
	if p.Target.Hook == hook.XDP {
		qt.Check(t, qt.IsNil(err))
	} else {
		qt.Check(t, qt.ErrorIs(err, dispatcher.ErrChainFull))
		qt.Check(t, qt.Equals(scene.Summary(p.Read(t)), scene.Summary(before)))
	}
	p.wantRun(t, 1)
	qt.Assert(t, qt.IsNil(last.Detach(t.Context())))
	p.join(t, 2, dispatcher.Options{Priority: 65535})
	p.wantRun(t, 1, 2)
}

// A program that is on a cgroup for itself alone leaves no room, there and below. The error names it.
func checkExclusive(t *testing.T, p *place) {
	below := p.Cgroup.Child(t, "below")
	for flags, where := range map[uint32][]string{
		0:                         {p.Cgroup.Path, below.Path},
		unix.BPF_F_ALLOW_OVERRIDE: {p.Cgroup.Path},
	} {
		legacy := p.tracer(t, 8)
		leave := p.attachBare(t, legacy, flags)
		for _, path := range where {
			before, err := dispatcher.Read(t.Context(), dispatcher.On(p.Target.Hook, path), p.Look())
			qt.Assert(t, qt.IsNil(err))
			_, err = dispatcher.Attach(t.Context(), dispatcher.On(p.Target.Hook, path), dispatcher.Program(p.tracer(t, 1)),
				dispatcher.Options{Name: "one", BPFFS: p.BPFFS, Persistent: true})
			qt.Check(t, qt.ErrorIs(err, dispatcher.ErrBusy), qt.Commentf("flags %d, %s", flags, path))
			qt.Check(t, qt.ErrorMatches(err, ".*it was attached to .* for itself alone .*"))
			var e *dispatcher.Error
			qt.Assert(t, qt.ErrorAs(err, &e))
			qt.Assert(t, qt.IsNotNil(e.Occupant))
			qt.Check(t, qt.Equals(e.Occupant.Kind, hook.KindLegacy))
			qt.Check(t, qt.Equals(e.Occupant.Program.ID, uint32(scene.ID(t, legacy))))
			after, err := dispatcher.Read(t.Context(), dispatcher.On(p.Target.Hook, path), p.Look())
			qt.Assert(t, qt.IsNil(err))
			qt.Check(t, qt.DeepEquals(after, before))
		}
		p.wantRun(t, 8)
		qt.Check(t, qt.Equals(p.Read(t).Members[0].Detail, map[uint32]string{0: "exclusive", unix.BPF_F_ALLOW_OVERRIDE: "allow-override"}[flags]))
		qt.Check(t, qt.HasLen(p.pinPaths(t), 0))
		leave()
	}
	p.join(t, 1, dispatcher.Options{})
	p.wantRunning(t, 1)
}

// A program that does not share its cgroup runs for one below only as long as that has none. A member does not switch it off unless it
// is told to, and what is switched off is seen.
func checkOverridden(t *testing.T, p *place) {
	below := dispatcher.On(p.Target.Hook, p.Cgroup.Child(t, "below").Path)
	attach := func(name string, override bool) (*dispatcher.Link, error) {
		o := dispatcher.Options{Name: name, BPFFS: p.BPFFS, Persistent: true, Override: override}
		_, planned := dispatcher.Plan(t.Context(), below, dispatcher.Program(p.tracer(t, 1)), o)
		link, err := dispatcher.Attach(t.Context(), below, dispatcher.Program(p.tracer(t, 1)), o)
		qt.Check(t, qt.Equals(fmt.Sprint(planned), fmt.Sprint(err)))
		if err == nil {
			p.keep(t, link)
		}
		return link, err
	}
	want := func(runs string, overridden bool) {
		t.Helper()
		chains, err := dispatcher.Effective(t.Context(), below, p.Look())
		qt.Assert(t, qt.IsNil(err))
		words := ""
		for _, m := range chains[0].Members {
			words += fmt.Sprintf("%s %s, ", m.Name, m.State)
		}
		qt.Check(t, qt.Equals(strings.TrimSuffix(words, ", "), runs))
		found, err := dispatcher.Doctor(t.Context(), p.Look())
		qt.Assert(t, qt.IsNil(err))
		qt.Check(t, qt.Equals(slices.ContainsFunc(found, func(f hook.Finding) bool {
			return f.Check == "overridden" && f.Level == hook.LevelDrift && f.Target == below.Cgroup
		}), overridden))
	}
	legacy := p.tracer(t, 8)
	p.attachBare(t, legacy, unix.BPF_F_ALLOW_OVERRIDE)
	_, err := attach("one", false)
	qt.Check(t, qt.ErrorIs(err, dispatcher.ErrBusy))
	qt.Check(t, qt.ErrorMatches(err, ".*it would not run for .*/below any more: .*; .* adopt .*--override.*"))
	var e *dispatcher.Error
	qt.Assert(t, qt.ErrorAs(err, &e))
	qt.Check(t, qt.Equals(e.Occupant.Program.ID, uint32(scene.ID(t, legacy))))
	want("ldt_trace_8 running", false)

	_, err = attach("one", true)
	qt.Assert(t, qt.IsNil(err))
	want("one running, ldt_trace_8 overridden", true)
	two, err := attach("two", false) // it switches nothing off any more
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.IsNil(two.Detach(t.Context())))

	// A member shares its cgroup.
	adopted, err := dispatcher.Adopt(t.Context(), p.Target, dispatcher.AdoptOptions{Name: "old", BPFFS: p.BPFFS, Persistent: true})
	qt.Assert(t, qt.IsNil(err))
	want("one running, old running", false)
	qt.Check(t, qt.IsNil(adopted.Detach(t.Context())))
	qt.Check(t, qt.IsNil(adopted.Close()))
	leave := p.attachBare(t, legacy, 0) // as one that comes later, for itself alone
	want("one running, ldt_trace_8 overridden", true)
	leave()
	want("one running", false)
	qt.Check(t, qt.IsNil(dispatcher.Detach(t.Context(), below, "one", p.Leave())))
}

// A link cannot be moved, and a new one leaves with the process that made it: so a member that another process holds is
// moved by that process only, or when it is pinned.
func checkHeldElsewhere(t *testing.T, p *place) {
	owner := p.AttachIn(t, p.tracer(t, 1), dispatcher.Options{Name: "one", Priority: 10})
	p.join(t, 2, dispatcher.Options{Priority: 30})
	one := p.reopen(t, "one")
	before := p.Read(t)
	qt.Check(t, qt.ErrorIs(one.Set(t.Context(), scene.Priority(40)), dispatcher.ErrBusy))
	qt.Check(t, qt.ErrorIs(one.Move(t.Context(), hook.Position{Last: true}), dispatcher.ErrBusy))
	qt.Check(t, qt.DeepEquals(p.Read(t), before))
	p.wantRunning(t, 1, 2)
	qt.Assert(t, qt.IsNil(one.Set(t.Context(), scene.Priority(20)))) // where it is
	qt.Check(t, qt.Equals(p.Read(t).Member("one").Priority, 20))

	// The owner moves it, and a Link that was opened follows.
	qt.Assert(t, qt.IsNil(owner.Do(t, scene.Command{Op: "set", Settings: scene.Priority(40)})))
	p.wantRunning(t, 2, 1)
	info, err := one.Info(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.DeepEquals(info, p.Read(t).Member("one")))
	qt.Assert(t, qt.IsNil(owner.Do(t, scene.Command{Op: "set", Settings: scene.Priority(15)})))
	qt.Assert(t, qt.IsNil(one.Update(t.Context(), dispatcher.Program(p.tracer(t, 3)))))
	p.wantRun(t, 3, 2)

	// Pinned, it is moved by anybody, and its owner follows.
	qt.Assert(t, qt.IsNil(scene.Second(one.Pin(t.Context()))))
	qt.Assert(t, qt.IsNil(one.Set(t.Context(), scene.Priority(60))))
	p.wantRun(t, 2, 3)
	qt.Assert(t, qt.IsNil(owner.Do(t, scene.Command{Op: "update", Program: scene.ID(t, p.tracer(t, 4))})))
	p.wantRun(t, 2, 4)
	qt.Assert(t, qt.IsNil(owner.Do(t, scene.Command{Op: "unpin"})))
	qt.Check(t, qt.HasLen(p.pinPaths(t), 0))
	qt.Assert(t, qt.IsNil(one.Close()))
	p.wantRun(t, 2, 4)
	owner.Kill()
	p.wantRunSoon(t, 2)
}

// An owner learns that its member has been taken out, and can do nothing any more but close it.
func checkTakenOut(t *testing.T, p *place) {
	one := p.join(t, 1, dispatcher.Options{})
	two := p.join(t, 2, dispatcher.Options{Persistent: true})
	p.join(t, 3, dispatcher.Options{})
	qt.Assert(t, qt.IsNil(scene.NewApp(t).Do(t, p.Command(scene.Command{Op: "detach", Member: "one"}))))
	qt.Assert(t, qt.IsNil(scene.NewApp(t).Do(t, p.Command(scene.Command{Op: "detach", Member: "two"}))))
	p.wantRunning(t, 3)
	for _, link := range []*dispatcher.Link{one, two} {
		ctx := t.Context()
		for name, err := range map[string]error{
			"update": link.Update(ctx, dispatcher.Program(p.tracer(t, 9))),
			"set":    link.Set(ctx, scene.Priority(7)),
			"move":   link.Move(ctx, hook.Position{First: true}),
			"pin":    scene.Second(link.Pin(ctx)),
			"info":   scene.Second(link.Info(ctx)),
		} {
			qt.Check(t, qt.IsTrue(errors.Is(err, fs.ErrNotExist) || errors.Is(err, dispatcher.ErrDefunct)), qt.Commentf("%s: %v", name, err))
		}
		qt.Check(t, qt.IsNil(link.Detach(ctx))) // already gone is no error
		qt.Check(t, qt.IsNil(link.Close()))
	}
	qt.Check(t, qt.HasLen(p.pinPaths(t), 0))
	p.wantRunning(t, 3)
}

// rm -r of the whole folder is what an administrator in need will do: what was pinned leaves, and a process that holds a member
// still does, under its name.
func checkFolderRemoved(t *testing.T, p *place) {
	one := p.join(t, 1, dispatcher.Options{Priority: 10})
	p.join(t, 2, dispatcher.Options{Priority: 20})
	three := p.join(t, 3, dispatcher.Options{Priority: 30, Persistent: true})
	qt.Assert(t, qt.IsNil(three.Close()))
	qt.Assert(t, qt.IsNil(os.RemoveAll(filepath.Join(p.BPFFS, "libdispatcher"))))
	if p.Target.Hook.Family() == "tc" {
		p.wantRunning(t, 1, 2, 3)
		return
	}
	p.wantRunSoon(t, 1, 2)
	info, err := one.Info(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(info.Name, "one"))
	qt.Check(t, qt.Equals(info.Priority, 10))
	for _, link := range p.links[:2] { // each is held, and has its name
		info, err := link.Info(t.Context())
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.IsNil(link.Set(t.Context(), scene.Priority(info.Priority+5))))
	}
	p.wantRunning(t, 1, 2)
	p.join(t, 3, dispatcher.Options{Priority: 20, Persistent: true})
	p.wantRunning(t, 1, 3, 2)
}

// Without a bpffs a process has no lock, and cannot pin; the rest works, for its own members.
func checkWithoutBPFFS(t *testing.T, p *place) {
	with := p.Scene
	p.Scene = p.WithoutBPFFS(t)
	_, err := p.tryJoin(t, 1, dispatcher.Options{Persistent: true})
	qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
	one := p.join(t, 1, dispatcher.Options{})
	qt.Check(t, qt.ErrorIs(scene.Second(one.Pin(t.Context())), fs.ErrNotExist))
	qt.Check(t, qt.IsNil(one.Unpin(t.Context())))
	two := p.join(t, 2, dispatcher.Options{})
	p.wantRun(t, 1, 2)
	info, err := one.Info(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(info.Name, "one"))
	qt.Assert(t, qt.IsNil(one.Move(t.Context(), hook.Position{Last: true})))
	p.wantRun(t, 2, 1)
	qt.Assert(t, qt.IsNil(two.Update(t.Context(), dispatcher.Program(p.tracer(t, 3)))))
	p.wantRun(t, 3, 1)
	qt.Assert(t, qt.IsNil(two.Detach(t.Context())))
	p.wantRun(t, 1)
	qt.Assert(t, qt.IsNil(one.Close()))
	p.wantRunSoon(t)
	p.Scene = with
}
