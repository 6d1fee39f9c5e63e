package dispatcher_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

func init() {
	operations["recover"] = func(_ *appState, ctx context.Context, c command) error {
		found, err := dispatcher.Recover(ctx, dispatcher.RecoverOptions{BPFFS: c.BPFFS, Reattach: true})
		for _, f := range found {
			err = errors.Join(err, f.Err)
		}
		return err
	}
}

// wantReattached recovers, with nothing that could not be.
func (s *scene) wantReattached(t testing.TB) {
	t.Helper()
	for _, f := range s.recover(t, dispatcher.RecoverOptions{Reattach: true}) {
		qt.Assert(t, qt.IsNil(f.Err))
	}
}

// wantNotReattached recovers what has no place to go to, for that reason.
func (s *scene) wantNotReattached(t testing.TB, cause error, text string) {
	t.Helper()
	found := s.recover(t, dispatcher.RecoverOptions{Reattach: true})
	qt.Assert(t, qt.IsTrue(len(found) > 0))
	for _, f := range found {
		qt.Check(t, qt.ErrorIs(f.Err, cause))
		qt.Check(t, qt.ErrorMatches(f.Err, text))
		qt.Check(t, qt.IsFalse(f.Reattached))
	}
}

// deleteDevice takes the device away, and waits until its members are seen to be gone.
func (s *scene) deleteDevice(t testing.TB) {
	t.Helper()
	s.Server.IP(t, "link", "del", s.ServerDev)
	soon(t, func() bool { return s.gone(t, s.target.Hook) != "" })
}

// Killed at any step of it, recover leaves each member where it was or where it is to be; the next one finishes it.
func TestRecoverCrash(t *testing.T) {
	for _, h := range []hook.Hook{hook.XDP, hook.TCXIngress} {
		t.Run(string(h), func(t *testing.T) {
			testenv.NeedHook(t, h)
			s := newScene(t)
			s.target.Hook = h
			for n, died := 1, true; died; n++ {
				s.join(t, dispatcher.Program(s.trace.Program(t, 1, s.goOn(), s.on())), dispatcher.Options{Name: "1", Persistent: true}).Close()
				s.join(t, dispatcher.Spec(countingOn(h), dispatcher.LoadOptions{}), dispatcher.Options{Name: "counting", Settings: priority(40), Persistent: true}).Close()
				s.deleteDevice(t)
				s.newDevice(t)
				soon(t, func() bool { return s.Passed(t, port, 1) == 1 })

				t.Log(n, time.Now())
				victim := newApp(t)
				got := victim.try(t, s.command(command{Op: "recover", DieAt: n}))
				died = got.Died != ""
				at := qt.Commentf("died at step %d, %q", n, got.Died)
				qt.Assert(t, qt.Equals(got.Error, ""), at)
				victim.Kill()
				qt.Assert(t, qt.IsTrue(oneOf(s.ran(t), [][]int{nil, {1}})), at)

				s.wantReattached(t)
				s.wantRun(t, 1)
				qt.Assert(t, qt.Equals(summary(s.read(t)), "counting* 1*"), at)
				qt.Assert(t, qt.HasLen(s.memberPins(t, "counting"), 2), at) // with its map
				qt.Assert(t, qt.Equals(s.gone(t, h), ""), at)
				qt.Assert(t, qt.HasLen(s.recover(t, dispatcher.RecoverOptions{Reattach: true}), 0), at)
				s.clear(t)
				s.wantRunSoon(t)
			}
		})
	}
}

// Another tool was quicker on the new device: on XDP its program stays until it goes, on TCX there is room for all.
func TestReattachBesideOthers(t *testing.T) {
	t.Run("xdp", func(t *testing.T) {
		s := newScene(t)
		s.attach(t, s.tracer(t, 1, pass), dispatcher.Options{Name: "one", Persistent: true}).Close()
		s.deleteDevice(t)
		s.newDevice(t)
		s.Server.Do(t, func() { s.ServerIfindex = ifindexOf(t, s.ServerDev) })
		theirs, _ := s.foreignLink(t, s.tracer(t, 2, pass))
		s.wantNotReattached(t, dispatcher.ErrBusy, `.*held by link \d+ .*`)
		qt.Check(t, qt.Equals(s.gone(t, hook.XDP), "one(was on veth1) "))
		s.wantChain(t, "ldt_trace_2(foreign)")
		qt.Assert(t, qt.IsNil(theirs.Close()))
		s.wantReattached(t)
		soon(t, func() bool { return slices.Equal(s.ran(t), []int{1}) })
		s.clear(t)
	})
	t.Run("tcx", func(t *testing.T) {
		s := newLinkScene(t, hook.TCXIngress)
		s.member(t, 1)
		s.member(t, 3)
		s.foreign(t, s.tracer(t, 7), kernel.Neighbor{})
		s.member(t, 4)
		s.deleteDevice(t)
		s.newDevice(t)
		s.ns.Do(t, func() { s.index = ifindexOf(t, s.ServerDev) })
		s.foreign(t, s.tracer(t, 8), kernel.Neighbor{})
		soon(t, func() bool { return slices.Equal(s.ran(t), []int{8}) })
		two := s.attach(t, s.tracer(t, 2), dispatcher.Options{Name: "2", Settings: priority(20)})
		s.wantReattached(t)
		// As they would join: by priority among the members, the first one before them.
		s.wantRun(t, 8, 1, 2, 3, 4)
		qt.Assert(t, qt.IsNil(two.Close()))
		s.clear(t)
	})
}

// A device that came and went more than once: the newest chain has it, and the older one does not come back by itself.
func TestReattachTheNewest(t *testing.T) {
	s := newScene(t)
	for _, name := range []string{"old", "new"} {
		s.attach(t, s.tracer(t, 1, pass), dispatcher.Options{Name: name, Persistent: true}).Close()
		s.Server.IP(t, "link", "del", s.ServerDev)
		s.newDevice(t)
	}
	found := s.recover(t, dispatcher.RecoverOptions{Reattach: true})
	qt.Assert(t, qt.HasLen(found, 2))
	qt.Check(t, qt.IsTrue(found[0].Reattached))
	qt.Check(t, qt.DeepEquals(found[0].Members, []string{"new"}))
	qt.Check(t, qt.ErrorIs(found[1].Err, dispatcher.ErrBusy))
	s.wantChain(t, "new*")
	s.recover(t, dispatcher.RecoverOptions{})
	s.wantChain(t, "new*")
	qt.Check(t, qt.HasLen(s.recover(t, dispatcher.RecoverOptions{}), 0))
	s.clear(t)
}

// Who held a member before it was attached again has a link that does nothing. The member is not shown as gone for that.
func TestReattachWhileHeld(t *testing.T) {
	for _, h := range []hook.Hook{hook.XDP, hook.TCXIngress} {
		t.Run(string(h), func(t *testing.T) {
			testenv.NeedHook(t, h)
			s := newScene(t)
			s.target.Hook = h
			held := s.attach(t, s.trace.Program(t, 1, s.goOn(), s.on()), dispatcher.Options{Name: "one", Persistent: true})
			s.deleteDevice(t)
			s.newDevice(t)
			s.wantReattached(t)
			qt.Check(t, qt.Equals(s.gone(t, h), ""))
			two := s.attach(t, s.trace.Program(t, 2, s.goOn(), s.on()), dispatcher.Options{Name: "two"}) // another dispatcher
			qt.Check(t, qt.Equals(s.gone(t, h), ""))
			soon(t, func() bool { return slices.Equal(s.ran(t), []int{1, 2}) })
			_, err := held.Info(t.Context())
			qt.Check(t, qt.ErrorIs(err, dispatcher.ErrDefunct))
			qt.Check(t, qt.IsNil(held.Detach(t.Context())))
			s.wantRun(t, 1, 2)
			qt.Assert(t, qt.IsNil(two.Close()))
			s.clear(t)
		})
	}
}

// A cgroup that is removed and made again.
func TestReattachOnCgroup(t *testing.T) {
	s := newLinkScene(t, hook.CgroupConnect4)
	s.member(t, 2)
	s.member(t, 1)
	s.wantRun(t, 1, 2)
	before := s.read(t)
	s.cgroup.Remove(t)
	where := fmt.Sprintf("(was on %s) ", s.cgroup.Path)
	soon(t, func() bool { return s.gone(t, s.hook) != "" }) // the kernel takes up to half a second
	soon(t, func() bool { return s.gone(t, s.hook) == "2"+where+"1"+where })
	s.wantNotReattached(t, fs.ErrNotExist, `recover cgroup/connect4 .*: there is no cgroup `+s.cgroup.Path+` to attach it to; .*`)

	qt.Assert(t, qt.IsNil(os.Mkdir(s.cgroup.Path, 0o755)))
	s.wantReattached(t)
	s.resident = s.cgroup.Enter(t, s.Client)
	s.wantRun(t, 1, 2)
	after := s.read(t)
	for i := range after.Members {
		qt.Check(t, qt.Equals(after.Members[i].Settings, before.Members[i].Settings))
		qt.Check(t, qt.Equals(after.Members[i].Program, before.Members[i].Program))
	}
	qt.Check(t, qt.Equals(s.gone(t, s.hook), ""))
	s.clear(t)
}

// The number of a namespace is given again at once, and so is that of its device. A chain of the old one is not one of the new.
func TestNetNSInodeReused(t *testing.T) {
	s := newScene(t)
	all := []*scene{s}
	if testenv.Has(t, testenv.FeatureTCX) {
		all = append(all, s.onDevice(dispatcher.On(hook.TCXIngress, s.ServerDev).In(s.Server.Name)))
	}
	for _, at := range all {
		at.attach(t, at.trace.Program(t, 1, at.goOn(), at.on()), dispatcher.Options{Name: "one", Persistent: true}).Close()
	}
	old, oldIndex := s.read(t).NetNS, s.ServerIfindex
	qt.Assert(t, qt.IsNil(s.Server.Delete()))
	soon(t, func() bool {
		return !slices.ContainsFunc(all, func(at *scene) bool { return s.gone(t, at.target.Hook) == "" })
	})

	var again *testenv.NetNS
	for try := 0; again == nil; try++ {
		if try == 50 {
			t.Skip("this kernel gives the number to nobody else")
		}
		ns := testenv.NewNetNS(t)
		info, err := os.Stat(ns.Path())
		qt.Assert(t, qt.IsNil(err))
		if info.Sys().(*syscall.Stat_t).Ino == old.Inode {
			again = ns
		}
	}
	again.IP(t, "link", "add", s.ServerDev, "index", fmt.Sprint(oldIndex), "type", "veth", "peer", "name", "other", "index", "99")
	for _, at := range all {
		c := at.onDevice(at.target.In(again.Name)).read(t)
		qt.Check(t, qt.Equals(c.NetNS.Inode, old.Inode))
		qt.Check(t, qt.Equals(c.Ifindex, oldIndex))
		qt.Check(t, qt.HasLen(c.Members, 0))
	}
	if testenv.Has(t, testenv.FeatureNetNSCookie) { // else the number is all that there is to tell them by
		s.wantNotReattached(t, fs.ErrNotExist, `.*there is no network namespace \(cookie \d+\), which was its own, .*`)
	}
	list, err := dispatcher.List(t.Context(), dispatcher.ListOptions{BPFFS: s.bpffs, NetNS: again.Name})
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.HasLen(list, 0))
	there := s.onDevice(s.target.In(again.Name))
	there.attach(t, s.tracer(t, 3, pass), dispatcher.Options{Name: "one", Persistent: true}).Close()
	s.recover(t, dispatcher.RecoverOptions{})
	there.wantChain(t, "one*")
	qt.Check(t, qt.Equals(s.gone(t, hook.XDP)+s.gone(t, hook.TCXIngress), ""))
	there.clear(t)
}

// What somebody left in the folder, by hand or by another tool, keeps nobody from anything, and stays if it is not ours.
func TestStrangePins(t *testing.T) {
	s := newScene(t)
	m, err := ebpf.NewMap(&ebpf.MapSpec{Name: "ldt_map", Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	qt.Assert(t, qt.IsNil(err))
	defer m.Close()
	dir := filepath.Join(s.bpffs, "libdispatcher")
	for _, folder := range []string{
		"xdp_foo/member_a", "xdp_chain_zz", "xdp_4000000000/member_a", "tcx_foo/member_a", "tcx_4000000001/member_b", "cgroup_", "tmp_1_2/member_x",
		"registry/of", "member_x", "xdp_4000000002/member_%%%",
	} {
		qt.Assert(t, qt.IsNil(os.MkdirAll(filepath.Join(dir, folder), 0o700)))
	}
	pinned := []string{"note", "xdp_7", "tcx_8", "move_1_2_3", "tmp_3_4", "xdp_foo/root", "xdp_4000000000/root", "xdp_4000000000/member_a/slot", "tcx_foo/member_a/link", "tcx_4000000001/member_b/link"}
	for _, pin := range pinned {
		twin, err := m.Clone()
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.IsNil(twin.Pin(filepath.Join(dir, pin))))
		qt.Assert(t, qt.IsNil(twin.Close()))
	}
	use := func() {
		t.Helper()
		for _, h := range []hook.Hook{hook.XDP, hook.TCXIngress} {
			if !testenv.HasHook(t, h) {
				continue
			}
			at := s.onDevice(dispatcher.On(h, s.ServerDev).In(s.Server.Name))
			one := at.attach(t, at.trace.Program(t, 1, at.goOn(), at.on()), dispatcher.Options{Name: "one", Persistent: true})
			qt.Assert(t, qt.IsNil(one.Update(t.Context(), dispatcher.Program(at.trace.Program(t, 2, at.goOn(), at.on())))))
			at.wantRun(t, 2)
			qt.Assert(t, qt.IsNil(one.Unpin(t.Context())))
			qt.Assert(t, qt.IsNil(one.Pin(t.Context())))
			qt.Assert(t, qt.IsNil(one.Close()))
			at.wantChain(t, "one*")
			_, err := dispatcher.List(t.Context(), dispatcher.ListOptions{BPFFS: s.bpffs})
			qt.Assert(t, qt.IsNil(err))
			at.detach(t, "one")
			at.wantRunSoon(t)
		}
	}
	use()
	s.recover(t, dispatcher.RecoverOptions{DryRun: true})
	for _, f := range s.recover(t, dispatcher.RecoverOptions{}) {
		qt.Check(t, qt.IsNil(f.Err), qt.Commentf("%s: %s", f.Path, f.What))
	}
	use()
	_, err = os.Lstat(filepath.Join(dir, "note"))
	qt.Check(t, qt.IsNil(err))
	if testenv.Has(t, testenv.FeatureTCX) { // a chain needs no registry
		left, err := os.Lstat(filepath.Join(dir, "registry"))
		qt.Assert(t, qt.IsNil(err))
		qt.Check(t, qt.IsFalse(left.IsDir())) // it was made anew
	}
	qt.Check(t, qt.HasLen(s.recover(t, dispatcher.RecoverOptions{}), 0))
}

// laterChain is the dispatcher of a version to come.
func laterChain(t testing.TB) *ebpf.Program {
	t.Helper()
	value := make([]byte, 4680)
	binary.NativeEndian.PutUint32(value, 0x6c646331)
	binary.NativeEndian.PutUint32(value[4:], state.Version+1)
	m, err := ebpf.NewMap(&ebpf.MapSpec{
		Name: "ld_chain", Type: ebpf.Array, KeySize: 4, ValueSize: uint32(len(value)), MaxEntries: 1,
		Flags: unix.BPF_F_RDONLY_PROG, Contents: []ebpf.MapKV{{Key: uint32(0), Value: value}},
	})
	qt.Assert(t, qt.IsNil(err))
	defer m.Close()
	qt.Assert(t, qt.IsNil(m.Freeze()))
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "libdispatcher", Type: ebpf.XDP, AttachType: ebpf.AttachXDP, License: "GPL",
		Instructions: testenv.VerdictSpec("ldt_later", testenv.XDPPass).Instructions,
	})
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { prog.Close() })
	qt.Assert(t, qt.IsNil(prog.BindMap(m)))
	return prog
}

// A chain of a later version is neither free nor foreign: everybody says so and leaves it, until it is forced.
func TestLaterChain(t *testing.T) {
	s := newScene(t)
	_, id := s.foreignLink(t, laterChain(t))
	list, err := dispatcher.List(t.Context(), dispatcher.ListOptions{BPFFS: s.bpffs, NetNS: s.Server.Name})
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.HasLen(list, 1))
	qt.Check(t, qt.ErrorMatches(list[0].Err, `.*description of version 3.*`))
	_, err = s.tryJoin(t, dispatcher.Program(s.tracer(t, 1, pass)), dispatcher.Options{})
	qt.Check(t, qt.ErrorIs(err, ebpf.ErrNotSupported))
	qt.Check(t, qt.HasLen(s.recover(t, dispatcher.RecoverOptions{Reattach: true}), 0))
	for _, err := range []error{
		dispatcher.DetachLink(t.Context(), id, s.leave()),
		second(dispatcher.AdoptLink(t.Context(), id, dispatcher.AdoptOptions{Options: dispatcher.Options{BPFFS: s.bpffs}})),
	} {
		qt.Check(t, qt.ErrorIs(err, ebpf.ErrNotSupported))
		qt.Check(t, qt.ErrorMatches(err, `.*description of version 3.*`))
	}
	qt.Assert(t, qt.IsNil(dispatcher.DetachLink(t.Context(), id, dispatcher.DetachOptions{BPFFS: s.bpffs, Force: true})))
	s.attach(t, s.tracer(t, 1, pass), dispatcher.Options{})
	s.wantRun(t, 1)
}
