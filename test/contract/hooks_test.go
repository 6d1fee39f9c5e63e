package contract

import (
	"io/fs"
	"slices"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// A place that is asked for is had, with a priority that fits; what does not fit is refused.
func checkPosition(t *testing.T, p *place) {
	at := func(number int, to hook.Position, prio int) *dispatcher.Link {
		t.Helper()
		return p.join(t, number, dispatcher.Options{Position: to, Priority: prio})
	}
	one := p.join(t, 1, dispatcher.Options{Priority: 10})
	p.join(t, 2, dispatcher.Options{Priority: 30})
	at(3, hook.Position{After: "one"}, 0)
	p.wantRunning(t, 1, 3, 2)
	qt.Check(t, qt.Equals(p.Read(t).Member("three").Priority, 30)) // the nearest to the default
	at(4, hook.Position{Before: "three"}, 20)
	p.wantRunning(t, 1, 4, 3, 2)
	at(5, hook.Position{First: true}, 0)
	at(6, hook.Position{Last: true}, 0)
	p.wantRunning(t, 5, 1, 4, 3, 2, 6)
	qt.Check(t, qt.Equals(p.Read(t).Member("five").Priority, 10))
	qt.Check(t, qt.Equals(p.Read(t).Member("six").Priority, 50))

	before := p.Read(t)
	for what, test := range map[string]struct {
		at    hook.Position
		prio  int
		cause error
	}{
		"a priority too high":     {hook.Position{First: true}, 11, dispatcher.ErrUsage},
		"a priority too low":      {hook.Position{Last: true}, 49, dispatcher.ErrUsage},
		"one between":             {hook.Position{After: "one"}, 9, dispatcher.ErrUsage},
		"two places":              {hook.Position{First: true, After: "one"}, 0, dispatcher.ErrUsage},
		"nobody":                  {hook.Position{After: "nosuch"}, 0, fs.ErrNotExist},
		"a link that is not":      {hook.Position{After: hook.LinkRef(1 << 31)}, 0, fs.ErrNotExist},
		"a program not there":     {hook.Position{Before: hook.ProgramRef(1 << 31)}, 0, fs.ErrNotExist},
		"a link without a number": {hook.Position{Before: "link:"}, 0, dispatcher.ErrUsage},
	} {
		_, err := p.tryJoin(t, 9, dispatcher.Options{Position: test.at, Priority: test.prio})
		qt.Check(t, qt.ErrorIs(err, test.cause), qt.Commentf("%s", what))
		if test.prio == 0 {
			qt.Check(t, qt.ErrorIs(one.Move(t.Context(), test.at), test.cause), qt.Commentf("%s", what))
		}
	}
	qt.Check(t, qt.DeepEquals(p.Read(t), before))

	move := func(to hook.Position) {
		t.Helper()
		qt.Assert(t, qt.IsNil(one.Move(t.Context(), to)))
	}
	move(hook.Position{After: "four"})
	p.wantRunning(t, 5, 4, 1, 3, 2, 6)
	move(hook.Position{Last: true})
	p.wantRunning(t, 5, 4, 3, 2, 6, 1)
	move(hook.Position{Before: "five"})
	p.wantRunning(t, 1, 5, 4, 3, 2, 6)
	move(hook.Position{First: true}) // where it is
	p.wantRunning(t, 1, 5, 4, 3, 2, 6)
	members := p.Read(t).Members
	for i := range members[1:] {
		qt.Check(t, qt.IsTrue(members[i].Priority <= members[i+1].Priority), qt.Commentf("%d", i))
	}

	// What Plan shows is what Attach does.
	o := dispatcher.Options{Name: "seven", BPFFS: p.BPFFS, Position: hook.Position{After: "three"}, Persistent: true}
	prog := dispatcher.Program(p.tracer(t, 7))
	plan, err := dispatcher.Plan(t.Context(), p.Target, prog, o)
	qt.Assert(t, qt.IsNil(err))
	p.wantRunning(t, 1, 5, 4, 3, 2, 6)
	seven, err := dispatcher.Attach(t.Context(), p.Target, prog, o)
	qt.Assert(t, qt.IsNil(err))
	p.keep(t, seven)
	p.wantRunning(t, 1, 5, 4, 3, 7, 2, 6)
	qt.Check(t, qt.Equals(scene.Summary(plan), scene.Summary(p.Read(t))))
	qt.Check(t, qt.Equals(plan.Member("seven").Priority, p.Read(t).Member("seven").Priority))
}

// An entry can be named by its link and by its program, too.
func checkRefer(t *testing.T, p *place) {
	one := p.join(t, 1, dispatcher.Options{Priority: 10})
	p.join(t, 2, dispatcher.Options{Priority: 30})
	byProgram := hook.ProgramRef(p.Read(t).Member("two").Program.ID)
	p.join(t, 3, dispatcher.Options{Position: hook.Position{Before: byProgram}})
	p.wantRunning(t, 1, 3, 2)
	two := p.reopen(t, string(byProgram))
	info, err := two.Info(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.DeepEquals(info, p.Read(t).Member("two")))
	if p.Target.Hook.Family() != "tc" { // where nothing has a link
		byLink := hook.LinkRef(p.Read(t).Member("one").LinkID)
		p.join(t, 4, dispatcher.Options{Position: hook.Position{After: byLink}})
		p.wantRunning(t, 1, 4, 3, 2)
		info, err := p.reopen(t, string(byLink)).Info(t.Context())
		qt.Assert(t, qt.IsNil(err))
		qt.Check(t, qt.DeepEquals(info, p.Read(t).Member("one")))
		qt.Assert(t, qt.IsNil(one.Move(t.Context(), hook.Position{After: hook.LinkRef(p.Read(t).Member("two").LinkID)})))
		p.wantRunning(t, 4, 3, 2, 1)
		p.Detach(t, string(hook.LinkRef(p.Read(t).Member("four").LinkID)))
		p.wantRunning(t, 3, 2, 1)
		p.Detach(t, "one")
	} else {
		p.Detach(t, "one")
	}
	p.wantRunning(t, 3, 2)
	p.Detach(t, string(byProgram))
	p.wantRunning(t, 3)
}

// What others attached keeps its place, is shown for what it is, and is not touched.
func checkBeside(t *testing.T, p *place) {
	kind := hook.KindForeign
	if p.Target.Hook.Family() == "tc" {
		kind = hook.KindLegacy
	}
	one := p.join(t, 1, dispatcher.Options{Priority: 10})
	p.join(t, 2, dispatcher.Options{Priority: 30})
	firstID, firstLeaves := p.outsider(t, 8, "")
	secondID, secondLeaves := p.outsider(t, 9, "one")
	p.wantRun(t, 8, 1, 9, 2)
	wantEntries := func(want string) { // what runs, with a star for what is not a member
		t.Helper()
		var got []string
		for _, m := range p.Read(t).Members {
			entry := strings.TrimPrefix(m.Program.Name, "ldt_trace_")
			if m.Kind == kind {
				entry += "*"
			}
			got = append(got, entry)
		}
		qt.Assert(t, qt.Equals(strings.Join(got, " "), want))
	}
	wantEntries("8* 1 9* 2")

	// Newcomers go by the members, no matter what is in between.
	p.join(t, 3, dispatcher.Options{Priority: 20})
	p.wantRun(t, 8, 1, 3, 9, 2)
	p.join(t, 4, dispatcher.Options{Priority: 5})
	p.wantRun(t, 8, 4, 1, 3, 9, 2)
	p.join(t, 5, dispatcher.Options{Priority: 90})
	p.wantRun(t, 8, 4, 1, 3, 9, 2, 5)
	qt.Assert(t, qt.IsNil(one.Set(t.Context(), scene.Priority(95))))
	p.wantRun(t, 8, 4, 3, 9, 2, 5, 1)
	wantEntries("8* 4 3 9* 2 5 1")

	c := p.Read(t)
	for i, id := range map[int]uint32{0: firstID, 3: secondID} {
		m := c.Members[i]
		qt.Check(t, qt.Equals(m.LinkID, id))
		qt.Check(t, qt.Equals(m.Kind, kind))
		qt.Check(t, qt.Equals(m.Protected(), id != 0))
		qt.Check(t, qt.Equals(m.Priority, 0))
		qt.Check(t, qt.Equals(m.Owner, ""))
		qt.Check(t, qt.IsFalse(m.Persistent))

		ref := hook.ProgramRef(m.Program.ID)
		err := dispatcher.Detach(t.Context(), p.Target, ref, p.Leave())
		qt.Check(t, qt.ErrorIs(err, dispatcher.ErrBusy))
		var e *dispatcher.Error
		qt.Assert(t, qt.ErrorAs(err, &e))
		qt.Assert(t, qt.IsNotNil(e.Occupant))
		qt.Check(t, qt.DeepEquals(*e.Occupant, hook.Occupant{Kind: kind, Program: m.Program, LinkID: id}))
		_, err = dispatcher.Open(t.Context(), p.Target, hook.Ref(m.Name), p.Look())
		qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist)) // it is no member, whatever it is called
	}
	p.Clear(t)
	p.wantRun(t, 8, 9)
	qt.Check(t, qt.IsFalse(p.Read(t).Ours()))
	qt.Check(t, qt.ErrorIs(dispatcher.DetachAll(t.Context(), p.Target, p.Leave()), dispatcher.ErrBusy))
	p.join(t, 6, dispatcher.Options{Position: hook.Position{First: true}, Priority: 1})
	p.join(t, 7, dispatcher.Options{})
	p.wantRun(t, 6, 7, 8, 9)

	secondLeaves()
	p.wantRunSoon(t, 6, 7, 8)
	o := p.Leave()
	o.Force = true
	qt.Assert(t, qt.IsNil(dispatcher.Detach(t.Context(), p.Target, hook.ProgramRef(c.Members[0].Program.ID), o)))
	p.wantRunning(t, 6, 7)
	if p.Target.Hook.Family() != "tc" {
		firstLeaves() // what it held is defunct
	}
}

// The preferences of filters are numbers, and there is none before the first and after the last.
func checkNoRoom(t *testing.T, p *place) {
	one := p.join(t, 1, dispatcher.Options{Priority: 1})
	p.join(t, 2, dispatcher.Options{Position: hook.Position{First: true}}) // with the same preference
	p.join(t, 3, dispatcher.Options{Priority: 65535})
	p.join(t, 4, dispatcher.Options{Position: hook.Position{After: "two"}}) // also
	p.wantRunning(t, 2, 4, 1, 3)
	before := p.Read(t)
	_, err := p.tryJoin(t, 5, dispatcher.Options{Position: hook.Position{Last: true}})
	qt.Check(t, qt.ErrorIs(err, dispatcher.ErrBusy))
	qt.Check(t, qt.ErrorIs(one.Move(t.Context(), hook.Position{Last: true}), dispatcher.ErrBusy))
	qt.Check(t, qt.DeepEquals(p.Read(t), before))
	p.wantRunning(t, 2, 4, 1, 3)
	p.Clear(t)

	// A preference that somebody else uses is not shared: "tc filter del pref" takes all of it.
	filter := []string{"dev", p.ServerDev, p.Side(), "pref", "1"}
	p.Server.TC(t, append(append([]string{"filter", "add"}, filter...), "bpf", "da", "pinned", p.Pinned(t, p.tracer(t, 8)))...)
	_, err = p.tryJoin(t, 1, dispatcher.Options{Position: hook.Position{First: true}})
	qt.Check(t, qt.ErrorIs(err, dispatcher.ErrBusy))
	p.wantRun(t, 8)
	p.Server.TC(t, append([]string{"filter", "del"}, filter...)...)
}

// The list of everything says the same as a look at the one.
func checkList(t *testing.T, p *place) {
	p.join(t, 1, dispatcher.Options{Priority: 7})
	p.join(t, 2, dispatcher.Options{Persistent: true})
	want := p.Read(t)
	mine := func(o dispatcher.ListOptions) (found []hook.Chain) {
		t.Helper()
		o.BPFFS = p.BPFFS
		list, err := dispatcher.List(t.Context(), o)
		qt.Assert(t, qt.IsNil(err))
		for _, c := range list {
			if c.Hook == p.Target.Hook && c.CgroupID == want.CgroupID && c.Ifindex == want.Ifindex && c.NetNS.Cookie == want.NetNS.Cookie {
				c.NetNS.Name = want.NetNS.Name
				found = append(found, c)
			}
			qt.Check(t, qt.IsTrue(o.NetNS == "" || !c.Hook.OnCgroup()))
			qt.Check(t, qt.IsTrue(o.Hooks == nil || c.Hook == o.Hooks[0]))
		}
		return found
	}
	qt.Check(t, qt.DeepEquals(mine(dispatcher.ListOptions{}), []hook.Chain{*want}))
	qt.Check(t, qt.DeepEquals(mine(dispatcher.ListOptions{Hooks: []hook.Hook{p.Target.Hook}}), []hook.Chain{*want}))
	if p.Cgroup == nil {
		qt.Check(t, qt.DeepEquals(mine(dispatcher.ListOptions{NetNS: p.Server.Name}), []hook.Chain{*want}))
	}
	p.Clear(t)
	scene.Soon(t, func() bool { return len(p.Read(t).Members) == 0 })
	qt.Check(t, qt.HasLen(mine(dispatcher.ListOptions{}), 0))
}

// What runs for a cgroup is attached to those above it, too: the order is the one in which they do run.
func checkInherited(t *testing.T, p *place) {
	from := map[int]*testenv.Cgroup{1: p.Cgroup, 2: p.above, 3: p.Cgroup, 4: p.above}
	var above []*dispatcher.Link
	for n := 1; n <= len(from); n++ {
		cg := from[n]
		link, err := dispatcher.Attach(t.Context(), dispatcher.On(p.Target.Hook, cg.Path), dispatcher.Program(p.tracer(t, n)),
			dispatcher.Options{Name: scene.Numbers[n], BPFFS: p.BPFFS, Priority: 10 * n})
		qt.Assert(t, qt.IsNil(err))
		p.keep(t, link)
		if cg == p.above {
			above = append(above, link)
		}
	}
	runs, err := dispatcher.Effective(t.Context(), p.Target, p.Look())
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.HasLen(runs, 1))
	c := runs[0]
	// Seen from above, it is what runs below.
	fromAbove, err := dispatcher.Effective(t.Context(), dispatcher.On(p.Target.Hook, p.above.Path), p.Look())
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.HasLen(fromAbove, 2))
	qt.Check(t, qt.DeepEquals(fromAbove[1], c))
	var order []int
	for _, m := range c.Members {
		n := slices.Index(scene.Numbers, m.Name)
		qt.Assert(t, qt.IsNotNil(from[n]), qt.Commentf("%s", m.Name))
		qt.Check(t, qt.Equals(m.From, from[n].Path))
		qt.Check(t, qt.Equals(m.Priority, 10*n))
		order = append(order, n)
	}
	qt.Check(t, qt.HasLen(order, len(from)))
	p.wantRun(t, order...)
	p.Clear(t)
	p.wantRunSoon(t, 2, 4)
	qt.Check(t, qt.HasLen(p.Read(t).Members, 0))
	for _, link := range above {
		qt.Check(t, qt.IsNil(link.Detach(t.Context())))
	}
}
