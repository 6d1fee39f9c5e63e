package scan

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

func TestMain(m *testing.M) {
	testenv.Main(m)
}

// all scans for the hooks.
func all(t *testing.T, o Options, hooks ...hook.Hook) []hook.Chain {
	t.Helper()
	o.Hooks = func(h hook.Hook) bool { return slices.Contains(hooks, h) }
	chains, err := All(t.Context(), o)
	qt.Assert(t, qt.IsNil(err))
	return chains
}

// in returns the chains of a namespace.
func in(chains []hook.Chain, ns string) []hook.Chain {
	return slices.DeleteFunc(chains, func(c hook.Chain) bool { return c.NetNS.Name != ns })
}

// program loads a program that returns a number.
func program(t *testing.T, name string, typ ebpf.ProgramType, at ebpf.AttachType, ret int32) *ebpf.Program {
	t.Helper()
	return testenv.Load(t, &ebpf.ProgramSpec{
		Name: name, Type: typ, AttachType: at, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, ret), asm.Return()},
	})
}

// own attaches by a link that the test closes at its end, and returns the link's id.
func own(t *testing.T, l link.Link, err error) uint32 {
	t.Helper()
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { l.Close() })
	info, err := l.Info()
	qt.Assert(t, qt.IsNil(err))
	return uint32(info.ID)
}

// open opens a file for the length of the test.
func open(t *testing.T, path string) int {
	t.Helper()
	f, err := os.Open(path)
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { f.Close() })
	return int(f.Fd())
}

// wantMember checks the description of a program.
func wantMember(t *testing.T, m hook.Member, prog *ebpf.Program, kind hook.Kind, linkID uint32) {
	t.Helper()
	info, err := prog.Info()
	qt.Assert(t, qt.IsNil(err))
	id, _ := info.ID()
	qt.Check(t, qt.Equals(m.Program.ID, uint32(id)))
	qt.Check(t, qt.Equals(m.Program.Name, info.Name))
	qt.Check(t, qt.Equals(m.Name, info.Name))
	qt.Check(t, qt.Equals(m.Program.Tag, info.Tag))
	qt.Check(t, qt.Equals(m.Program.LoadedBy, uint32(os.Getuid())))
	qt.Check(t, qt.IsFalse(m.Program.LoadedAt.IsZero()))
	qt.Check(t, qt.Equals(m.Kind, kind))
	qt.Check(t, qt.Equals(m.State, hook.StateRunning))
	qt.Check(t, qt.Equals(m.LinkID, linkID))
}

func TestSKLookup(t *testing.T) {
	testenv.CheckLeaks(t)
	ns := testenv.NewNetNS(t)
	fd := open(t, ns.Path())
	one := program(t, "ldt_one", ebpf.SkLookup, ebpf.AttachSkLookup, 1)
	two := program(t, "ldt_two", ebpf.SkLookup, ebpf.AttachSkLookup, 1)
	var ids []uint32
	progs := []*ebpf.Program{two, one, two}
	for _, p := range progs {
		l, err := link.AttachNetNs(fd, p)
		ids = append(ids, own(t, l, err))
	}
	for _, o := range []Options{{}, {NetNS: ns.Name}} {
		chains := all(t, o, hook.SKLookup)
		if o.NetNS == "" {
			chains = in(chains, ns.Name)
		}
		qt.Assert(t, qt.HasLen(chains, 1))
		c := chains[0]
		qt.Check(t, qt.IsNil(c.Err))
		qt.Check(t, qt.Equals(c.Hook, hook.SKLookup))
		qt.Check(t, qt.Equals(c.Target, ""))
		qt.Check(t, qt.Equals(c.NetNS.Cookie != 0, testenv.Has(t, testenv.FeatureNetNSCookie)))
		qt.Check(t, qt.IsTrue(c.Protected()))
		qt.Assert(t, qt.HasLen(c.Members, 3))
		for i, m := range c.Members {
			wantMember(t, m, progs[i], hook.KindForeign, ids[i])
		}
	}
}

func TestFlowDissector(t *testing.T) {
	testenv.CheckLeaks(t)
	byLink, legacy := testenv.NewNetNS(t), testenv.NewNetNS(t)
	prog := program(t, "ldt_dissect", ebpf.FlowDissector, ebpf.AttachFlowDissector, 0)
	l, err := link.AttachNetNs(open(t, byLink.Path()), prog)
	id := own(t, l, err)
	legacy.Do(t, func() {
		err := link.RawAttachProgram(link.RawAttachProgramOptions{Program: prog, Attach: ebpf.AttachFlowDissector})
		qt.Assert(t, qt.IsNil(err))
	})
	defer legacy.Do(t, func() {
		err := link.RawDetachProgram(link.RawDetachProgramOptions{Program: prog, Attach: ebpf.AttachFlowDissector})
		qt.Check(t, qt.IsNil(err))
	})

	chains := all(t, Options{}, hook.FlowDissector)
	mine := in(slices.Clone(chains), byLink.Name)
	qt.Assert(t, qt.HasLen(mine, 1))
	qt.Assert(t, qt.HasLen(mine[0].Members, 1))
	wantMember(t, mine[0].Members[0], prog, hook.KindForeign, id)

	mine = in(chains, legacy.Name)
	qt.Assert(t, qt.HasLen(mine, 1))
	qt.Assert(t, qt.HasLen(mine[0].Members, 1))
	wantMember(t, mine[0].Members[0], prog, hook.KindLegacy, 0)
	qt.Check(t, qt.IsFalse(mine[0].Protected()))
}

// A fake reader reads the hooks that can have members.
type fake struct{ root string }

var errBadDevice = errors.New("bad device")

func (fake) Devices(_ context.Context, ns *kernel.NetNS) ([]hook.Chain, error) {
	m := []hook.Member{{}}
	return []hook.Chain{
		{Hook: hook.TCXIngress, Ifindex: 2, NetNS: ns.ID(), Members: m},
		{Hook: hook.XDP, Ifindex: 2, NetNS: ns.ID(), Members: m},
		{Hook: hook.XDP, Ifindex: 3, NetNS: ns.ID()}, // nothing there
		{Hook: hook.TCEgress, Ifindex: 1, NetNS: ns.ID(), Err: errBadDevice},
	}, errBadDevice
}

func (f fake) Cgroup(_ context.Context, path string) []hook.Chain {
	if path != f.root {
		return nil
	}
	return []hook.Chain{{Hook: hook.CgroupSysctl, Target: path, Members: []hook.Member{{}}}}
}

func (fake) Defunct(context.Context) []hook.Chain {
	return []hook.Chain{{Hook: hook.TCXEgress, Members: []hook.Member{{}}}}
}

func TestOrder(t *testing.T) {
	testenv.CheckLeaks(t)
	first, second := testenv.NewNetNS(t), testenv.NewNetNS(t)
	root, err := kernel.CgroupRoot()
	qt.Assert(t, qt.IsNil(err))
	look := func(o Options) []hook.Chain {
		o.Hooks = func(hook.Hook) bool { return true }
		s := &scan{Options: o, reader: fake{root}, shown: map[uint32]bool{}, places: map[place]bool{}}
		chains, err := s.all(t.Context())
		qt.Assert(t, qt.IsNil(err))
		return chains
	}
	chains := look(Options{})

	// The order is by namespace, device and hook; then come cgroups.
	type entry struct {
		hook    hook.Hook
		ifindex int
	}
	for _, ns := range []string{"", first.Name, second.Name} {
		var got []entry
		for _, c := range chains {
			if c.NetNS.Name == ns && c.NetNS.Inode != 0 && c.Ifindex != 0 {
				got = append(got, entry{c.Hook, c.Ifindex})
			}
		}
		want := []entry{{hook.TCEgress, 1}, {hook.XDP, 2}, {hook.TCXIngress, 2}}
		qt.Check(t, qt.IsTrue(slices.Equal(got, want)), qt.Commentf("%q: %v", ns, got))
	}
	var names []string
	for _, c := range chains {
		if c.Ifindex != 0 {
			names = append(names, c.NetNS.Name)
		}
	}
	qt.Check(t, qt.IsTrue(slices.IsSorted(names)), qt.Commentf("%q", names))
	gone := chains[len(chains)-1]
	qt.Check(t, qt.Equals(gone.Hook, hook.TCXEgress))
	last := chains[len(chains)-2]
	qt.Check(t, qt.Equals(last.Target, root))
	qt.Check(t, qt.Equals(last.Hook, hook.CgroupSysctl))

	qt.Check(t, qt.ErrorIs(chains[0].Err, errBadDevice)) // the whole namespace

	// A scan of one namespace leaves cgroups out.
	chains = look(Options{NetNS: first.Name})
	qt.Check(t, qt.HasLen(slices.DeleteFunc(chains, func(c hook.Chain) bool { return !c.Hook.OnCgroup() }), 0))
}

func TestEnd(t *testing.T) {
	testenv.CheckLeaks(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := All(ctx, Options{})
	qt.Check(t, qt.ErrorIs(err, context.Canceled))
	_, err = All(t.Context(), Options{NetNS: "ldt-none"})
	qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
}

// A namespace that cannot be entered does not spoil the rest.
func TestBadNamespace(t *testing.T) {
	testenv.CheckLeaks(t)
	ns := testenv.NewNetNS(t)
	gone, err := kernel.OpenNetNS(ns.Name)
	qt.Assert(t, qt.IsNil(err))
	gone.Release()
	qt.Assert(t, qt.IsNil(ns.Delete()))
	chains := new(scan).netNS(t.Context(), gone)
	qt.Assert(t, qt.HasLen(chains, 1))
	qt.Check(t, qt.Equals(chains[0].NetNS, gone.ID()))
	qt.Check(t, qt.ErrorIs(chains[0].Err, kernel.ErrNetNSGone))
}
