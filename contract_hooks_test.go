package dispatcher_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// Why a promise is none on some hooks.
const (
	oneProgram = "one dispatcher holds all of XDP: others have no place beside it, and its members no links"
	noMoves    = "the dispatcher is exchanged as a whole, by whoever asks for it"
	noDevice   = "a cgroup is on no device, and in no network namespace"
	noneBelow  = "devices are not in each other: nothing is inherited"
	leftBehind = "the kernel takes all filters off a device that leaves its namespace"
	takenAlong = "a device takes its links along to another namespace"
)

// wholePromises are those that are checked on some hooks of each kind.
var wholePromises = []promise{
	{name: "position", whole: true, check: checkPosition},
	{name: "refer", whole: true, check: checkRefer, cannot: map[string]string{"xdp": oneProgram}},
	{name: "beside others", whole: true, check: checkBeside, cannot: map[string]string{"xdp": oneProgram}},
	{name: "no room", whole: true, check: checkNoRoom, cannot: map[string]string{
		"xdp": oneProgram, "tcx": "the kernel has an order, not numbers", "cgroup": "the kernel has an order, not numbers",
	}},
	{name: "list", whole: true, check: checkList},
	{name: "refuse", whole: true, check: checkRefuse},
	{name: "cancel", whole: true, check: checkCancel},
	{name: "close", whole: true, check: checkClosed},
	{name: "full", whole: true, check: checkFull, cannot: map[string]string{"tc": "filters are limited by their preferences only"}},
	{name: "exclusive", whole: true, check: checkExclusive, cannot: map[string]string{
		"xdp": oneProgram, "tcx": "the kernel knows it on cgroups only", "tc": "the kernel knows it on cgroups only",
	}},
	{name: "held elsewhere", whole: true, check: checkHeldElsewhere, cannot: map[string]string{"xdp": noMoves, "tc": noOwners}},
	{name: "taken out", whole: true, check: checkTakenOut},
	{name: "inherited", whole: true, check: checkInherited, cannot: map[string]string{
		"xdp": noneBelow, "tcx": noneBelow, "tc": noneBelow,
	}},
	{name: "replaced", whole: true, ends: true, check: checkReplaced},
	{name: "renamed", whole: true, ends: true, check: checkRenamed, cannot: map[string]string{"cgroup": "the kernel renames no cgroup of v2 (EPERM)"}},
	{name: "moved", whole: true, ends: true, check: checkMoved, cannot: map[string]string{
		"cgroup": noDevice, "tc": leftBehind,
	}},
	{name: "left behind", whole: true, ends: true, check: checkLeftBehind, cannot: map[string]string{
		"cgroup": noDevice, "xdp": takenAlong, "tcx": takenAlong,
	}},
	{name: "legacy", whole: true, check: checkLegacy},
	{name: "peer gone", whole: true, ends: true, check: checkPeerGone, cannot: map[string]string{"cgroup": noDevice}},
	{name: "namespace gone", whole: true, ends: true, check: checkNetNSGone, cannot: map[string]string{"cgroup": noDevice}},
}

// A place that is asked for is had, with a priority that fits; what does not fit is refused.
func checkPosition(t *testing.T, p *place) {
	at := func(number int, to hook.Position, prio int) *dispatcher.Link {
		t.Helper()
		return p.join(t, number, dispatcher.Options{Position: to, Settings: priority(prio)})
	}
	one := p.join(t, 1, dispatcher.Options{Settings: priority(10)})
	p.join(t, 2, dispatcher.Options{Settings: priority(30)})
	at(3, hook.Position{After: "one"}, 0)
	p.wantRunning(t, 1, 3, 2)
	qt.Check(t, qt.Equals(p.read(t).Member("three").Priority, 30)) // the nearest to the default
	at(4, hook.Position{Before: "three"}, 20)
	p.wantRunning(t, 1, 4, 3, 2)
	at(5, hook.Position{First: true}, 0)
	at(6, hook.Position{Last: true}, 0)
	p.wantRunning(t, 5, 1, 4, 3, 2, 6)
	qt.Check(t, qt.Equals(p.read(t).Member("five").Priority, 10))
	qt.Check(t, qt.Equals(p.read(t).Member("six").Priority, 50))

	before := p.read(t)
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
		_, err := p.tryJoin(t, 9, dispatcher.Options{Position: test.at, Settings: priority(test.prio)})
		qt.Check(t, qt.ErrorIs(err, test.cause), qt.Commentf("%s", what))
		if test.prio == 0 {
			qt.Check(t, qt.ErrorIs(one.Move(t.Context(), test.at), test.cause), qt.Commentf("%s", what))
		}
	}
	qt.Check(t, qt.DeepEquals(p.read(t), before))

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
	members := p.read(t).Members
	for i := range members[1:] {
		qt.Check(t, qt.IsTrue(members[i].Priority <= members[i+1].Priority), qt.Commentf("%d", i))
	}

	// What Plan shows is what Attach does.
	o := dispatcher.Options{Name: "seven", BPFFS: p.bpffs, Position: hook.Position{After: "three"}, Persistent: true}
	prog := dispatcher.Program(p.tracer(t, 7))
	plan, err := dispatcher.Plan(t.Context(), p.target, prog, o)
	qt.Assert(t, qt.IsNil(err))
	p.wantRunning(t, 1, 5, 4, 3, 2, 6)
	seven, err := dispatcher.Attach(t.Context(), p.target, prog, o)
	qt.Assert(t, qt.IsNil(err))
	p.keep(t, seven)
	p.wantRunning(t, 1, 5, 4, 3, 7, 2, 6)
	qt.Check(t, qt.Equals(summary(plan), summary(p.read(t))))
	qt.Check(t, qt.Equals(plan.Member("seven").Priority, p.read(t).Member("seven").Priority))
}

// An entry can be named by its link and by its program, too.
func checkRefer(t *testing.T, p *place) {
	one := p.join(t, 1, dispatcher.Options{Settings: priority(10)})
	p.join(t, 2, dispatcher.Options{Settings: priority(30)})
	byProgram := hook.ProgramRef(p.read(t).Member("two").Program.ID)
	p.join(t, 3, dispatcher.Options{Position: hook.Position{Before: byProgram}})
	p.wantRunning(t, 1, 3, 2)
	two := p.reopen(t, string(byProgram))
	info, err := two.Info(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.DeepEquals(info, p.read(t).Member("two")))
	if p.hook.Family() != "tc" { // where nothing has a link
		byLink := hook.LinkRef(p.read(t).Member("one").LinkID)
		p.join(t, 4, dispatcher.Options{Position: hook.Position{After: byLink}})
		p.wantRunning(t, 1, 4, 3, 2)
		info, err := p.reopen(t, string(byLink)).Info(t.Context())
		qt.Assert(t, qt.IsNil(err))
		qt.Check(t, qt.DeepEquals(info, p.read(t).Member("one")))
		qt.Assert(t, qt.IsNil(one.Move(t.Context(), hook.Position{After: hook.LinkRef(p.read(t).Member("two").LinkID)})))
		p.wantRunning(t, 4, 3, 2, 1)
		p.detach(t, string(hook.LinkRef(p.read(t).Member("four").LinkID)))
		p.wantRunning(t, 3, 2, 1)
		p.detach(t, "one")
	} else {
		p.detach(t, "one")
	}
	p.wantRunning(t, 3, 2)
	p.detach(t, string(byProgram))
	p.wantRunning(t, 3)
}

// outsider attaches a tracer as somebody else would who does not know of this library: before all others,
// or just behind a member. It returns the id of its link, 0 where there is none, and what takes it out.
func (p *place) outsider(t testing.TB, number int, behind string) (id uint32, leave func()) {
	t.Helper()
	prog := p.tracer(t, number)
	var l link.Link
	var err error
	switch p.hook.Family() {
	case "tcx":
		anchor := link.Head()
		if behind != "" {
			anchor = link.AfterLinkByID(link.ID(p.read(t).Member(behind).LinkID))
		}
		p.Server.Do(t, func() {
			l, err = link.AttachTCX(link.TCXOptions{Interface: p.ServerIfindex, Program: prog, Attach: testenv.AttachType(p.hook), Anchor: anchor})
		})
	case "cgroup":
		at := kernel.Before(0, false)
		if behind != "" {
			at = kernel.After(p.read(t).Member(behind).LinkID, true)
		}
		folder, err2 := os.Open(p.cgroup.Path)
		qt.Assert(t, qt.IsNil(err2))
		defer folder.Close()
		l, err = kernel.CreateLink(prog, int(folder.Fd()), testenv.AttachType(p.hook), at, 0)
	case "tc":
		pref := 3
		if behind != "" {
			pref = int(p.read(t).Member(behind).Filter.Pref) + 12
		}
		filter := []string{"dev", p.ServerDev, p.side(), "pref", fmt.Sprint(pref)}
		p.Server.TC(t, append(append([]string{"filter", "add"}, filter...), "bpf", "da", "pinned", p.pinned(t, prog))...)
		return 0, func() { p.Server.TC(t, append([]string{"filter", "del"}, filter...)...) }
	}
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { l.Close() })
	info, err := l.Info()
	qt.Assert(t, qt.IsNil(err))
	return uint32(info.ID), func() { qt.Assert(t, qt.IsNil(l.Close())) }
}

// side is ingress or egress.
func (p *place) side() string { return filepath.Base(string(p.hook)) }

// What others attached keeps its place, is shown for what it is, and is not touched.
func checkBeside(t *testing.T, p *place) {
	kind := hook.KindForeign
	if p.hook.Family() == "tc" {
		kind = hook.KindLegacy
	}
	one := p.join(t, 1, dispatcher.Options{Settings: priority(10)})
	p.join(t, 2, dispatcher.Options{Settings: priority(30)})
	firstID, firstLeaves := p.outsider(t, 8, "")
	secondID, secondLeaves := p.outsider(t, 9, "one")
	p.wantRun(t, 8, 1, 9, 2)
	wantEntries := func(want string) { // who runs, with a star for those that are not members
		t.Helper()
		var got []string
		for _, m := range p.read(t).Members {
			entry := strings.TrimPrefix(m.Program.Name, "ldt_trace_")
			if m.Kind == kind {
				entry += "*"
			}
			got = append(got, entry)
		}
		qt.Assert(t, qt.Equals(strings.Join(got, " "), want))
	}
	wantEntries("8* 1 9* 2")

	// Newcomers go by the members, whoever is in between.
	p.join(t, 3, dispatcher.Options{Settings: priority(20)})
	p.wantRun(t, 8, 1, 3, 9, 2)
	p.join(t, 4, dispatcher.Options{Settings: priority(5)})
	p.wantRun(t, 8, 4, 1, 3, 9, 2)
	p.join(t, 5, dispatcher.Options{Settings: priority(90)})
	p.wantRun(t, 8, 4, 1, 3, 9, 2, 5)
	qt.Assert(t, qt.IsNil(one.Set(t.Context(), priority(95))))
	p.wantRun(t, 8, 4, 3, 9, 2, 5, 1)
	wantEntries("8* 4 3 9* 2 5 1")

	c := p.read(t)
	for i, id := range map[int]uint32{0: firstID, 3: secondID} {
		m := c.Members[i]
		qt.Check(t, qt.Equals(m.LinkID, id))
		qt.Check(t, qt.Equals(m.Kind, kind))
		qt.Check(t, qt.Equals(m.Protected(), id != 0))
		qt.Check(t, qt.Equals(m.Priority, 0))
		qt.Check(t, qt.Equals(m.Owner, ""))
		qt.Check(t, qt.IsFalse(m.Persistent))

		ref := string(hook.ProgramRef(m.Program.ID))
		err := dispatcher.Detach(t.Context(), p.target, ref, p.leave())
		qt.Check(t, qt.ErrorIs(err, dispatcher.ErrBusy))
		var e *dispatcher.Error
		qt.Assert(t, qt.ErrorAs(err, &e))
		qt.Assert(t, qt.IsNotNil(e.Occupant))
		qt.Check(t, qt.Equals(*e.Occupant, hook.Occupant{Kind: kind, Program: m.Program, LinkID: id}))
		_, err = dispatcher.Open(t.Context(), p.target, m.Name, p.look())
		qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist)) // it is no member, whatever it is called
	}
	p.clear(t)
	p.wantRun(t, 8, 9)
	qt.Check(t, qt.IsFalse(p.read(t).Ours()))
	qt.Check(t, qt.ErrorIs(dispatcher.DetachAll(t.Context(), p.target, p.leave()), dispatcher.ErrBusy))
	p.join(t, 6, dispatcher.Options{Position: hook.Position{First: true}, Settings: priority(1)})
	p.join(t, 7, dispatcher.Options{})
	p.wantRun(t, 6, 7, 8, 9)

	secondLeaves()
	p.wantRunSoon(t, 6, 7, 8)
	o := p.leave()
	o.Force = true
	qt.Assert(t, qt.IsNil(dispatcher.Detach(t.Context(), p.target, string(hook.ProgramRef(c.Members[0].Program.ID)), o)))
	p.wantRunning(t, 6, 7)
	if p.hook.Family() != "tc" {
		firstLeaves() // what it held is defunct
	}
}

// The preferences of filters are numbers, and between two neighbours there is none.
func checkNoRoom(t *testing.T, p *place) {
	one := p.join(t, 1, dispatcher.Options{Settings: priority(1)})
	p.join(t, 2, dispatcher.Options{Position: hook.Position{First: true}}) // with the same preference
	p.join(t, 3, dispatcher.Options{Settings: priority(65535)})
	p.wantRunning(t, 2, 1, 3)
	before := p.read(t)
	for _, to := range []hook.Position{{After: "two"}, {Last: true}} {
		_, err := p.tryJoin(t, 4, dispatcher.Options{Position: to})
		qt.Check(t, qt.ErrorIs(err, dispatcher.ErrBusy), qt.Commentf("%+v", to))
	}
	qt.Check(t, qt.ErrorIs(one.Move(t.Context(), hook.Position{Last: true}), dispatcher.ErrBusy))
	qt.Check(t, qt.DeepEquals(p.read(t), before))
	p.clear(t)

	// A preference that somebody else uses is not shared: "tc filter del pref" takes all of it.
	filter := []string{"dev", p.ServerDev, p.side(), "pref", "1"}
	p.Server.TC(t, append(append([]string{"filter", "add"}, filter...), "bpf", "da", "pinned", p.pinned(t, p.tracer(t, 8)))...)
	_, err := p.tryJoin(t, 1, dispatcher.Options{Position: hook.Position{First: true}})
	p.Server.TC(t, append([]string{"filter", "del"}, filter...)...)
	if err == nil {
		p.wantRunning(t, 1)
	} else {
		qt.Check(t, qt.ErrorIs(err, dispatcher.ErrBusy))
	}
}

// The list of everything says the same as a look at the one.
func checkList(t *testing.T, p *place) {
	p.join(t, 1, dispatcher.Options{})
	p.join(t, 2, dispatcher.Options{Persistent: true, Settings: priority(7)})
	want := p.read(t)
	mine := func(o dispatcher.ListOptions) (found []hook.Chain) {
		t.Helper()
		o.BPFFS = p.bpffs
		list, err := dispatcher.List(t.Context(), o)
		qt.Assert(t, qt.IsNil(err))
		for _, c := range list {
			if c.Hook == p.hook && c.CgroupID == want.CgroupID && c.Ifindex == want.Ifindex && c.NetNS.Cookie == want.NetNS.Cookie {
				c.NetNS.Name = want.NetNS.Name
				found = append(found, c)
			}
			qt.Check(t, qt.IsTrue(o.NetNS == "" || !c.Hook.OnCgroup()))
			qt.Check(t, qt.IsTrue(o.Hooks == nil || c.Hook == o.Hooks[0]))
		}
		return found
	}
	qt.Check(t, qt.DeepEquals(mine(dispatcher.ListOptions{}), []hook.Chain{*want}))
	qt.Check(t, qt.DeepEquals(mine(dispatcher.ListOptions{Hooks: []hook.Hook{p.hook}}), []hook.Chain{*want}))
	if p.cgroup == nil {
		qt.Check(t, qt.DeepEquals(mine(dispatcher.ListOptions{NetNS: p.Server.Name}), []hook.Chain{*want}))
	}
	p.clear(t)
	soon(t, func() bool { return len(p.read(t).Members) == 0 })
	qt.Check(t, qt.HasLen(mine(dispatcher.ListOptions{}), 0))
}

// What is asked for wrongly is refused, with the reason, and has changed nothing.
func checkRefuse(t *testing.T, p *place) {
	prog := p.tracer(t, 1)
	one, err := p.tryAttach(t, prog, dispatcher.Options{Name: "one", Settings: priority(10)})
	qt.Assert(t, qt.IsNil(err))
	before, other := p.read(t), p.tracer(t, 2)
	refused := func(what string, cause error, target dispatcher.Target, o dispatcher.Options) {
		t.Helper()
		o.BPFFS, o.Persistent = p.bpffs, true
		_, err := dispatcher.Attach(t.Context(), target, dispatcher.Program(other), o)
		qt.Check(t, qt.ErrorIs(err, cause), qt.Commentf("attach %s", what))
		_, err = dispatcher.Plan(t.Context(), target, dispatcher.Program(other), o)
		qt.Check(t, qt.ErrorIs(err, cause), qt.Commentf("plan %s", what))
	}
	refused("a name that is taken", fs.ErrExist, p.target, dispatcher.Options{Name: "one"})
	for _, name := range []string{"a b", "-x", "link:3", "id:4", "a\x00", "\xff", strings.Repeat("x", 64)} {
		refused(fmt.Sprintf("as %q", name), dispatcher.ErrUsage, p.target, dispatcher.Options{Name: name})
		refused(fmt.Sprintf("of %q", name), dispatcher.ErrUsage, p.target, dispatcher.Options{Owner: name})
	}
	for _, prio := range []int{-1, 65536} {
		refused(fmt.Sprint(prio), dispatcher.ErrUsage, p.target, dispatcher.Options{Settings: priority(prio)})
		qt.Check(t, qt.ErrorIs(one.Set(t.Context(), priority(prio)), dispatcher.ErrUsage))
	}
	if p.hook != hook.XDP { // which alone has all this
		refused("in a mode", dispatcher.ErrUsage, p.target, dispatcher.Options{Mode: hook.ModeNative})
		for _, s := range []hook.Settings{{ContinueOn: hook.SetOf(hook.Pass)}, {OnMissing: hook.MissingContinue}} {
			refused(fmt.Sprintf("with %+v", s), dispatcher.ErrUsage, p.target, dispatcher.Options{Settings: s})
			qt.Check(t, qt.ErrorIs(one.Set(t.Context(), s), dispatcher.ErrUsage))
		}
	}
	for path, cause := range p.wrongTargets(t) {
		refused(fmt.Sprintf("to %+v", path), cause, path, dispatcher.Options{})
		_, err := dispatcher.Read(t.Context(), path, p.look())
		qt.Check(t, qt.ErrorIs(err, cause), qt.Commentf("read %+v", path))
		_, err = dispatcher.Open(t.Context(), path, "one", p.look())
		qt.Check(t, qt.ErrorIs(err, cause), qt.Commentf("open at %+v", path))
		qt.Check(t, qt.ErrorIs(dispatcher.Detach(t.Context(), path, "one", p.leave()), cause), qt.Commentf("detach at %+v", path))
		qt.Check(t, qt.ErrorIs(dispatcher.DetachAll(t.Context(), path, p.leave()), cause), qt.Commentf("detach all at %+v", path))
	}
	for ref, cause := range map[string]error{"nosuch": fs.ErrNotExist, "": fs.ErrNotExist, "link:x": dispatcher.ErrUsage, "id:0": dispatcher.ErrUsage} {
		_, err := dispatcher.Open(t.Context(), p.target, ref, p.look())
		qt.Check(t, qt.ErrorIs(err, cause), qt.Commentf("open %q", ref))
		qt.Check(t, qt.ErrorIs(dispatcher.Detach(t.Context(), p.target, ref, p.leave()), cause), qt.Commentf("detach %q", ref))
	}
	_, err = dispatcher.Attach(t.Context(), p.target, dispatcher.Source{}, dispatcher.Options{BPFFS: p.bpffs, Persistent: true})
	qt.Check(t, qt.ErrorIs(err, dispatcher.ErrUsage))
	qt.Check(t, qt.ErrorIs(one.Update(t.Context(), dispatcher.Source{}), dispatcher.ErrUsage))

	// TCX takes a program once; elsewhere it may run twice.
	_, err = p.tryAttach(t, prog, dispatcher.Options{Name: "twin"})
	if p.hook.Family() != "tcx" {
		qt.Assert(t, qt.IsNil(err))
		p.wantRun(t, 1, 1)
		p.detach(t, "twin")
	} else {
		qt.Check(t, qt.ErrorIs(err, fs.ErrExist))
		two, err := p.tryAttach(t, other, dispatcher.Options{Name: "two"})
		qt.Assert(t, qt.IsNil(err))
		qt.Check(t, qt.ErrorIs(two.Update(t.Context(), dispatcher.Program(prog)), fs.ErrExist))
		p.wantRunning(t, 1, 2)
		qt.Assert(t, qt.IsNil(two.Detach(t.Context())))
	}
	after := p.read(t)
	after.Revision, after.DispatcherID = before.Revision, before.DispatcherID
	qt.Check(t, qt.DeepEquals(after, before))
	p.wantRunning(t, 1)
}

// wrongTargets are places that are none.
func (p *place) wrongTargets(t testing.TB) map[dispatcher.Target]error {
	t.Helper()
	if p.cgroup == nil {
		return map[dispatcher.Target]error{
			dispatcher.On(p.hook, "nosuch").In(p.Server.Name):  fs.ErrNotExist,
			dispatcher.On(p.hook, "").In(p.Server.Name):        dispatcher.ErrUsage,
			dispatcher.On(p.hook, p.ServerDev).In("nosuch"):    fs.ErrNotExist,
			dispatcher.On(p.hook, p.ServerDev).In("/dev/null"): dispatcher.ErrUsage,
		}
	}
	return map[dispatcher.Target]error{
		dispatcher.On(p.hook, p.cgroup.Path+"/nosuch"):       fs.ErrNotExist,
		dispatcher.On(p.hook, "/nosuch"):                     fs.ErrNotExist,
		dispatcher.On(p.hook, ""):                            dispatcher.ErrUsage,
		dispatcher.On(p.hook, t.TempDir()):                   dispatcher.ErrUsage,
		dispatcher.On(p.hook, p.cgroup.Path+"/cgroup.procs"): dispatcher.ErrUsage,
		p.target.In(p.aside.Name):                            dispatcher.ErrUsage,
		p.target.In("nosuch"):                                dispatcher.ErrUsage,
	}
}

// Who gives up has changed nothing.
func checkCancel(t *testing.T, p *place) {
	one := p.join(t, 1, dispatcher.Options{})
	p.join(t, 2, dispatcher.Options{})
	before := p.read(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	next := dispatcher.Program(p.tracer(t, 3))
	for what, err := range map[string]error{
		"read":       second(dispatcher.Read(ctx, p.target, p.look())),
		"open":       second(dispatcher.Open(ctx, p.target, "one", p.look())),
		"list":       second(dispatcher.List(ctx, dispatcher.ListOptions{BPFFS: p.bpffs})),
		"info":       second(one.Info(ctx)),
		"chain":      second(one.Chain(ctx)),
		"attach":     second(dispatcher.Attach(ctx, p.target, next, dispatcher.Options{Name: "three", BPFFS: p.bpffs, Persistent: true})),
		"plan":       second(dispatcher.Plan(ctx, p.target, next, dispatcher.Options{Name: "three", BPFFS: p.bpffs, Persistent: true})),
		"update":     one.Update(ctx, next),
		"set":        one.Set(ctx, priority(70)),
		"move":       one.Move(ctx, hook.Position{Last: true}),
		"pin":        one.Pin(ctx),
		"link":       one.Detach(ctx),
		"detach":     dispatcher.Detach(ctx, p.target, "one", p.leave()),
		"detach all": dispatcher.DetachAll(ctx, p.target, p.leave()),
	} {
		qt.Check(t, qt.ErrorIs(err, context.Canceled), qt.Commentf("%s", what))
	}
	qt.Check(t, qt.DeepEquals(p.read(t), before))
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
		"set":     one.Set(ctx, priority(7)),
		"move":    one.Move(ctx, hook.Position{First: true}),
		"pin":     one.Pin(ctx),
		"detach":  one.Detach(ctx),
		"info":    second(one.Info(ctx)),
		"chain":   second(one.Chain(ctx)),
		"program": second(one.Program()),
	} {
		qt.Check(t, qt.ErrorIs(err, fs.ErrClosed), qt.Commentf("%s", what))
	}
	p.wantRunning(t, 1)
}

// A hook that is full says so, and has room again when somebody leaves.
func checkFull(t *testing.T, p *place) {
	var room int
	switch p.hook.Family() {
	case "xdp":
		room = hook.MaxMembers
	case "tcx":
		room = 63 // BPF_MPROG_MAX
	case "cgroup":
		room = 64 // BPF_CGROUP_MAX_PROGS
	}
	one := p.join(t, 1, dispatcher.Options{Settings: priority(1)})
	var last *dispatcher.Link
	for n := 2; n <= room; n++ {
		prog := testenv.VerdictProgram(t, "ldt_filler", p.verdict(goesOn), testenv.On(p.hook))
		link, err := p.tryAttach(t, prog, dispatcher.Options{Name: fmt.Sprintf("filler-%d", n)})
		qt.Assert(t, qt.IsNil(err), qt.Commentf("%d", n))
		last = link
	}
	before := p.read(t)
	qt.Assert(t, qt.HasLen(before.Members, room))
	_, err := p.tryJoin(t, 2, dispatcher.Options{})
	qt.Check(t, qt.ErrorIs(err, dispatcher.ErrChainFull))
	qt.Check(t, qt.DeepEquals(p.read(t), before))

	// Where the kernel moves no links, there must be room for another one meanwhile.
	err = one.Move(t.Context(), hook.Position{Last: true})
	if p.hook == hook.XDP {
		qt.Check(t, qt.IsNil(err))
	} else {
		qt.Check(t, qt.ErrorIs(err, dispatcher.ErrChainFull))
		qt.Check(t, qt.Equals(summary(p.read(t)), summary(before)))
	}
	p.wantRun(t, 1)
	qt.Assert(t, qt.IsNil(last.Detach(t.Context())))
	p.join(t, 2, dispatcher.Options{Settings: priority(65535)})
	p.wantRun(t, 1, 2)
}

// A program that is on a cgroup for itself alone leaves no room, there and below. It says who it is.
func checkExclusive(t *testing.T, p *place) {
	below := p.cgroup.Child(t, "below")
	for flags, where := range map[uint32][]string{
		0:                         {p.cgroup.Path, below.Path},
		unix.BPF_F_ALLOW_OVERRIDE: {p.cgroup.Path},
	} {
		legacy := p.tracer(t, 8)
		leave := p.attachBare(t, legacy, flags)
		for _, path := range where {
			before, err := dispatcher.Read(t.Context(), dispatcher.On(p.hook, path), p.look())
			qt.Assert(t, qt.IsNil(err))
			_, err = dispatcher.Attach(t.Context(), dispatcher.On(p.hook, path), dispatcher.Program(p.tracer(t, 1)),
				dispatcher.Options{Name: "one", BPFFS: p.bpffs, Persistent: true})
			qt.Check(t, qt.ErrorIs(err, dispatcher.ErrBusy), qt.Commentf("flags %d, %s", flags, path))
			var e *dispatcher.Error
			qt.Assert(t, qt.ErrorAs(err, &e))
			qt.Assert(t, qt.IsNotNil(e.Occupant))
			qt.Check(t, qt.Equals(e.Occupant.Kind, hook.KindLegacy))
			qt.Check(t, qt.Equals(e.Occupant.Program.ID, uint32(idOf(t, legacy))))
			after, err := dispatcher.Read(t.Context(), dispatcher.On(p.hook, path), p.look())
			qt.Assert(t, qt.IsNil(err))
			qt.Check(t, qt.DeepEquals(after, before))
		}
		p.wantRun(t, 8)
		qt.Check(t, qt.Equals(p.read(t).Members[0].Detail, map[uint32]string{0: "exclusive", unix.BPF_F_ALLOW_OVERRIDE: "allow-override"}[flags]))
		qt.Check(t, qt.HasLen(p.pinPaths(t), 0))
		leave()
	}
	p.join(t, 1, dispatcher.Options{})
	p.wantRunning(t, 1)
}

// attachBare attaches a program without a link.
func (p *place) attachBare(t testing.TB, prog *ebpf.Program, flags uint32) (leave func()) {
	t.Helper()
	qt.Assert(t, qt.IsNil(p.tryBare(t, prog, flags)))
	return func() { qt.Assert(t, qt.IsNil(p.tryLeave(t, prog))) }
}

// tryBare and tryLeave are BPF_PROG_ATTACH and BPF_PROG_DETACH.
func (p *place) tryBare(t testing.TB, prog *ebpf.Program, flags uint32) error {
	t.Helper()
	return p.onTarget(t, func(target int) error {
		return link.RawAttachProgram(link.RawAttachProgramOptions{Target: target, Program: prog, Attach: testenv.AttachType(p.hook), Flags: flags})
	})
}

func (p *place) tryLeave(t testing.TB, prog *ebpf.Program) error {
	t.Helper()
	return p.onTarget(t, func(target int) error {
		return link.RawDetachProgram(link.RawDetachProgramOptions{Target: target, Program: prog, Attach: testenv.AttachType(p.hook)})
	})
}

func (p *place) onTarget(t testing.TB, fn func(target int) error) error {
	t.Helper()
	if p.cgroup == nil {
		return p.Server.Run(func() error { return fn(p.ServerIfindex) })
	}
	folder, err := os.Open(p.cgroup.Path)
	qt.Assert(t, qt.IsNil(err))
	defer folder.Close()
	return fn(int(folder.Fd()))
}

// A link cannot be moved, and a new one leaves with who made it: so a member that another process holds is
// moved by that process only, or when it is pinned.
func checkHeldElsewhere(t *testing.T, p *place) {
	owner := p.attachIn(t, p.tracer(t, 1), dispatcher.Options{Name: "one", Settings: priority(10)})
	p.join(t, 2, dispatcher.Options{Settings: priority(30)})
	one := p.reopen(t, "one")
	before := p.read(t)
	qt.Check(t, qt.ErrorIs(one.Set(t.Context(), priority(40)), dispatcher.ErrBusy))
	qt.Check(t, qt.ErrorIs(one.Move(t.Context(), hook.Position{Last: true}), dispatcher.ErrBusy))
	qt.Check(t, qt.DeepEquals(p.read(t), before))
	p.wantRunning(t, 1, 2)
	qt.Assert(t, qt.IsNil(one.Set(t.Context(), priority(20)))) // where it is
	qt.Check(t, qt.Equals(p.read(t).Member("one").Priority, 20))

	// The owner moves it, and who opened it follows.
	qt.Assert(t, qt.IsNil(owner.do(t, command{Op: "set", Settings: priority(40)})))
	p.wantRunning(t, 2, 1)
	info, err := one.Info(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.DeepEquals(info, p.read(t).Member("one")))
	qt.Assert(t, qt.IsNil(owner.do(t, command{Op: "set", Settings: priority(15)})))
	qt.Assert(t, qt.IsNil(one.Update(t.Context(), dispatcher.Program(p.tracer(t, 3)))))
	p.wantRun(t, 3, 2)

	// Pinned, it is moved by anybody, and its owner follows.
	qt.Assert(t, qt.IsNil(one.Pin(t.Context())))
	qt.Assert(t, qt.IsNil(one.Set(t.Context(), priority(60))))
	p.wantRun(t, 2, 3)
	qt.Assert(t, qt.IsNil(owner.do(t, command{Op: "update", Program: idOf(t, p.tracer(t, 4))})))
	p.wantRun(t, 2, 4)
	qt.Assert(t, qt.IsNil(owner.do(t, command{Op: "unpin"})))
	qt.Check(t, qt.HasLen(p.pinPaths(t), 0))
	qt.Assert(t, qt.IsNil(one.Close()))
	p.wantRun(t, 2, 4)
	owner.Kill()
	p.wantRunSoon(t, 2)
}

// What runs for a cgroup is attached to those above it, too: the order is the one in which they do run.
func checkInherited(t *testing.T, p *place) {
	from := map[int]*testenv.Cgroup{1: p.cgroup, 2: p.above, 3: p.cgroup, 4: p.above}
	var above []*dispatcher.Link
	for n, cg := range from {
		link, err := dispatcher.Attach(t.Context(), dispatcher.On(p.hook, cg.Path), dispatcher.Program(p.tracer(t, n)),
			dispatcher.Options{Name: numbers[n], BPFFS: p.bpffs, Settings: priority(10 * n)})
		qt.Assert(t, qt.IsNil(err))
		p.keep(t, link)
		if cg == p.above {
			above = append(above, link)
		}
	}
	c, err := dispatcher.Effective(t.Context(), p.target, p.look())
	qt.Assert(t, qt.IsNil(err))
	var order []int
	for _, m := range c.Members {
		n := slices.Index(numbers, m.Name)
		qt.Assert(t, qt.IsNotNil(from[n]), qt.Commentf("%s", m.Name))
		qt.Check(t, qt.Equals(m.From, from[n].Path))
		qt.Check(t, qt.Equals(m.Priority, 10*n))
		order = append(order, n)
	}
	qt.Check(t, qt.HasLen(order, len(from)))
	p.wantRun(t, order...)
	p.clear(t)
	p.wantRunSoon(t, 2, 4)
	qt.Check(t, qt.HasLen(p.read(t).Members, 0))
	for _, link := range above {
		qt.Check(t, qt.IsNil(link.Detach(t.Context())))
	}
}

// An owner learns that its member has been taken out, and can do nothing any more but close it.
func checkTakenOut(t *testing.T, p *place) {
	one := p.join(t, 1, dispatcher.Options{})
	two := p.join(t, 2, dispatcher.Options{Persistent: true})
	p.join(t, 3, dispatcher.Options{})
	qt.Assert(t, qt.IsNil(newApp(t).do(t, p.command(command{Op: "detach", Member: "one"}))))
	qt.Assert(t, qt.IsNil(newApp(t).do(t, p.command(command{Op: "detach", Member: "two"}))))
	p.wantRunning(t, 3)
	for _, link := range []*dispatcher.Link{one, two} {
		ctx := t.Context()
		for name, err := range map[string]error{
			"update": link.Update(ctx, dispatcher.Program(p.tracer(t, 9))),
			"set":    link.Set(ctx, priority(7)),
			"move":   link.Move(ctx, hook.Position{First: true}),
			"pin":    link.Pin(ctx),
			"info":   second(link.Info(ctx)),
		} {
			qt.Check(t, qt.IsTrue(errors.Is(err, fs.ErrNotExist) || errors.Is(err, dispatcher.ErrDefunct)), qt.Commentf("%s: %v", name, err))
		}
		qt.Check(t, qt.IsNil(link.Detach(ctx))) // already gone is no error
		qt.Check(t, qt.IsNil(link.Close()))
	}
	qt.Check(t, qt.HasLen(p.pinPaths(t), 0))
	p.wantRunning(t, 3)
}

// Another device or cgroup with the same name is another one: who held members there holds none here.
func checkReplaced(t *testing.T, p *place) {
	one := p.join(t, 1, dispatcher.Options{})
	two := p.join(t, 2, dispatcher.Options{Persistent: true})
	p.replace(t)
	qt.Check(t, qt.HasLen(p.read(t).Members, 0))
	p.wantDefunct(t, one, two)
	_, err := dispatcher.Open(t.Context(), p.target, "one", p.look())
	qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))

	again := p.join(t, 1, dispatcher.Options{})
	p.join(t, 2, dispatcher.Options{Persistent: true})
	p.wantRunning(t, 1, 2)
	p.wantDefunct(t, one, two)
	qt.Check(t, qt.IsNil(one.Detach(t.Context())))
	qt.Check(t, qt.IsNil(two.Detach(t.Context())))
	qt.Check(t, qt.IsNil(one.Close()))
	p.wantRunning(t, 1, 2)
	qt.Assert(t, qt.IsNil(again.Detach(t.Context())))
	p.wantRunning(t, 2)
	p.clear(t)
	p.wantRunning(t)
}

// replace puts another device or cgroup of the same name in the place of the one that is there.
func (p *place) replace(t testing.TB) {
	t.Helper()
	if p.cgroup != nil {
		p.cgroup.Remove(t)
		p.enter(t)
		return
	}
	if p.hook.Family() == "tc" {
		p.ServerIfindex += 100 // where there is no link, the number is what tells one device from another
	}
	p.replaceDevice(t)
}

// The name of a device is not what a member is held by.
func checkRenamed(t *testing.T, p *place) {
	one, two := p.join(t, 1, dispatcher.Options{}), p.join(t, 2, dispatcher.Options{Persistent: true})
	old := p.target
	p.Server.IP(t, "link", "set", p.ServerDev, "down")
	p.Server.IP(t, "link", "set", p.ServerDev, "name", "renamed")
	p.target = dispatcher.On(p.hook, "renamed").In(p.Server.Name)
	p.wantSame(t, one, two, old)
}

// wantSame checks that two members, the second one pinned, go on at another place through their Links, and can be
// found and taken out there.
func (p *place) wantSame(t testing.TB, one, two *dispatcher.Link, old dispatcher.Target) {
	t.Helper()
	ctx := t.Context()
	_, err := dispatcher.Read(ctx, old, p.look())
	qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
	names := func() (names []string) {
		for _, m := range p.read(t).Members {
			names = append(names, m.Name)
		}
		return names
	}
	qt.Assert(t, qt.DeepEquals(names(), []string{"one", "two"}))
	qt.Check(t, qt.IsTrue(p.read(t).Member("two").Persistent))
	c, err := one.Chain(ctx)
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(summary(c), summary(p.read(t))))
	if p.target.NetNS == old.NetNS {
		qt.Check(t, qt.Equals(c.Target, p.target.Name()))
	}
	qt.Assert(t, qt.IsNil(one.Set(ctx, priority(60))))
	qt.Check(t, qt.DeepEquals(names(), []string{"two", "one"}))
	next := p.tracer(t, 3)
	qt.Assert(t, qt.IsNil(two.Update(ctx, dispatcher.Program(next))))
	qt.Check(t, qt.Equals(p.read(t).Member("two").Program.ID, uint32(idOf(t, next))))
	qt.Assert(t, qt.IsNil(two.Move(ctx, hook.Position{Last: true})))
	qt.Check(t, qt.DeepEquals(names(), []string{"one", "two"}))
	qt.Assert(t, qt.IsNil(one.Pin(ctx)))
	qt.Check(t, qt.IsTrue(p.read(t).Member("one").Persistent))
	info, err := p.reopen(t, "one").Info(ctx)
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.DeepEquals(info, p.read(t).Member("one")))
	p.detach(t, "two")
	qt.Check(t, qt.DeepEquals(names(), []string{"one"}))
	qt.Check(t, qt.IsNil(two.Detach(ctx)))
	qt.Assert(t, qt.IsNil(one.Detach(ctx)))
	qt.Check(t, qt.HasLen(p.read(t).Members, 0))
}

// A device takes its members along to another network namespace.
func checkMoved(t *testing.T, p *place) {
	one, two := p.join(t, 1, dispatcher.Options{}), p.join(t, 2, dispatcher.Options{Persistent: true})
	elsewhere, old := testenv.NewNetNS(t), p.target
	p.Server.IP(t, "link", "set", p.ServerDev, "netns", elsewhere.Name)
	p.target = dispatcher.On(p.hook, p.ServerDev).In(elsewhere.Name)
	p.wantSame(t, one, two, old)
}

// The kernel takes a device that leaves its namespace down for good (unregister_netdevice's notifiers), and its
// filters with it. Whoever wants members there attaches them again.
func checkLeftBehind(t *testing.T, p *place) {
	one, two := p.join(t, 1, dispatcher.Options{}), p.join(t, 2, dispatcher.Options{})
	elsewhere := testenv.NewNetNS(t)
	p.Server.IP(t, "link", "set", p.ServerDev, "netns", elsewhere.Name)
	p.target = p.target.In(elsewhere.Name)
	qt.Check(t, qt.HasLen(p.read(t).Members, 0))
	p.wantDefunct(t, one, two)
	p.join(t, 1, dispatcher.Options{})
	p.wantDefunct(t, one, two)
	qt.Check(t, qt.IsNil(one.Detach(t.Context())))
	p.wantChain(t, "one*")
}

// One end of a wire takes the other along.
func checkPeerGone(t *testing.T, p *place) {
	one, two := p.join(t, 1, dispatcher.Options{}), p.join(t, 2, dispatcher.Options{Persistent: true})
	p.Client.IP(t, "link", "delete", p.ClientDev)
	p.wantDefunct(t, one, two)
	qt.Check(t, qt.IsNil(two.Detach(t.Context())))
	qt.Check(t, qt.IsNil(one.Detach(t.Context())))
}

// A container ends: its namespace and its devices go, whoever holds members there.
func checkNetNSGone(t *testing.T, p *place) {
	one, two := p.join(t, 1, dispatcher.Options{}), p.join(t, 2, dispatcher.Options{Persistent: true})
	qt.Assert(t, qt.IsNil(p.Server.Delete()))
	soon(t, func() bool { // its end of the wire goes, and the other with it
		_, err := p.Client.TryIP("link", "show", p.ClientDev)
		return err != nil
	})
	p.wantDefunct(t, one, two)
	_, err := dispatcher.Read(t.Context(), p.target, p.look())
	qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
	qt.Check(t, qt.IsNil(two.Detach(t.Context())))
	qt.Check(t, qt.IsNil(one.Detach(t.Context())))
}

// The old ways to attach work as ever where nothing is owned, and next to members; they take none away.
func checkLegacy(t *testing.T, p *place) {
	map[string]func(*testing.T, *place){
		"xdp": legacyXDP, "tcx": legacyTCX, "tc": legacyTC, "cgroup": legacyCgroup,
	}[p.hook.Family()](t, p)
}

// See netlink_test.go for all that netlink can do to XDP.
func legacyXDP(t *testing.T, p *place) {
	other := p.pinned(t, p.tracer(t, 8))
	use := func() {
		p.Server.IP(t, "link", "set", "dev", p.ServerDev, "xdp", "pinned", other)
		p.wantRun(t, 8)
		p.Server.IP(t, "link", "set", "dev", p.ServerDev, "xdp", "off")
		p.wantRun(t)
	}
	use()
	one := p.join(t, 1, dispatcher.Options{})
	for _, command := range []string{"pinned " + other, "off"} {
		_, err := p.Server.TryIP(strings.Fields("link set dev " + p.ServerDev + " xdp " + command)...)
		qt.Check(t, qt.IsNotNil(err), qt.Commentf("%s", command))
		p.wantRunning(t, 1)
	}
	qt.Assert(t, qt.IsNil(one.Detach(t.Context())))
	use()
}

// tc works a qdisc, behind all of TCX.
func (p *place) useTC(t testing.TB, pref string, numbers ...int) {
	t.Helper()
	filter := []string{"dev", p.ServerDev, p.side(), "pref", pref, "handle", "7", "bpf", "da", "pinned"}
	p.Server.TC(t, append(append([]string{"filter", "add"}, filter...), p.pinned(t, p.tracer(t, 6)))...)
	p.wantRun(t, append(slices.Clone(numbers), 6)...)
	p.Server.TC(t, append(append([]string{"filter", "replace"}, filter...), p.pinned(t, p.tracer(t, 7)))...)
	p.wantRun(t, append(slices.Clone(numbers), 7)...)
	p.Server.TC(t, "filter", "del", "dev", p.ServerDev, p.side(), "pref", pref)
	for _, number := range []string{"6", "7"} {
		qt.Assert(t, qt.IsNil(os.Remove(filepath.Join(p.bpffs, "ldt_trace_"+number))))
	}
	p.wantRun(t, numbers...)
}

func legacyTCX(t *testing.T, p *place) {
	bare := p.tracer(t, 8)
	use := func(numbers ...int) {
		t.Helper()
		leave := p.attachBare(t, bare, 0)
		p.wantRun(t, append(slices.Clone(numbers), 8)...)
		p.Server.TC(t, "qdisc", "add", "dev", p.ServerDev, "clsact")
		p.useTC(t, "49152", append(slices.Clone(numbers), 8)...)
		p.Server.TC(t, "qdisc", "del", "dev", p.ServerDev, "clsact")
		p.wantRun(t, append(slices.Clone(numbers), 8)...)
		leave()
		p.wantRun(t, numbers...)
	}
	use()
	own := p.tracer(t, 1)
	one, err := p.tryAttach(t, own, dispatcher.Options{Name: "one"})
	qt.Assert(t, qt.IsNil(err))
	p.join(t, 2, dispatcher.Options{Persistent: true})
	use(1, 2)
	qt.Check(t, qt.ErrorIs(p.tryLeave(t, own), unix.EBUSY))
	qt.Check(t, qt.ErrorIs(p.tryReplace(t, bare, own), unix.EBUSY))
	p.wantRunning(t, 1, 2)
	qt.Assert(t, qt.IsNil(one.Detach(t.Context())))
	p.clear(t)
	use()
}

// Nobody owns a filter: tc leaves alone what it is not told to remove, and no more.
func legacyTC(t *testing.T, p *place) {
	p.Server.TC(t, "qdisc", "add", "dev", p.ServerDev, "clsact")
	p.useTC(t, "49152")
	one := p.join(t, 1, dispatcher.Options{})
	p.join(t, 2, dispatcher.Options{})
	p.useTC(t, "49152", 1, 2)
	p.Server.TC(t, "qdisc", "replace", "dev", p.ServerDev, "clsact")
	p.wantRunning(t, 1, 2)
	p.Server.TC(t, "filter", "del", "dev", p.ServerDev, p.side(), "pref", fmt.Sprint(p.read(t).Member("two").Filter.Pref))
	p.wantRunning(t, 1)
	p.Server.TC(t, "qdisc", "del", "dev", p.ServerDev, "clsact")
	p.wantRunning(t)
	qt.Check(t, qt.ErrorIs(one.Set(t.Context(), priority(7)), fs.ErrNotExist))
	p.join(t, 1, dispatcher.Options{})
	p.wantRunning(t, 1)
}

func legacyCgroup(t *testing.T, p *place) {
	const exclusive, override, multi = 0, unix.BPF_F_ALLOW_OVERRIDE, unix.BPF_F_ALLOW_MULTI
	bare := p.tracer(t, 8)
	use := func(flags uint32, numbers ...int) {
		t.Helper()
		leave := p.attachBare(t, bare, flags)
		p.wantRun(t, append(slices.Clone(numbers), 8)...)
		leave()
		p.wantRun(t, numbers...)
	}
	for _, flags := range []uint32{exclusive, override, multi} {
		use(flags)
	}
	own := p.tracer(t, 1)
	one, err := p.tryAttach(t, own, dispatcher.Options{Name: "one"})
	qt.Assert(t, qt.IsNil(err))
	p.join(t, 2, dispatcher.Options{Persistent: true})
	use(multi, 1, 2)
	for _, flags := range []uint32{exclusive, override} {
		qt.Check(t, qt.ErrorIs(p.tryBare(t, bare, flags), unix.EPERM))
	}
	qt.Check(t, qt.ErrorIs(p.tryLeave(t, own), unix.ENOENT))
	qt.Check(t, qt.ErrorIs(p.tryReplace(t, bare, own), unix.ENOENT))
	p.wantRunning(t, 1, 2)

	// One that shares the cgroup leaves room for members.
	leave := p.attachBare(t, bare, multi)
	p.join(t, 3, dispatcher.Options{})
	p.wantRun(t, 1, 2, 3, 8)
	m := p.read(t).Members[3]
	qt.Check(t, qt.Equals(m.Kind, hook.KindLegacy))
	qt.Check(t, qt.Equals(m.Detail, "allow-multi"))
	qt.Check(t, qt.IsFalse(m.Protected()))
	qt.Check(t, qt.IsFalse(p.read(t).Protected()))
	leave()
	qt.Assert(t, qt.IsNil(one.Detach(t.Context())))
	p.clear(t)
	p.wantRunning(t)
	for _, flags := range []uint32{exclusive, override, multi} {
		use(flags)
	}
}

// tryReplace is BPF_PROG_ATTACH with BPF_F_REPLACE.
func (p *place) tryReplace(t testing.TB, prog, old *ebpf.Program) error {
	t.Helper()
	return p.onTarget(t, func(target int) error {
		o := link.RawAttachProgramOptions{Target: target, Program: prog, Attach: testenv.AttachType(p.hook), Anchor: link.ReplaceProgram(old)}
		if p.cgroup != nil {
			o.Flags = unix.BPF_F_ALLOW_MULTI
		}
		return link.RawAttachProgram(o)
	})
}

// What TCX is for, mostly: a member that drops what nobody should see, and nothing else.
func TestContractDropsOnePort(t *testing.T) {
	for _, h := range []hook.Hook{hook.XDP, hook.TCXIngress, hook.TCXEgress, hook.TCIngress, hook.TCEgress} {
		t.Run(string(h), func(t *testing.T) {
			p := newPlace(t, h)
			passed := map[bool]func(testing.TB, int, int) int{true: p.Replied, false: p.Passed}[p.side() == "egress"]
			link, err := p.tryAttach(t, testenv.DropUDPPort(t, "ldt_drop", port, testenv.On(h)), dispatcher.Options{})
			qt.Assert(t, qt.IsNil(err))
			p.join(t, 1, dispatcher.Options{Settings: priority(1)})
			qt.Check(t, qt.Equals(passed(t, port, 10), 0))
			qt.Check(t, qt.DeepEquals(p.trace.Last(t), []int{1}))
			qt.Check(t, qt.Equals(passed(t, port+1, 10), 10))
			other := map[bool]func(testing.TB, int, int) int{false: p.Replied, true: p.Passed}[p.side() == "egress"]
			qt.Check(t, qt.Equals(other(t, port, 10), 10))
			qt.Assert(t, qt.IsNil(link.Detach(t.Context())))
			qt.Check(t, qt.Equals(passed(t, port, 10), 10))
			p.end(t, false)
		})
	}
}

// A proxy that clients do not know of: they ask for one address and reach another, for as long as the member is there.
func TestContractRedirectsConnections(t *testing.T) {
	for h, ip := range map[hook.Hook]netip.Addr{
		hook.CgroupConnect4: netip.AddrFrom4([4]byte{127, 0, 0, 1}), hook.CgroupConnect6: netip.IPv6Loopback(),
	} {
		t.Run(string(h), func(t *testing.T) {
			p := newPlace(t, h)
			asked, real := p.aside.Listen(t, netip.AddrPortFrom(ip, 0)), p.aside.Listen(t, netip.AddrPortFrom(ip, 0))
			reaches := func(want netip.AddrPort) {
				t.Helper()
				for _, network := range []string{"tcp", "udp"} {
					got, err := p.resident.Dial(t, network, asked)
					qt.Assert(t, qt.IsNil(err))
					qt.Check(t, qt.Equals(got, testenv.Reached{Peer: want, Answer: want}))
				}
			}
			reaches(asked)
			link, err := p.tryAttach(t, testenv.ConnectTo(t, "ldt_proxy", real), dispatcher.Options{})
			qt.Assert(t, qt.IsNil(err))
			reaches(real)
			qt.Assert(t, qt.IsNil(link.Close()))
			reaches(asked)
			p.end(t, false)
		})
	}
}

// A meter that bills by the datagram must not miss one, nor count one twice: also while it is moved and exchanged.
func TestContractCountsEveryDatagram(t *testing.T) {
	p := newPlace(t, hook.CgroupSKBEgress)
	program := func() (*ebpf.Program, func() int) {
		return testenv.CountProgram(t, "ldt_meter", port, testenv.CgroupAllow, testenv.On(p.hook))
	}
	meter, count := program()
	link, err := p.tryAttach(t, meter, dispatcher.Options{Settings: priority(10)})
	qt.Assert(t, qt.IsNil(err))
	p.join(t, 1, dispatcher.Options{Settings: priority(20)})
	to := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port)
	send := func(n int) {
		t.Helper()
		accepted, arrived := p.resident.Passed(t, p.aside, to, n)
		qt.Assert(t, qt.Equals(accepted, n))
		qt.Assert(t, qt.Equals(arrived, n))
	}
	send(17)
	qt.Check(t, qt.Equals(count(), 17))
	qt.Assert(t, qt.IsNil(link.Set(t.Context(), priority(30))))
	send(25)
	qt.Check(t, qt.Equals(count(), 42))

	next, countNext := program()
	qt.Assert(t, qt.IsNil(link.Update(t.Context(), dispatcher.Program(next))))
	send(8)
	qt.Check(t, qt.Equals(count(), 42))
	qt.Check(t, qt.Equals(countNext(), 8))
	p.end(t, false)
}

// A filter that lets packets through while it is exchanged for a better one is none.
func TestContractUpdateLeaksNothing(t *testing.T) {
	for _, h := range []hook.Hook{hook.TCXIngress, hook.TCIngress} {
		t.Run(string(h), func(t *testing.T) {
			testenv.CheckLeaksUnderLoad(t)
			p := newPlace(t, h)
			var progs [2]*ebpf.Program
			for i := range progs {
				progs[i] = testenv.DropUDPPort(t, fmt.Sprintf("ldt_drop_%d", i), port, testenv.On(h))
			}
			link, err := p.tryAttach(t, progs[0], dispatcher.Options{})
			qt.Assert(t, qt.IsNil(err))
			flood := p.Flood(t, port)
			soon(t, func() bool { return flood.Sent() > 1000 })
			for n := range 200 {
				qt.Assert(t, qt.IsNil(link.Update(t.Context(), dispatcher.Program(progs[(n+1)%2]))))
			}
			sent, received := flood.Stop()
			qt.Check(t, qt.Equals(received, 0), qt.Commentf("of %d", sent))
			p.end(t, false)
		})
	}
}

// A program that refuses is heeded on every hook where one may refuse.
func TestContractRefusesCalls(t *testing.T) {
	for _, h := range hook.CgroupHooks() {
		if !testenv.CanDeny(h) {
			continue // nor does the kernel load such a program
		}
		t.Run(string(h), func(t *testing.T) {
			p := newPlace(t, h)
			link, err := p.tryAttach(t, testenv.VerdictProgram(t, "ldt_deny", testenv.CgroupDeny, testenv.On(h)), dispatcher.Options{})
			qt.Assert(t, qt.IsNil(err))
			err = p.exercise(t)
			if want := testenv.Denied(h); want != nil {
				qt.Check(t, qt.ErrorIs(err, want))
			} else {
				qt.Check(t, qt.IsNil(err))
			}
			qt.Assert(t, qt.IsNil(link.Close()))
			qt.Check(t, qt.IsNil(p.exercise(t)))
			p.end(t, false)
		})
	}
}
