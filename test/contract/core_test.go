package contract

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// A program that was attached runs, and everybody can see what it is and which member it belongs to.
func checkAttach(t *testing.T, p *place) {
	p.wantRun(t)
	first := p.tracer(t, 1)
	one, err := p.tryAttach(t, first, dispatcher.Options{Name: "one", Owner: "me", Priority: 30})
	qt.Assert(t, qt.IsNil(err))
	p.wantRun(t, 1)
	second := p.tracer(t, 2)
	two, err := p.tryAttach(t, second, dispatcher.Options{Persistent: true})
	qt.Assert(t, qt.IsNil(err))
	p.wantRun(t, 1, 2)

	c := p.Read(t)
	qt.Check(t, qt.Equals(c.Hook, p.Target.Hook))
	qt.Check(t, qt.IsTrue(c.Ours()))
	qt.Check(t, qt.Equals(c.Protected(), p.Target.Hook.Family() != "tc"))
	if p.Cgroup != nil {
		qt.Check(t, qt.Equals(c.Target, p.Cgroup.Path))
		qt.Check(t, qt.Equals(c.CgroupID, p.Cgroup.ID))
		qt.Check(t, qt.Equals(c.NetNS, hook.NetNS{}))
	} else {
		qt.Check(t, qt.Equals(c.Target, p.ServerDev))
		qt.Check(t, qt.Equals(c.Ifindex, p.ServerIfindex))
		qt.Check(t, qt.Equals(c.NetNS.Cookie != 0, testenv.Has(t, testenv.FeatureNetNSCookie)))
	}
	want := []hook.Member{
		{Name: "one", Owner: "me", Settings: scene.Priority(30), Program: scene.ProgramOf(t, first)},
		{Name: "ldt_trace_2", Owner: filepath.Base(os.Args[0]), Settings: scene.Priority(hook.DefaultPriority), Persistent: true, Program: scene.ProgramOf(t, second)},
	}
	qt.Assert(t, qt.HasLen(c.Members, len(want)))
	for i, link := range []*dispatcher.Link{one, two} {
		m := c.Members[i]
		info, err := link.Info(t.Context())
		qt.Assert(t, qt.IsNil(err))
		qt.Check(t, qt.DeepEquals(info, &m))
		chain, err := link.Chain(t.Context())
		qt.Assert(t, qt.IsNil(err))
		chain.NetNS.Name = c.NetNS.Name
		qt.Check(t, qt.DeepEquals(chain, c))
		prog, err := link.Program(t.Context())
		qt.Assert(t, qt.IsNil(err))
		qt.Check(t, qt.Equals(uint32(scene.ID(t, prog)), m.Program.ID))
		prog.Close()

		qt.Check(t, qt.IsFalse(m.Program.LoadedAt.IsZero()))
		m.Program.LoadedAt = time.Time{}
		want[i].Kind, want[i].State, want[i].LinkID = hook.KindMember, hook.StateRunning, p.linkOf(t, &m)
		switch p.Target.Hook.Family() {
		case "xdp":
			want[i].Settings = want[i].Settings.WithDefaults()
			want[i].SlotID = m.SlotID
		case "tc":
			qt.Assert(t, qt.IsNotNil(m.Filter))
			want[i].Persistent, want[i].Filter, want[i].Detail = true, m.Filter, m.Detail
		}
		qt.Check(t, qt.DeepEquals(m, want[i]))
		qt.Check(t, qt.Equals(m.Protected(), want[i].LinkID != 0))
	}

	// By name, no matter which process attached it; and by its link.
	qt.Assert(t, qt.IsNil(dispatcher.Detach(t.Context(), p.Target, "one", p.Leave())))
	p.wantRun(t, 2)
	qt.Assert(t, qt.IsNil(two.Detach(t.Context())))
	p.wantRun(t)
	qt.Check(t, qt.HasLen(p.Read(t).Members, 0))
	qt.Check(t, qt.IsFalse(p.Read(t).Ours()))
}

// linkOf checks with the kernel where the link of a member is, and returns its id. 0 where members have none.
func (p *place) linkOf(t testing.TB, m *hook.Member) uint32 {
	t.Helper()
	if p.Target.Hook == hook.XDP || p.Target.Hook.Family() == "tc" {
		return 0
	}
	l, err := link.NewFromID(link.ID(m.LinkID))
	qt.Assert(t, qt.IsNil(err))
	defer l.Close()
	info, err := l.Info()
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(uint32(info.Program), m.Program.ID))
	if p.Cgroup != nil {
		qt.Check(t, qt.Equals(info.Cgroup().CgroupId, p.Cgroup.ID))
		qt.Check(t, qt.Equals(ebpf.AttachType(info.Cgroup().AttachType), testenv.AttachType(p.Target.Hook)))
	} else {
		qt.Check(t, qt.Equals(int(info.TCX().Ifindex), p.ServerIfindex))
		qt.Check(t, qt.Equals(ebpf.AttachType(info.TCX().AttachType), testenv.AttachType(p.Target.Hook)))
	}
	return m.LinkID
}

// Lower priorities run first, and of equals the one that came first.
func checkOrder(t *testing.T, p *place) {
	for number, prio := range []int{1: 50, 2: 10, 3: 50, 4: 20, 5: 0, 6: 65535, 7: 5} {
		if number > 0 {
			p.join(t, number, dispatcher.Options{Priority: prio})
		}
	}
	p.wantRunning(t, 7, 2, 4, 1, 3, 5, 6)
	p.Detach(t, "one")
	p.wantRunning(t, 7, 2, 4, 3, 5, 6)
	p.join(t, 8, dispatcher.Options{Position: hook.Position{First: true}})
	p.join(t, 9, dispatcher.Options{Position: hook.Position{Before: "six"}})
	p.wantRunning(t, 8, 7, 2, 4, 3, 5, 9, 6)
	qt.Check(t, qt.Equals(p.Read(t).Member("eight").Priority, 5))
	qt.Check(t, qt.Equals(p.Read(t).Member("nine").Priority, 50))
}

// The program of a member is exchanged in its place, and the old one is let go.
func checkUpdate(t *testing.T, p *place) {
	p.join(t, 1, dispatcher.Options{})
	old := p.tracer(t, 2)
	two, err := p.tryAttach(t, old, dispatcher.Options{Name: "two"})
	qt.Assert(t, qt.IsNil(err))
	p.join(t, 3, dispatcher.Options{})
	before := p.Read(t).Member("two")
	qt.Assert(t, qt.IsNil(two.Update(t.Context(), dispatcher.Program(p.tracer(t, 4)))))
	p.wantRun(t, 1, 4, 3)
	after := p.Read(t).Member("two")
	qt.Check(t, qt.Equals(after.LinkID, before.LinkID))
	qt.Check(t, qt.Equals(after.Settings, before.Settings))
	qt.Check(t, qt.Equals(after.Program.Name, "ldt_trace_4"))
	qt.Assert(t, qt.IsNil(old.Close()))
	scene.Soon(t, func() bool {
		prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(before.Program.ID))
		if err == nil {
			prog.Close()
		}
		return errors.Is(err, fs.ErrNotExist)
	})

	chain := p.Read(t)
	for what, prog := range p.misfits(t) {
		err := two.Update(t.Context(), dispatcher.Program(prog))
		qt.Check(t, qt.ErrorIs(err, dispatcher.ErrIncompatible), qt.Commentf("update to %s", what))
		_, err = p.tryAttach(t, prog, dispatcher.Options{Name: "misfit"})
		qt.Check(t, qt.ErrorIs(err, dispatcher.ErrIncompatible), qt.Commentf("attach %s", what))
	}
	qt.Check(t, qt.DeepEquals(p.Read(t), chain))
	p.wantRun(t, 1, 4, 3)
}

// misfits are programs that cannot be members.
func (p *place) misfits(t testing.TB) map[string]*ebpf.Program {
	t.Helper()
	other := hook.XDP
	if p.Target.Hook == hook.XDP {
		other = hook.TCIngress
	}
	progs := map[string]*ebpf.Program{
		"another type": testenv.VerdictProgram(t, "ldt_type", testenv.XDPPass, testenv.On(other)),
	}
	// Where the kernel has an attach type for each hook it is another hook's; it has none for the
	// programs of TC, and one only for devices, sysctls and TCP events.
	attach := map[hook.Hook]hook.Hook{
		hook.CgroupSockCreate: hook.CgroupSockRelease, hook.CgroupSockRelease: hook.CgroupSockCreate,
		hook.CgroupPostBind4: hook.CgroupPostBind6, hook.CgroupPostBind6: hook.CgroupPostBind4,
		hook.CgroupBind4: hook.CgroupBind6, hook.CgroupBind6: hook.CgroupBind4,
		hook.CgroupConnect4: hook.CgroupConnect6, hook.CgroupConnect6: hook.CgroupConnect4, hook.CgroupConnectUnix: hook.CgroupConnect4,
		hook.CgroupSendmsg4: hook.CgroupConnect4, hook.CgroupSendmsg6: hook.CgroupSendmsg4, hook.CgroupSendmsgUnix: hook.CgroupSendmsg6,
		hook.CgroupRecvmsg4: hook.CgroupSendmsg4, hook.CgroupRecvmsg6: hook.CgroupRecvmsg4, hook.CgroupRecvmsgUnix: hook.CgroupRecvmsg6,
		hook.CgroupGetpeername4: hook.CgroupGetsockname4, hook.CgroupGetpeername6: hook.CgroupGetpeername4, hook.CgroupGetpeernameUnix: hook.CgroupGetpeername6,
		hook.CgroupGetsockname4: hook.CgroupGetpeername4, hook.CgroupGetsockname6: hook.CgroupGetsockname4, hook.CgroupGetsocknameUnix: hook.CgroupGetsockname6,
		hook.CgroupGetsockopt: hook.CgroupSetsockopt, hook.CgroupSetsockopt: hook.CgroupGetsockopt,
	}
	if other := attach[p.Target.Hook]; other != "" {
		progs["the attach type of "+string(other)] = testenv.VerdictProgram(t, "ldt_attach", testenv.CgroupAllow, testenv.On(other))
	}
	switch p.Target.Hook {
	case hook.XDP:
		if testenv.Has(t, testenv.FeatureSlotTypes) {
			progs["no attach type"] = testenv.VerdictProgram(t, "ldt_attach", testenv.XDPPass, testenv.ExpectedAttachType(ebpf.AttachNone))
		}
	case hook.CgroupSKBIngress:
		// One that says more than allow and deny, as only egress may (check_return_code, kernel/bpf/verifier.c).
		progs["one for egress"] = testenv.VerdictProgram(t, "ldt_attach", 3, testenv.On(hook.CgroupSKBEgress))
	}
	return progs
}

// A member that is moved runs at its new place, and a Link to it works as before.
func checkSet(t *testing.T, p *place) {
	links := map[int]*dispatcher.Link{}
	for n := 1; n <= 4; n++ {
		links[n] = p.join(t, n, dispatcher.Options{Priority: 10 * n, Persistent: n == 4})
	}
	other := p.reopen(t, "one")
	p.wantRunning(t, 1, 2, 3, 4)
	set := func(n, prio int) {
		t.Helper()
		qt.Assert(t, qt.IsNil(links[n].Set(t.Context(), scene.Priority(prio))))
		qt.Check(t, qt.Equals(p.Read(t).Member(scene.Numbers[n]).Priority, prio))
	}
	set(1, 35)
	p.wantRunning(t, 2, 3, 1, 4)
	info, err := other.Info(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.DeepEquals(info, p.Read(t).Member("one")))

	// Another priority at the same place.
	before := p.Read(t).Member("one").LinkID
	set(1, 38)
	p.wantRunning(t, 2, 3, 1, 4)
	qt.Check(t, qt.Equals(p.Read(t).Member("one").LinkID, before))

	// One that is pinned stays so.
	pins := p.pinPaths(t)
	set(4, 5)
	qt.Check(t, qt.HasLen(p.pinPaths(t), len(pins)))
	for _, path := range p.Read(t).Pins {
		qt.Check(t, qt.SliceContains(p.pinPaths(t), path))
	}
	p.wantRunning(t, 4, 2, 3, 1)
	qt.Check(t, qt.IsTrue(p.Read(t).Member("four").Persistent))
	qt.Assert(t, qt.IsNil(links[4].Close()))
	p.wantRunning(t, 4, 2, 3, 1)

	// Behind all those that are equal.
	set(1, 5)
	p.wantRunning(t, 4, 1, 2, 3)
	qt.Check(t, qt.IsNil(links[2].Set(t.Context(), hook.Settings{})))
	p.wantRunning(t, 4, 1, 2, 3)

	// The program is exchanged through either Link.
	qt.Assert(t, qt.IsNil(other.Update(t.Context(), dispatcher.Program(p.tracer(t, 9)))))
	p.wantRun(t, 4, 9, 2, 3)
	qt.Assert(t, qt.IsNil(links[1].Update(t.Context(), dispatcher.Program(p.tracer(t, 1)))))
	p.wantRunning(t, 4, 1, 2, 3)
	if p.Target.Hook.Family() == "tc" {
		return // no process owns it
	}
	qt.Assert(t, qt.IsNil(links[1].Close()))
	p.wantRunning(t, 4, 1, 2, 3)
	qt.Assert(t, qt.IsNil(other.Close()))
	p.wantRunning(t, 4, 2, 3)
}

// What is pinned stays, and what is not leaves with the last process that has it open.
func checkPin(t *testing.T, p *place) {
	one, two := p.join(t, 1, dispatcher.Options{}), p.join(t, 2, dispatcher.Options{})
	qt.Check(t, qt.HasLen(p.pinPaths(t), 0))
	var held string
	for range 2 { // pinning twice is no error, and says the same
		path, err := one.Pin(t.Context())
		qt.Assert(t, qt.IsNil(err))
		qt.Check(t, qt.IsTrue(held == "" || held == path), qt.Commentf("%s, then %s", held, path))
		held = path
	}
	qt.Check(t, qt.IsTrue(p.Read(t).Member("one").Persistent))
	qt.Check(t, qt.IsFalse(p.Read(t).Member("two").Persistent))

	// A process that may open a pin can take the member out.
	paths := append(p.pinPaths(t), filepath.Join(p.BPFFS, "libdispatcher"))
	for _, path := range paths {
		info, err := os.Stat(path)
		qt.Assert(t, qt.IsNil(err))
		want := fs.FileMode(0o600)
		if info.IsDir() {
			want = fs.ModeDir | 0o700
		}
		qt.Check(t, qt.Equals(info.Mode(), want), qt.Commentf("%s", path))
	}
	for _, path := range p.Read(t).Pins {
		qt.Check(t, qt.SliceContains(paths, path))
	}
	qt.Check(t, qt.SliceContains(p.Read(t).Pins, held))

	qt.Assert(t, qt.IsNil(two.Close()))
	qt.Assert(t, qt.IsNil(one.Close()))
	p.wantRunning(t, 1)
	byName := p.reopen(t, "one")
	byPin, err := dispatcher.OpenPinned(t.Context(), held)
	qt.Assert(t, qt.IsNil(err))
	p.keep(t, byPin)
	for _, link := range []*dispatcher.Link{byName, byPin} {
		info, err := link.Info(t.Context())
		qt.Assert(t, qt.IsNil(err))
		qt.Check(t, qt.DeepEquals(info, p.Read(t).Member("one")))
	}
	for range 2 {
		qt.Assert(t, qt.IsNil(byPin.Unpin(t.Context())))
		qt.Check(t, qt.HasLen(p.pinPaths(t), 0))
		qt.Check(t, qt.IsFalse(p.Read(t).Member("one").Persistent))
	}
	qt.Assert(t, qt.IsNil(byPin.Close()))
	p.wantRunning(t, 1)
	qt.Assert(t, qt.IsNil(byName.Close()))
	p.wantRunning(t)
}
