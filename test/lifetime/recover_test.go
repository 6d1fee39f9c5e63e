package lifetime

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// What was left in the folder, by hand or by another tool, is in nobody's way, and stays if it is not ours.
func TestStrangePins(t *testing.T) {
	s := scene.New(t)
	m, err := ebpf.NewMap(&ebpf.MapSpec{Name: "ldt_map", Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	qt.Assert(t, qt.IsNil(err))
	defer m.Close()
	dir := filepath.Join(s.BPFFS, "libdispatcher")
	for _, folder := range []string{
		"xdp_foo/member_a", "xdp_chain_zz", "xdp_4000000000/member_a", "tcx_foo/member_a", "tcx_4000000001/member_b", "cgroup_", "tmp_1_2/member_x",
		"member_x", "xdp_4000000002/member_%%%",
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
			at := s.OnDevice(dispatcher.On(h, s.ServerDev).In(s.Server.Name))
			one := at.Attach(t, at.Tracer(t, 1), dispatcher.Options{Name: "one", Persistent: true})
			qt.Assert(t, qt.IsNil(one.Update(t.Context(), dispatcher.Program(at.Tracer(t, 2)))))
			at.WantRun(t, 2)
			qt.Assert(t, qt.IsNil(one.Unpin(t.Context())))
			qt.Assert(t, qt.IsNil(scene.Second(one.Pin(t.Context()))))
			qt.Assert(t, qt.IsNil(one.Close()))
			at.WantChain(t, "one*")
			_, err := dispatcher.List(t.Context(), dispatcher.ListOptions{BPFFS: s.BPFFS})
			qt.Assert(t, qt.IsNil(err))
			at.Detach(t, "one")
			at.WantRunSoon(t)
		}
	}
	use()
	s.Recover(t, dispatcher.RecoverOptions{DryRun: true})
	for _, f := range s.Recover(t, dispatcher.RecoverOptions{}) {
		qt.Check(t, qt.IsNil(f.Err), qt.Commentf("%s: %s", f.Path, f.What))
	}
	use()
	_, err = os.Lstat(filepath.Join(dir, "note"))
	qt.Check(t, qt.IsNil(err))
	qt.Check(t, qt.HasLen(s.Recover(t, dispatcher.RecoverOptions{}), 0))
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
	s := scene.New(t)
	_, id := s.Foreign(t, laterChain(t))
	list, err := dispatcher.List(t.Context(), dispatcher.ListOptions{BPFFS: s.BPFFS, NetNS: s.Server.Name})
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.HasLen(list, 1))
	qt.Check(t, qt.ErrorMatches(list[0].Err, `.*description of version 3.*`))
	_, err = s.TryJoin(t, dispatcher.Program(s.Tracer(t, 1, scene.Pass)), dispatcher.Options{})
	qt.Check(t, qt.ErrorIs(err, ebpf.ErrNotSupported))
	qt.Check(t, qt.HasLen(s.Recover(t, dispatcher.RecoverOptions{Reattach: true}), 0))
	for _, err := range []error{
		dispatcher.DetachLink(t.Context(), id, s.Leave()),
		scene.Second(dispatcher.AdoptLink(t.Context(), id, dispatcher.AdoptOptions{BPFFS: s.BPFFS})),
	} {
		qt.Check(t, qt.ErrorIs(err, ebpf.ErrNotSupported))
		qt.Check(t, qt.ErrorMatches(err, `.*description of version 3.*`))
	}
	qt.Assert(t, qt.IsNil(dispatcher.DetachLink(t.Context(), id, dispatcher.DetachOptions{BPFFS: s.BPFFS, Force: true})))
	s.Attach(t, s.Tracer(t, 1, scene.Pass), dispatcher.Options{})
	s.WantRun(t, 1)
}

// What is gone for good is collected.
func TestRecoverCollects(t *testing.T) {
	for _, h := range []hook.Hook{hook.XDP, hook.TCXIngress} {
		t.Run(string(h), func(t *testing.T) {
			s := scene.NewOn(t, h)
			l := s.Attach(t, s.Tracer(t, 1), dispatcher.Options{Name: "one", Persistent: true})
			qt.Assert(t, qt.IsNil(l.Close()))
			s.Server.IP(t, "link", "del", s.ServerDev)
			scene.Soon(t, func() bool { return s.Gone(t, h) != "" })
			dry := s.Recover(t, dispatcher.RecoverOptions{DryRun: true})
			qt.Assert(t, qt.HasLen(dry, 1))
			qt.Check(t, qt.DeepEquals(dry[0].Members, []string{"one"}))
			qt.Check(t, qt.Equals(dry[0].Target, s.ServerDev))
			qt.Check(t, qt.Not(qt.Equals(s.Gone(t, h), "")))
			found := s.Recover(t, dispatcher.RecoverOptions{})
			qt.Assert(t, qt.HasLen(found, 1))
			qt.Check(t, qt.IsNil(found[0].Err))
			qt.Check(t, qt.HasLen(s.Recover(t, dispatcher.RecoverOptions{}), 0))
			scene.Soon(t, func() bool { return s.Gone(t, h) == "" })
		})
	}
}

// A link that somebody has detached looks like one whose device or cgroup is gone: what is said of it is not more than is known.
func TestDetachedByOthers(t *testing.T) {
	for _, h := range []hook.Hook{hook.XDP, hook.TCXIngress, hook.CgroupConnect4} {
		t.Run(string(h), func(t *testing.T) {
			s := scene.NewOn(t, h)
			s.Attach(t, s.Tracer(t, 1), scene.Persistent("one", 10)).Close()
			c := s.Read(t)
			raw, err := link.NewFromID(link.ID(max(c.LinkID, c.Members[0].LinkID)))
			qt.Assert(t, qt.IsNil(err))
			qt.Assert(t, qt.IsNil(raw.Detach()))
			qt.Assert(t, qt.IsNil(raw.Close()))
			what := map[hook.Hook]string{hook.XDP: "a chain that is on no device", hook.TCXIngress: "a member that is on no device", hook.CgroupConnect4: "a member that is on no cgroup"}[h]
			for i, at := range []string{
				` \(its link was detached, or ` + s.Target.Name() + ` was made again, for it is there\)`,
				` \(there is no ` + s.Target.Name() + `\)`,
			} {
				found := s.Recover(t, dispatcher.RecoverOptions{DryRun: true})
				qt.Assert(t, qt.HasLen(found, 1))
				qt.Check(t, qt.Matches(found[0].What, what+" any more"+at))
				switch {
				case i > 0:
				case h.OnCgroup():
					s.Cgroup.Remove(t)
				default:
					s.Server.IP(t, "link", "del", s.ServerDev)
				}
			}
			qt.Assert(t, qt.HasLen(s.Recover(t, dispatcher.RecoverOptions{}), 1))
			qt.Check(t, qt.HasLen(s.Pins(t), 0))
		})
	}
}
