package contract

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// limited is a process with few capabilities.
type limited struct {
	Target  dispatcher.Target
	BPFFS   string
	Verdict int
	NetNS   string // that it is in
	Caps    []int
}

func init() {
	become := func(arg string) (l limited) {
		if err := json.Unmarshal([]byte(arg), &l); err != nil {
			panic(err)
		}
		runtime.LockOSThread() // namespaces and capabilities are a thread's
		if l.NetNS != "" {
			ns, err := os.Open(l.NetNS)
			if err == nil {
				err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
			}
			if err != nil {
				panic(err)
			}
		}
		kernel.RaiseMemlock() // before Linux 5.11 maps count towards it
		hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var some [2]unix.CapUserData
		for _, c := range l.Caps {
			some[c/32].Effective |= 1 << (c % 32)
			some[c/32].Permitted |= 1 << (c % 32)
		}
		if err := unix.Capset(&hdr, &some[0]); err != nil {
			panic(err)
		}
		return l
	}
	testenv.RegisterHelper("limited", func(args []string) {
		l := become(args[0])
		fmt.Println("refused", strings.Join(l.refused(context.Background()), " "))
	})
	testenv.RegisterHelper("limited-guest", func(args []string) {
		l := become(args[0])
		fmt.Println("refused", l.visit(context.Background()))
	})
}

// refused does what there is to do, and returns what it has not the rights for.
func (l *limited) refused(ctx context.Context) (list []string) {
	note := func(what string, err error) {
		switch {
		case errors.Is(err, dispatcher.ErrPermission):
			list = append(list, what)
		case err != nil:
			list = append(list, fmt.Sprintf("%s: %v", what, err))
		}
	}
	from := func(n int) dispatcher.Source {
		spec := testenv.VerdictSpec(fmt.Sprintf("ldt_limited_%d", n), l.Verdict, testenv.On(l.Target.Hook))
		return dispatcher.Spec(scene.Alone(spec), dispatcher.LoadOptions{})
	}
	attach := func(n int, what string, persistent bool) *dispatcher.Link {
		link, err := dispatcher.Attach(ctx, l.Target, from(n), dispatcher.Options{Name: fmt.Sprint("m", n), Persistent: persistent, BPFFS: l.BPFFS})
		note(what, err)
		return link
	}
	look := dispatcher.ReadOptions{BPFFS: l.BPFFS}
	filters := l.Target.Hook.Family() == "tc"
	one := attach(1, "attach", filters)
	if !filters {
		note("close", one.Close())
		one = attach(1, "attach", true)
	}
	note("info", scene.Second(one.Info(ctx)))
	note("chain", scene.Second(one.Chain(ctx)))
	note("set", one.Set(ctx, hook.Settings{Priority: 7}))
	note("update", one.Update(ctx, from(2)))
	note("open", func() error {
		again, err := dispatcher.Open(ctx, l.Target, "m1", look)
		if err == nil {
			note("set of an opened one", again.Set(ctx, hook.Settings{Priority: 9}))
			note("update of an opened one", again.Update(ctx, from(4)))
			again.Close()
		}
		return err
	}())
	note("read", scene.Second(dispatcher.Read(ctx, l.Target, look)))
	if two := attach(3, "join", true); two != nil {
		if err := one.Move(ctx, hook.Position{After: "m3"}); !errors.Is(err, ebpf.ErrNotSupported) { // on a cgroup before Linux 6.17
			note("move", err)
		}
		two.Detach(ctx)
		two.Close()
	}
	if err := one.Detach(ctx); err != nil {
		note("detach", err)
	} else {
		attach(1, "attach", true).Close()
	}
	one.Close()
	note("detach by name", dispatcher.Detach(ctx, l.Target, "m1", dispatcher.DetachOptions{BPFFS: l.BPFFS}))
	return list
}

// In its own network namespace a process needs no more capabilities than cilium/ebpf does to attach. What needs
// CAP_SYS_ADMIN, since the kernel opens objects by id for that alone, is in docs/architecture.md.
func TestRights(t *testing.T) {
	few := []int{unix.CAP_BPF, unix.CAP_NET_ADMIN, unix.CAP_PERFMON}
	for h, refused := range map[hook.Hook]string{
		hook.XDP:            "update of an opened one",
		hook.TCXIngress:     "update of an opened one move",
		hook.TCIngress:      "set of an opened one update of an opened one",
		hook.CgroupConnect4: "update of an opened one",
	} {
		for _, admin := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s %v", h, admin), func(t *testing.T) {
				testenv.NeedHook(t, h)
				s := scene.New(t).OnHook(t, h)
				l := limited{Target: s.Target, BPFFS: s.BPFFS, Verdict: s.GoOn(), Caps: few}
				if !h.OnCgroup() {
					l.NetNS, l.Target.NetNS = s.NS().Path(), ""
				}
				want := refused
				if admin {
					want, l.Caps = "", append(slices.Clone(few), unix.CAP_SYS_ADMIN)
				}
				arg, err := json.Marshal(l)
				qt.Assert(t, qt.IsNil(err))
				got := testenv.StartHelper(t, "limited", string(arg)).Expect(t, "refused")
				s.Clear(t)
				qt.Check(t, qt.Equals(strings.TrimSpace(got), want))
			})
		}
	}
}
