package scene

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// AdoptOptions returns o for the entry with that program; for the only entry if the program is nil.
func (s *Scene) AdoptOptions(t testing.TB, o dispatcher.AdoptOptions, entry *ebpf.Program) dispatcher.AdoptOptions {
	t.Helper()
	o.BPFFS = s.BPFFS
	if entry != nil {
		o.Entry = hook.ProgramRef(uint32(ID(t, entry)))
	}
	return o
}

// Side is ingress or egress.
func (s *Scene) Side() string { return filepath.Base(string(s.Target.Hook)) }

// Dev is the name of the device.
func (s *Scene) Dev() string { return s.Target.Device }

// Filter makes a filter with the program, with tc.
func (s *Scene) Filter(t testing.TB, prog *ebpf.Program, how string) {
	t.Helper()
	path := s.Pinned(t, prog)
	defer os.Remove(path)
	s.AddFilter(t, how+" object-pinned "+path)
}

// AddFilter adds a filter, as tc has it.
func (s *Scene) AddFilter(t testing.TB, how string) {
	t.Helper()
	if !strings.Contains(s.NS().TC(t, "qdisc", "show", "dev", s.Dev()), "clsact") {
		s.NS().TC(t, "qdisc", "add", "dev", s.Dev(), "clsact")
	}
	s.NS().TC(t, append([]string{"filter", "add", "dev", s.Dev(), s.Side()}, strings.Fields(how)...)...)
}

// NewOn is [New] on a hook, see [NeedPlaces].
func NewOn(t testing.TB, h hook.Hook) *Scene {
	t.Helper()
	NeedPlaces(t, h)
	return New(t).OnHook(t, h)
}

// NeedPlaces leaves a test out on a kernel without the hook, or, on a cgroup, without places among others. Package contract
// tests what such a kernel can do.
func NeedPlaces(t testing.TB, h hook.Hook) {
	t.Helper()
	testenv.NeedHook(t, h)
	if h.OnCgroup() {
		testenv.Need(t, testenv.FeatureCgroupOrder)
	}
}

// OnHook is the same scene on another hook. Its packets go from the client to the server: they meet what is on the ingress
// side of the server's device and on the egress side of the client's. On a cgroup there is a process.
func (s *Scene) OnHook(t testing.TB, h hook.Hook) *Scene {
	t.Helper()
	switch {
	case h.OnCgroup():
		cgroup := testenv.NewCgroup(t)
		s = s.OnDevice(dispatcher.On(h, cgroup.Path))
		s.Cgroup, s.Resident = cgroup, cgroup.Enter(t, s.Client)
		return s
	case h == hook.TCXEgress, h == hook.TCEgress:
		return s.OnDevice(dispatcher.On(h, s.ClientDev).In(s.Client.Name))
	}
	return s.OnDevice(dispatcher.On(h, s.ServerDev).In(s.Server.Name))
}

// NS is the namespace that the device is in.
func (s *Scene) NS() *testenv.NetNS {
	if s.Target.NetNS == s.Client.Name {
		return s.Client
	}
	return s.Server
}

// SameOn is the same scene with another hook of the device.
func (s *Scene) SameOn(h hook.Hook) *Scene {
	target := s.Target
	target.Hook = h
	return s.OnDevice(target)
}

// Filters says whether the members are filters of clsact.
func (s *Scene) Filters() bool { return s.Target.Hook.Family() == "tc" }

// Foreign attaches a program as another tool does, by a link that it holds; on XDP in native mode.
func (s *Scene) Foreign(t testing.TB, prog *ebpf.Program, at ...kernel.Neighbor) (l link.Link, id uint32) {
	t.Helper()
	if s.Target.Hook == hook.XDP {
		s.NS().Do(t, func() { l = Hold(t, prog, IfindexOf(t, s.Target.Device)) })
	} else {
		err := s.OnTarget(t, func(target int) (err error) {
			l, err = kernel.CreateLink(prog, target, testenv.AttachType(s.Target.Hook), append(at, kernel.Neighbor{})[0], 0)
			return err
		})
		qt.Assert(t, qt.IsNil(err))
		t.Cleanup(func() { l.Close() })
	}
	info, err := l.Info()
	qt.Assert(t, qt.IsNil(err))
	return l, uint32(info.ID)
}

// Linkless attaches a program as was done before there were links.
func (s *Scene) Linkless(t testing.TB, prog *ebpf.Program, flags uint32) {
	t.Helper()
	qt.Assert(t, qt.IsNil(s.TryLinkless(t, prog, flags)))
	t.Cleanup(func() { _ = s.Unlink(t, prog) })
}

// TryLinkless and Unlink are BPF_PROG_ATTACH and BPF_PROG_DETACH.
func (s *Scene) TryLinkless(t testing.TB, prog *ebpf.Program, flags uint32) error {
	t.Helper()
	return s.OnTarget(t, func(target int) error {
		return kernel.AttachProgram(prog, target, testenv.AttachType(s.Target.Hook), flags, nil)
	})
}

func (s *Scene) Unlink(t testing.TB, prog *ebpf.Program) error {
	t.Helper()
	return s.OnTarget(t, func(target int) error {
		return kernel.DetachProgram(prog, target, testenv.AttachType(s.Target.Hook))
	})
}

// OnTarget runs fn where the target has that number for bpf(2): an ifindex or a descriptor.
func (s *Scene) OnTarget(t testing.TB, fn func(target int) error) error {
	t.Helper()
	if s.Target.Hook.OnDevice() {
		return s.NS().Run(func() error { return fn(IfindexOf(t, s.Target.Device)) })
	}
	folder, err := os.Open(s.Target.Cgroup)
	qt.Assert(t, qt.IsNil(err))
	defer folder.Close()
	return fn(int(folder.Fd()))
}

// Records opens the records that are bound to the program of a member, or of another entry on the hook.
func (s *Scene) Records(t testing.TB, name string) state.Records {
	t.Helper()
	m := s.Read(t).Member(name)
	qt.Assert(t, qt.IsNotNil(m))
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(m.Program.ID))
	qt.Assert(t, qt.IsNil(err))
	defer prog.Close()
	records, err := state.RecordsOf(prog)
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(records.Close)
	return records
}
