package contract

import (
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// visit reads a chain of others, joins it, changes it and leaves it as it was. It returns the first error.
func (l *limited) visit(ctx context.Context) error {
	look := dispatcher.ReadOptions{BPFFS: l.BPFFS}
	chain, err := dispatcher.Read(ctx, l.Target, look)
	if err != nil {
		return err
	}
	first := chain.Members[0].Name
	program := func(n int) dispatcher.Source {
		return dispatcher.Spec(scene.Alone(testenv.VerdictSpec(fmt.Sprintf("ldt_guest_%d", n), l.Verdict)), dispatcher.LoadOptions{})
	}
	link, err := dispatcher.Attach(ctx, l.Target, program(1), dispatcher.Options{Name: "guest", Persistent: true, BPFFS: l.BPFFS})
	if err != nil {
		return err
	}
	defer link.Close()
	opened, err := dispatcher.Open(ctx, l.Target, hook.Ref(first), look)
	if err != nil {
		return err
	}
	defer opened.Close()
	for _, step := range []func() error{
		func() error { return opened.Set(ctx, hook.Settings{Priority: chain.Members[0].Priority}) },
		func() error { return link.Move(ctx, hook.Position{Before: hook.Ref(first)}) },
		func() error { return opened.Move(ctx, hook.Position{Before: "guest"}) },
		func() error { return link.Update(ctx, program(2)) },
		func() error { return link.Unpin(ctx) },
		func() error { return scene.Second(link.Pin(ctx)) },
		func() error {
			return scene.Second(dispatcher.Plan(ctx, l.Target, program(3), dispatcher.Options{Name: "plan", BPFFS: l.BPFFS}))
		},
		func() error {
			return dispatcher.Detach(ctx, l.Target, "guest", dispatcher.DetachOptions{BPFFS: l.BPFFS})
		},
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// guest is a process with few capabilities; it returns what refused it.
func guest(t *testing.T, s *scene.Scene) string {
	t.Helper()
	l := limited{
		Target: s.Target, BPFFS: s.BPFFS, Verdict: s.GoOn(), NetNS: s.NS().Path(),
		Caps: []int{unix.CAP_BPF, unix.CAP_NET_ADMIN, unix.CAP_PERFMON},
	}
	l.Target.NetNS = ""
	arg, err := json.Marshal(l)
	qt.Assert(t, qt.IsNil(err))
	return testenv.StartHelper(t, "limited-guest", string(arg)).Expect(t, "refused")
}

const welcome = "<nil>"

// A process without CAP_SYS_ADMIN finds a chain by its pins, also after another process has changed the chain, or died at it.
func TestRightsOnAChain(t *testing.T) {
	s := scene.New(t)
	s.Attach(t, s.Tracer(t, 1), dispatcher.Options{Name: "one", Persistent: true})
	two := s.Attach(t, s.Tracer(t, 2), dispatcher.Options{Name: "two", Persistent: true})
	ended := make(chan error)
	go func() { // others change the chain meanwhile
		var err error
		for n := 0; n < 30 && err == nil; n++ {
			err = two.Set(t.Context(), scene.Priority(60+n))
		}
		ended <- err
	}()
	qt.Check(t, qt.Equals(guest(t, s), welcome))
	qt.Check(t, qt.IsNil(<-ended))
	s.WantRun(t, 1, 2)

	died := ""
	for n := 1; n == 1 || died != ""; n++ {
		a := scene.NewApp(t)
		qt.Assert(t, qt.IsNil(a.Do(t, s.Command(scene.Command{Op: "open", Member: "two"}))))
		died = a.Try(t, s.Command(scene.Command{Op: "set", Settings: scene.Priority(60 + n), DieAt: n})).Died
		qt.Check(t, qt.Equals(guest(t, s), welcome), qt.Commentf("after %q", died))
		a.Kill()
	}
	s.WantRun(t, 1, 2)
	qt.Check(t, qt.HasLen(helpers(t, s), 2))

	// A member that is not pinned is opened by its id only.
	owner := s.AttachIn(t, s.Tracer(t, 3), dispatcher.Options{Name: "owned"})
	qt.Check(t, qt.Matches(guest(t, s), `read xdp \S+: member "owned" is owned by a process and not pinned, so it takes CAP_SYS_ADMIN to open its slot.*`))
	owner.Kill()
	s.WantRunSoon(t, 1, 2)
	qt.Assert(t, qt.IsNil(two.Set(t.Context(), scene.Priority(70)))) // without the empty slot
	qt.Check(t, qt.Equals(guest(t, s), welcome))
}

// The chain does not need the pins of its dispatcher, and where they are missing the next change makes them.
func TestRightsWithoutDispatcherPins(t *testing.T) {
	s := scene.New(t)
	one := s.Attach(t, s.Tracer(t, 1), dispatcher.Options{Name: "one", Persistent: true})
	for _, pin := range helpers(t, s) {
		qt.Assert(t, qt.IsNil(os.Remove(pin)))
	}
	qt.Check(t, qt.Matches(guest(t, s), `read xdp \S+: program \d+ is not pinned beside the members of its chain, so it takes CAP_SYS_ADMIN to open it.*; the next change by a process with CAP_SYS_ADMIN pins it`))
	qt.Assert(t, qt.IsNil(one.Set(t.Context(), scene.Priority(30))))
	qt.Check(t, qt.HasLen(helpers(t, s), 2))
	qt.Check(t, qt.Equals(guest(t, s), welcome))

	// The sweep alone makes what is missing.
	qt.Assert(t, qt.IsNil(os.Remove(helpers(t, s)[1])))
	qt.Check(t, qt.ErrorIs(dispatcher.Detach(t.Context(), s.Target, "nobody", s.Leave()), fs.ErrNotExist))
	qt.Check(t, qt.Equals(guest(t, s), welcome))

	// A change does not need to make them.
	qt.Assert(t, qt.IsNil(unix.Mount("", s.BPFFS, "", unix.MS_REMOUNT|unix.MS_RDONLY, "")))
	err := one.Set(t.Context(), scene.Priority(35))
	qt.Assert(t, qt.IsNil(unix.Mount("", s.BPFFS, "", unix.MS_REMOUNT, "")))
	qt.Check(t, qt.IsNil(err))
	qt.Check(t, qt.StringContains(guest(t, s), "is not pinned beside the members of its chain"))

	// What a dead process left of another dispatcher goes.
	folder := filepath.Dir(helpers(t, s)[0])
	prog := testenv.VerdictProgram(t, "ldt_stale", testenv.XDPPass)
	qt.Assert(t, qt.IsNil(prog.Pin(filepath.Join(folder, "dispatcher_7"))))
	qt.Assert(t, qt.IsNil(one.Set(t.Context(), scene.Priority(40))))
	qt.Check(t, qt.HasLen(helpers(t, s), 2))
	s.Detach(t, "one")
	qt.Check(t, qt.HasLen(helpers(t, s), 0))
}

// helpers are the pins of dispatchers.
func helpers(t *testing.T, s *scene.Scene) []string {
	t.Helper()
	var list []string
	for _, kind := range []string{"dispatcher", "description"} {
		found, err := filepath.Glob(filepath.Join(s.BPFFS, "libdispatcher", "xdp_*", kind+"_*"))
		qt.Assert(t, qt.IsNil(err))
		list = append(list, found...)
	}
	return list
}
