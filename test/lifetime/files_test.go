package lifetime

import (
	"errors"
	"fmt"
	"io/fs"
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

// lacking is a scene in a process that can open hardly any file.
type lacking struct {
	*scene.Scene
	t *testing.T
}

// is says in words what is on the hook, and what runs.
func (l *lacking) is() string {
	words := fmt.Sprint(l.Ran(l.t))
	for _, m := range l.Read(l.t).Members {
		words += fmt.Sprintf(" %s(%s, %d, by %s, pinned %v)", m.Name, m.Kind, m.Priority, m.Owner, m.Persistent)
	}
	return words
}

// each runs an operation with each number of files. A failure is that of a lack of files, does not say that something is gone
// or of another version, and leaves one of the states; a success leaves the first. Neither leaves pins that the next change of
// somebody else would sweep away, with the member that they hold.
func (l *lacking) each(what string, op func() error, states ...string) {
	l.t.Helper()
	testenv.EachLimit(l.t, op, func(err error) {
		l.t.Helper()
		now := l.is()
		left, globErr := filepath.Glob(l.BPFFS + "/libdispatcher/tmp_*")
		qt.Check(l.t, qt.IsNil(globErr))
		qt.Check(l.t, qt.HasLen(left, 0), qt.Commentf("%s: %v", what, err))
		if err == nil {
			qt.Check(l.t, qt.Equals(now, states[0]), qt.Commentf("%s", what))
			return
		}
		qt.Check(l.t, qt.SliceContains(states, now), qt.Commentf("%s: %v", what, err))
		if !strings.Contains(err.Error(), "(requires >= v") { // cilium/ebpf tries, when a load fails, what the kernel has
			qt.Check(l.t, qt.StringContains(err.Error(), unix.EMFILE.Error()), qt.Commentf("%s", what))
		}
		for _, wrong := range []error{fs.ErrNotExist, dispatcher.ErrDefunct, dispatcher.ErrIncompatible, dispatcher.ErrBusy, dispatcher.ErrUsage} {
			qt.Check(l.t, qt.Not(qt.ErrorIs(err, wrong)), qt.Commentf("%s: %v", what, err))
		}
	})
}

func (l *lacking) options(name string, priority int) dispatcher.Options {
	return dispatcher.Options{Name: name, Priority: priority, Owner: "me", Persistent: true, BPFFS: l.BPFFS}
}

func (l *lacking) tracer(number int) dispatcher.Source {
	return dispatcher.Program(l.Trace.Program(l.t, number, l.GoOn(), l.On()))
}

// members makes two, pinned, and returns the Link of the second.
func (l *lacking) members() *dispatcher.Link {
	for n := 1; ; n++ {
		link, err := dispatcher.Attach(l.t.Context(), l.Target, l.tracer(n), l.options(fmt.Sprint(n), 10*n))
		qt.Assert(l.t, qt.IsNil(err))
		if n == 2 {
			l.t.Cleanup(func() { link.Close() })
			return link
		}
		qt.Assert(l.t, qt.IsNil(link.Close()))
	}
}

func lackingOn(t *testing.T, test func(t *testing.T, l *lacking)) {
	for _, h := range []hook.Hook{hook.XDP, hook.TCXIngress, hook.TCIngress, hook.CgroupConnect4} {
		t.Run(string(h), func(t *testing.T) { test(t, &lacking{scene.NewOn(t, h), t}) })
	}
}

// A process that can open no more files says so. It does not take what it cannot read for what is not there, and changes nothing
// or all of it.
func TestWithoutFiles(t *testing.T) {
	lackingOn(t, func(t *testing.T, l *lacking) {
		ctx, two := t.Context(), l.members()
		was := l.is()

		l.each("read", func() error {
			c, err := dispatcher.Read(ctx, l.Target, l.Look())
			if err == nil {
				qt.Check(t, qt.Equals(scene.Summary(c), "1* 2*"))
			}
			return err
		}, was)
		l.each("list", func() error {
			list, err := dispatcher.List(ctx, dispatcher.ListOptions{BPFFS: l.BPFFS, Hooks: []hook.Hook{l.Target.Hook}, NetNS: l.Target.NetNS})
			for _, c := range list {
				err = errors.Join(err, c.Err)
			}
			if i := slices.IndexFunc(list, func(c hook.Chain) bool { return c.Target == l.Target.Name() }); err == nil {
				qt.Assert(t, qt.IsTrue(i >= 0), qt.Commentf("%v", list))
				qt.Check(t, qt.Equals(scene.Summary(&list[i]), "1* 2*"))
			}
			return err
		}, was)
		l.each("open", func() error {
			link, err := dispatcher.Open(ctx, l.Target, "1", l.Look())
			if err == nil {
				err = link.Close()
			}
			return err
		}, was)
		l.each("info", func() error { return scene.Second(two.Info(ctx)) }, was)
		l.each("chain", func() error { return scene.Second(two.Chain(ctx)) }, was)

		three := l.tracer(3)
		l.each("plan", func() error { return scene.Second(dispatcher.Plan(ctx, l.Target, three, l.options("3", 15))) }, was)
		grown := strings.NewReplacer("[1 2]", "[1 3 2]", " 2(", " 3("+string(hook.KindMember)+", 15, by me, pinned true) 2(").Replace(was)
		l.each("attach", func() error {
			link, err := dispatcher.Attach(ctx, l.Target, three, l.options("3", 15))
			if err == nil {
				err = link.Close()
			}
			return err
		}, grown, was)
		l.each("detach", func() error { return dispatcher.Detach(ctx, l.Target, "3", l.Leave()) }, was, grown)
	})
}

// The same through a Link.
func TestLinkWithoutFiles(t *testing.T) {
	lackingOn(t, func(t *testing.T, l *lacking) {
		ctx, two := t.Context(), l.members()
		was := l.is()
		replaced := strings.Replace(was, "[1 2]", "[1 4]", 1)
		four := l.tracer(4)
		l.each("update", func() error { return two.Update(ctx, four) }, replaced, was)
		was = replaced
		names := strings.SplitAfter(was, "]")
		one, other, _ := strings.Cut(names[1], " 2(")
		moved := "[4 1] 2(" + strings.Replace(other, "20", "5", 1) + one
		l.each("set", func() error { return two.Set(ctx, scene.Priority(5)) }, moved, was)
		l.each("set back", func() error { return two.Set(ctx, scene.Priority(20)) }, was, moved)
		if l.Target.Hook.Family() != "tc" {
			loose := strings.TrimSuffix(was, "true)") + "false)"
			l.each("unpin", func() error { return two.Unpin(ctx) }, loose, was)
			l.each("pin", func() error { return scene.Second(two.Pin(ctx)) }, was, loose)
		}
		first := "[1]" + one
		l.each("detach", func() error { return two.Detach(ctx) }, first, was)
	})
}

// A Link whose member was moved by somebody else finds it, or says why not.
func TestMovedWithoutFiles(t *testing.T) {
	for _, h := range []hook.Hook{hook.TCXIngress, hook.CgroupConnect4} {
		t.Run(string(h), func(t *testing.T) {
			l := &lacking{scene.NewOn(t, h), t}
			ctx, two := t.Context(), l.members()
			qt.Assert(t, qt.IsNil(l.Open(t, "2").Set(ctx, scene.Priority(5))))
			moved := l.is()
			detached, _, _ := strings.Cut(strings.Replace(moved, "[2 1] 2(", "[1](", 1), "(")
			_, one, _ := strings.Cut(moved, ") 1(")
			l.each("detach", func() error { return two.Detach(ctx) }, detached+" 1("+one, moved)
		})
	}
}

// Recovering, a process that cannot read the names does not take them away.
func TestRecoverWithoutFiles(t *testing.T) {
	lackingOn(t, func(t *testing.T, l *lacking) {
		l.members()
		was, pins := l.is(), l.Pins(t)
		l.each("recover", func() error {
			found, err := dispatcher.Recover(t.Context(), dispatcher.RecoverOptions{BPFFS: l.BPFFS})
			for _, f := range found {
				qt.Check(t, qt.IsNotNil(f.Err), qt.Commentf("it has taken away %s: %s", f.Path, f.What))
				err = errors.Join(err, f.Err)
			}
			return err
		}, was)
		qt.Check(t, qt.DeepEquals(l.Pins(t), pins))
	})
}
