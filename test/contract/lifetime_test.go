package contract

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// An owner that ends, or is killed, takes along its own member and nothing else; and not what is pinned.
func checkDie(t *testing.T, p *place) {
	victim := p.AttachIn(t, p.tracer(t, 1), dispatcher.Options{Name: "one"})
	pinner := p.AttachIn(t, p.tracer(t, 2), dispatcher.Options{Name: "two", Persistent: true})
	ending := p.AttachIn(t, p.tracer(t, 3), dispatcher.Options{Name: "three"})
	p.join(t, 4, dispatcher.Options{})
	p.wantRunning(t, 1, 2, 3, 4)
	victim.Kill()
	p.wantRunning(t, 2, 3, 4)
	pinner.Kill()
	p.wantRunning(t, 2, 3, 4)
	qt.Assert(t, qt.IsNil(ending.Stop()))
	p.wantRunning(t, 2, 4)

	// It comes back under its name at once.
	p.join(t, 1, dispatcher.Options{Priority: 60})
	p.wantRunning(t, 2, 4, 1)
}

// On clsact no process owns a member: attaching says so.
func checkStay(t *testing.T, p *place) {
	_, err := dispatcher.Attach(t.Context(), p.Target, dispatcher.Program(p.tracer(t, 1)), dispatcher.Options{BPFFS: p.BPFFS})
	qt.Assert(t, qt.ErrorIs(err, dispatcher.ErrUsage))
	qt.Check(t, qt.ErrorMatches(err, fmt.Sprintf(`attach %s veth1: .* belongs to nobody.*; ask for that .*`, p.Target.Hook)))
	p.wantRunning(t)

	owner := p.AttachIn(t, p.tracer(t, 1), dispatcher.Options{Name: "one", Persistent: true})
	two := p.join(t, 2, dispatcher.Options{})
	owner.Kill()
	qt.Check(t, qt.IsNil(scene.Second(two.Pin(t.Context()))))
	qt.Check(t, qt.ErrorIs(two.Unpin(t.Context()), dispatcher.ErrUsage))
	qt.Assert(t, qt.IsNil(two.Close()))
	p.wantRunning(t, 1, 2)
	qt.Check(t, qt.HasLen(p.pinPaths(t), 0))
	p.Detach(t, "one")
	p.wantRunning(t, 2)
	qt.Assert(t, qt.IsNil(p.reopen(t, "two").Detach(t.Context())))
	p.wantRunning(t)
}

// Whoever owns a member learns that somebody detached it, and that it closed it itself. What happens to others wakes nobody.
func checkWait(t *testing.T, p *place) {
	one, two := p.join(t, 1, dispatcher.Options{}), p.join(t, 2, dispatcher.Options{})
	gone, stays := one.Done(), two.Done()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	qt.Check(t, qt.ErrorIs(one.Wait(ctx), context.Canceled))
	for _, c := range []<-chan struct{}{gone, stays} {
		select {
		case <-c:
			t.Error("it is not gone")
		default:
		}
	}
	p.Detach(t, "one")
	<-gone
	err := one.Wait(t.Context())
	qt.Check(t, qt.IsTrue(errors.Is(err, fs.ErrNotExist) || errors.Is(err, dispatcher.ErrDefunct)), qt.Commentf("%v", err))
	p.wantRunning(t, 2)
	select {
	case <-stays:
		t.Error("the other is not gone")
	default:
	}
	qt.Assert(t, qt.IsNil(two.Close()))
	<-stays
	qt.Check(t, qt.ErrorIs(two.Wait(t.Context()), fs.ErrClosed))
}

// Nothing is in the way of a device or cgroup that goes, and Links to members there say that it is gone.
func checkGone(t *testing.T, p *place) {
	one := p.join(t, 1, dispatcher.Options{})
	two := p.join(t, 2, dispatcher.Options{Persistent: true})
	three := p.join(t, 3, dispatcher.Options{Persistent: true})
	p.wantRunning(t, 1, 2, 3)
	p.remove(t)

	_, err := dispatcher.Read(t.Context(), p.Target, p.Look())
	qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
	_, err = p.tryJoin(t, 4, dispatcher.Options{})
	qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
	// Of a cgroup the kernel lets its links know some time later. Until then they are as they were.
	scene.Soon(t, func() bool {
		for name, err := range map[string]error{
			"set":    one.Set(t.Context(), scene.Priority(40)),
			"move":   two.Move(t.Context(), hook.Position{Last: true}),
			"update": three.Update(t.Context(), dispatcher.Program(p.tracer(t, 5))),
			"chain":  scene.Second(one.Chain(t.Context())),
		} {
			if err != nil {
				qt.Assert(t, qt.ErrorIs(err, dispatcher.ErrDefunct), qt.Commentf("%s", name))
			}
		}
		_, err := one.Info(t.Context())
		return err != nil
	})
	p.wantDefunct(t, one, two, three)
	qt.Check(t, qt.IsNil(one.Close()))
	qt.Check(t, qt.IsNil(two.Detach(t.Context())))
	qt.Check(t, qt.IsNil(three.Detach(t.Context())))
	qt.Check(t, qt.HasLen(p.pinPaths(t), 0))
}

// remove takes away what the hook is on.
func (p *place) remove(t testing.TB) {
	t.Helper()
	if p.Cgroup != nil {
		p.Cgroup.Remove(t)
		return
	}
	p.Server.IP(t, "link", "delete", p.ServerDev)
}

// wantDefunct checks that all methods of the links say that the device or cgroup is gone. Of a cgroup the kernel lets
// its links know some time after it was removed.
func (p *place) wantDefunct(t testing.TB, links ...*dispatcher.Link) {
	t.Helper()
	ctx := t.Context()
	for _, link := range links {
		scene.Soon(t, func() bool {
			_, err := link.Info(ctx)
			return err != nil
		})
		for name, err := range map[string]error{
			"update": link.Update(ctx, dispatcher.Program(p.tracer(t, 9))),
			"set":    link.Set(ctx, scene.Priority(7)),
			"move":   link.Move(ctx, hook.Position{First: true}),
			"pin":    scene.Second(link.Pin(ctx)),
			"info":   scene.Second(link.Info(ctx)),
			"chain":  scene.Second(link.Chain(ctx)),
		} {
			qt.Check(t, qt.ErrorIs(err, dispatcher.ErrDefunct), qt.Commentf("%s", name))
		}
	}
}
