package contract

import (
	"io/fs"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// Another device or cgroup with the same name is another one: a member of the old one is none of the new one.
func checkReplaced(t *testing.T, p *place) {
	one := p.join(t, 1, dispatcher.Options{})
	two := p.join(t, 2, dispatcher.Options{Persistent: true})
	p.replace(t)
	qt.Check(t, qt.HasLen(p.Read(t).Members, 0))
	p.wantDefunct(t, one, two)
	_, err := dispatcher.Open(t.Context(), p.Target, "one", p.Look())
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
	p.Clear(t)
	p.wantRunning(t)
}

// replace puts another device or cgroup of the same name in the place of the one that is there.
func (p *place) replace(t testing.TB) {
	t.Helper()
	if p.Cgroup != nil {
		p.Cgroup.Remove(t)
		p.enter(t)
		return
	}
	if p.Target.Hook.Family() == "tc" {
		p.ServerIfindex += 100 // where there is no link, the number is what tells one device from another
	}
	p.ReplaceDevice(t)
}

// The name of a device is not what a member is held by.
func checkRenamed(t *testing.T, p *place) {
	one, two := p.join(t, 1, dispatcher.Options{}), p.join(t, 2, dispatcher.Options{Persistent: true})
	old := p.Target
	p.Server.IP(t, "link", "set", p.ServerDev, "down")
	p.Server.IP(t, "link", "set", p.ServerDev, "name", "renamed")
	p.Target = dispatcher.On(p.Target.Hook, "renamed").In(p.Server.Name)
	p.wantSame(t, one, two, old)
}

// wantSame checks that two members, the second one pinned, go on at another place through their Links, and can be
// found and taken out there.
func (p *place) wantSame(t testing.TB, one, two *dispatcher.Link, old dispatcher.Target) {
	t.Helper()
	ctx := t.Context()
	_, err := dispatcher.Read(ctx, old, p.Look())
	qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
	names := func() (names []string) {
		for _, m := range p.Read(t).Members {
			names = append(names, m.Name)
		}
		return names
	}
	qt.Assert(t, qt.DeepEquals(names(), []string{"one", "two"}))
	qt.Check(t, qt.IsTrue(p.Read(t).Member("two").Persistent))
	c, err := one.Chain(ctx)
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(scene.Summary(c), scene.Summary(p.Read(t))))
	if p.Target.NetNS == old.NetNS {
		qt.Check(t, qt.Equals(c.Target, p.Target.Name()))
	}
	qt.Assert(t, qt.IsNil(one.Set(ctx, scene.Priority(60))))
	qt.Check(t, qt.DeepEquals(names(), []string{"two", "one"}))
	next := p.tracer(t, 3)
	qt.Assert(t, qt.IsNil(two.Update(ctx, dispatcher.Program(next))))
	qt.Check(t, qt.Equals(p.Read(t).Member("two").Program.ID, uint32(scene.ID(t, next))))
	qt.Assert(t, qt.IsNil(two.Move(ctx, hook.Position{Last: true})))
	qt.Check(t, qt.DeepEquals(names(), []string{"one", "two"}))
	qt.Assert(t, qt.IsNil(scene.Second(one.Pin(ctx))))
	qt.Check(t, qt.IsTrue(p.Read(t).Member("one").Persistent))
	info, err := p.reopen(t, "one").Info(ctx)
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.DeepEquals(info, p.Read(t).Member("one")))
	p.Detach(t, "two")
	qt.Check(t, qt.DeepEquals(names(), []string{"one"}))
	qt.Check(t, qt.IsNil(two.Detach(ctx)))
	qt.Assert(t, qt.IsNil(one.Detach(ctx)))
	qt.Check(t, qt.HasLen(p.Read(t).Members, 0))
}

// A device takes its members along to another network namespace.
func checkMoved(t *testing.T, p *place) {
	one, two := p.join(t, 1, dispatcher.Options{}), p.join(t, 2, dispatcher.Options{Persistent: true})
	elsewhere, old := testenv.NewNetNS(t), p.Target
	p.Server.IP(t, "link", "set", p.ServerDev, "netns", elsewhere.Name)
	p.Target = dispatcher.On(p.Target.Hook, p.ServerDev).In(elsewhere.Name)
	p.wantSame(t, one, two, old)
}

// The kernel shuts down all qdiscs of a device that leaves its namespace (dev_shutdown, called when it does), and their
// filters go with them. Members must be attached again.
func checkLeftBehind(t *testing.T, p *place) {
	one, two := p.join(t, 1, dispatcher.Options{}), p.join(t, 2, dispatcher.Options{})
	elsewhere := testenv.NewNetNS(t)
	p.Server.IP(t, "link", "set", p.ServerDev, "netns", elsewhere.Name)
	p.Target = p.Target.In(elsewhere.Name)
	qt.Check(t, qt.HasLen(p.Read(t).Members, 0))
	p.wantDefunct(t, one, two)
	p.join(t, 1, dispatcher.Options{})
	p.wantDefunct(t, one, two)
	qt.Check(t, qt.IsNil(one.Detach(t.Context())))
	p.WantChain(t, "one*")
}

// One end of a wire takes the other along.
func checkPeerGone(t *testing.T, p *place) {
	one, two := p.join(t, 1, dispatcher.Options{}), p.join(t, 2, dispatcher.Options{Persistent: true})
	p.Client.IP(t, "link", "delete", p.ClientDev)
	p.wantDefunct(t, one, two)
	qt.Check(t, qt.IsNil(two.Detach(t.Context())))
	qt.Check(t, qt.IsNil(one.Detach(t.Context())))
}

// A container ends: its namespace and its devices go, even while processes hold members there.
func checkNetNSGone(t *testing.T, p *place) {
	one, two := p.join(t, 1, dispatcher.Options{}), p.join(t, 2, dispatcher.Options{Persistent: true})
	qt.Assert(t, qt.IsNil(p.Server.Delete()))
	scene.Soon(t, func() bool { // its end of the wire goes, and the other with it
		_, err := p.Client.TryIP("link", "show", p.ClientDev)
		return err != nil
	})
	p.wantDefunct(t, one, two)
	_, err := dispatcher.Read(t.Context(), p.Target, p.Look())
	qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
	qt.Check(t, qt.IsNil(two.Detach(t.Context())))
	qt.Check(t, qt.IsNil(one.Detach(t.Context())))
}
