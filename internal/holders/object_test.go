package holders_test

import (
	"fmt"
	"os"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/holders"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

func programRef(t *testing.T, p *ebpf.Program) hook.HolderRef {
	t.Helper()
	info, err := p.Info()
	qt.Assert(t, qt.IsNil(err))
	id, _ := info.ID()
	return hook.HolderRef{Kind: hook.HolderProgram, ID: uint32(id)}
}

func mapRef(t *testing.T, m *ebpf.Map) hook.HolderRef {
	t.Helper()
	info, err := m.Info()
	qt.Assert(t, qt.IsNil(err))
	id, _ := info.ID()
	return hook.HolderRef{Kind: hook.HolderMap, ID: uint32(id)}
}

func linkRef(t *testing.T, l link.Link) hook.HolderRef {
	t.Helper()
	info, err := l.Info()
	qt.Assert(t, qt.IsNil(err))
	return hook.HolderRef{Kind: hook.HolderLink, ID: uint32(info.ID)}
}

func newMap(t *testing.T, spec *ebpf.MapSpec) *ebpf.Map {
	t.Helper()
	m, err := ebpf.NewMap(spec)
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { m.Close() })
	return m
}

func TestProgram(t *testing.T) {
	testenv.CheckLeaks(t)
	p := newHolder(t)
	bpffs := testenv.BPFFS(t)
	prog, _ := testenv.CgroupProgram(t, "ldt_hold", hook.CgroupConnect4, 1)
	ref := programRef(t, prog)
	l, err := link.AttachCgroup(link.CgroupOptions{Path: testenv.NewCgroup(t).Path, Attach: ebpf.AttachCGroupInet4Connect, Program: prog})
	qt.Assert(t, qt.IsNil(err))
	defer l.Close()
	array := newMap(t, &ebpf.MapSpec{Name: "ldt_array", Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 5})
	large := newMap(t, &ebpf.MapSpec{Name: "ldt_large", Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 5000})
	for _, err := range []error{array.Put(uint32(1), prog), array.Put(uint32(4), prog), large.Put(uint32(4999), prog)} {
		qt.Assert(t, qt.IsNil(err))
	}
	fd := p.ask("open program %d", ref.ID)
	p.do("pin program %d %s/one", ref.ID, bpffs)

	h := complete(t, ref)
	qt.Check(t, qt.DeepEquals(processes(h), map[int][]int{p.Pid: {fd}}))
	qt.Assert(t, qt.HasLen(h.Pins, 1))
	qt.Check(t, qt.Equals(h.Pins[0].Path, bpffs+"/one"))
	qt.Check(t, qt.DeepEquals(h.Objects, []hook.HolderObject{
		{HolderRef: linkRef(t, l), How: "carries it", References: 1},
		{HolderRef: mapRef(t, array), How: "slot", References: 2},
		{HolderRef: mapRef(t, large), How: "slot", References: 1},
	}))
	qt.Check(t, qt.Equals(h.Counted, 6))
}

// XDP takes more references than the link's: one for each device, and one for all
// devices.
func TestProgramXDP(t *testing.T) {
	for _, mode := range []link.XDPAttachFlags{link.XDPGenericMode, link.XDPDriverMode} {
		t.Run(fmt.Sprint(mode), func(t *testing.T) {
			testenv.CheckLeaks(t)
			pair := testenv.NewPair(t)
			prog := testenv.VerdictProgram(t, "ldt_hold", testenv.XDPPass)
			ref := programRef(t, prog)
			qt.Check(t, qt.Equals(complete(t, ref).Counted, 0))
			attach := func(ifindex int) {
				l, err := link.AttachXDP(link.XDPOptions{Program: prog, Interface: ifindex, Flags: mode})
				qt.Assert(t, qt.IsNil(err))
				t.Cleanup(func() { l.Close() })
			}
			pair.Server.Do(t, func() { attach(pair.ServerIfindex) })
			qt.Check(t, qt.Equals(complete(t, ref).Counted, 3))
			pair.Client.Do(t, func() { attach(pair.ClientIfindex) })
			qt.Check(t, qt.Equals(complete(t, ref).Counted, 5))
			pair.Server.IP(t, "link", "del", pair.ServerDev)
			qt.Check(t, qt.Equals(complete(t, ref).Counted, 2)) // links without a device
		})
	}
}

// Links of other types carry a program, too.
func TestProgramLinks(t *testing.T) {
	needed := map[string]testenv.Feature{
		"tcx": testenv.FeatureTCX, "netfilter": testenv.FeatureNetfilterLink, "perf event": testenv.FeaturePerfLink,
	}
	simple := func(kind ebpf.ProgramType, at ebpf.AttachType, to string) *ebpf.ProgramSpec {
		return &ebpf.ProgramSpec{
			Name: "ldt_hold", Type: kind, AttachType: at, AttachTo: to, License: "GPL",
			Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
		}
	}
	for _, test := range []struct {
		name   string
		spec   *ebpf.ProgramSpec
		attach func(*testing.T, *ebpf.Program) (link.Link, error)
	}{
		{"tcx", simple(ebpf.SchedCLS, 0, ""), func(t *testing.T, p *ebpf.Program) (l link.Link, err error) {
			pair := testenv.NewPair(t)
			pair.Server.Do(t, func() {
				l, err = link.AttachTCX(link.TCXOptions{Interface: pair.ServerIfindex, Program: p, Attach: ebpf.AttachTCXIngress})
			})
			return l, err
		}},
		{"netfilter", simple(ebpf.Netfilter, ebpf.AttachNetfilter, ""), func(t *testing.T, p *ebpf.Program) (l link.Link, err error) {
			testenv.NewNetNS(t).Do(t, func() {
				l, err = link.AttachNetfilter(link.NetfilterOptions{Program: p, ProtocolFamily: 2, Hook: 1, Priority: 7})
			})
			return l, err
		}},
		{"sk_lookup", simple(ebpf.SkLookup, ebpf.AttachSkLookup, ""), func(t *testing.T, p *ebpf.Program) (link.Link, error) {
			ns, err := os.Open(testenv.NewNetNS(t).Path())
			qt.Assert(t, qt.IsNil(err))
			defer ns.Close()
			return link.AttachNetNs(int(ns.Fd()), p)
		}},
		{"iterator", simple(ebpf.Tracing, ebpf.AttachTraceIter, "bpf_map"), func(_ *testing.T, p *ebpf.Program) (link.Link, error) {
			return link.AttachIter(link.IterOptions{Program: p})
		}},
		{"raw tracepoint", simple(ebpf.RawTracepoint, 0, ""), func(_ *testing.T, p *ebpf.Program) (link.Link, error) {
			return link.AttachRawTracepoint(link.RawTracepointOptions{Name: "sched_process_exit", Program: p})
		}},
		{"perf event", simple(ebpf.PerfEvent, 0, ""), func(t *testing.T, p *ebpf.Program) (link.Link, error) {
			event := &unix.PerfEventAttr{Type: unix.PERF_TYPE_SOFTWARE, Config: unix.PERF_COUNT_SW_CPU_CLOCK, Size: unix.PERF_ATTR_SIZE_VER0, Sample: 1 << 40}
			fd, err := unix.PerfEventOpen(event, 0, -1, -1, unix.PERF_FLAG_FD_CLOEXEC)
			qt.Assert(t, qt.IsNil(err))
			defer unix.Close(fd)
			return link.AttachRawLink(link.RawLinkOptions{Target: fd, Program: p, Attach: ebpf.AttachPerfEvent})
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			if feature := needed[test.name]; feature != "" {
				testenv.Need(t, feature)
			}
			testenv.CheckLeaks(t)
			test.spec.Instructions[0] = asm.Mov.Imm(asm.R0, 0)
			prog := testenv.Load(t, test.spec)
			l, err := test.attach(t, prog)
			qt.Assert(t, qt.IsNil(err))
			defer l.Close()
			h := complete(t, programRef(t, prog))
			qt.Check(t, qt.Equals(h.Objects[0], hook.HolderObject{HolderRef: linkRef(t, l), How: "carries it", References: 1}))
		})
	}
}

// The answer says that it does not cover programs that are attached without a link.
func TestProgramWithoutLink(t *testing.T) {
	testenv.CheckLeaks(t)
	prog, _ := testenv.CgroupProgram(t, "ldt_hold", hook.CgroupConnect4, 1)
	dir, err := os.Open(testenv.NewCgroup(t).Path)
	qt.Assert(t, qt.IsNil(err))
	defer dir.Close()
	err = link.RawAttachProgram(link.RawAttachProgramOptions{Target: int(dir.Fd()), Program: prog, Attach: ebpf.AttachCGroupInet4Connect})
	qt.Assert(t, qt.IsNil(err))
	h := look(t, programRef(t, prog))
	qt.Check(t, qt.Equals(h.Counted, 1))
	qt.Check(t, qt.StringContains(h.Missing, "attached to without a link"))

	f := holders.Open(holders.Options{})
	defer f.Close()
	view, err := f.Look(hook.HolderProgram)
	qt.Assert(t, qt.IsNil(err))
	legacy := hook.HolderObject{How: "attached to a cgroup", References: 1}
	view.Add(h.HolderRef, legacy)
	h, err = view.Of(h.HolderRef)
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.DeepEquals(h.Objects, []hook.HolderObject{legacy}))
	qt.Check(t, qt.IsTrue(h.Verified))
}

func TestMap(t *testing.T) {
	testenv.CheckLeaks(t)
	p := newHolder(t)
	bpffs := testenv.BPFFS(t)
	inner := &ebpf.MapSpec{Name: "ldt_inner", Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1}
	m := newMap(t, inner)
	ref := mapRef(t, m)
	array := newMap(t, &ebpf.MapSpec{Name: "ldt_outer", Type: ebpf.ArrayOfMaps, KeySize: 4, ValueSize: 4, MaxEntries: 3, InnerMap: inner})
	hash := newMap(t, &ebpf.MapSpec{Name: "ldt_outer2", Type: ebpf.HashOfMaps, KeySize: 4, ValueSize: 4, MaxEntries: 3, InnerMap: inner})
	for _, err := range []error{array.Put(uint32(0), m), array.Put(uint32(2), m), hash.Put(uint32(7), m)} {
		qt.Assert(t, qt.IsNil(err))
	}
	prog := testenv.Load(t, &ebpf.ProgramSpec{
		Name: "ldt_uses", Type: ebpf.XDP, License: "GPL",
		Instructions: asm.Instructions{asm.LoadMapPtr(asm.R1, m.FD()), asm.Mov.Imm(asm.R0, 2), asm.Return()},
	})
	fd := p.ask("open map %d", ref.ID)
	p.do("pin map %d %s/one", ref.ID, bpffs)

	h := complete(t, ref)
	qt.Check(t, qt.DeepEquals(processes(h), map[int][]int{p.Pid: {fd}}))
	qt.Check(t, qt.HasLen(h.Pins, 1))
	qt.Check(t, qt.DeepEquals(h.Objects, []hook.HolderObject{
		{HolderRef: mapRef(t, array), How: "has it as inner map", References: 2},
		{HolderRef: mapRef(t, hash), How: "has it as inner map", References: 1},
		{HolderRef: programRef(t, prog), How: "uses it", References: 1},
	}))
	qt.Check(t, qt.Equals(h.Counted, 6))
}

// Entries of maps refer to programs.
func TestDevMap(t *testing.T) {
	testenv.CheckLeaks(t)
	prog := testenv.Load(t, &ebpf.ProgramSpec{
		Name: "ldt_entry", Type: ebpf.XDP, AttachType: ebpf.AttachXDPCPUMap, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()},
	})
	m := newMap(t, &ebpf.MapSpec{Name: "ldt_cpumap", Type: ebpf.CPUMap, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	qt.Assert(t, qt.IsNil(m.Put(uint32(0), struct{ Size, FD uint32 }{64, uint32(prog.FD())})))
	h := complete(t, programRef(t, prog))
	qt.Check(t, qt.DeepEquals(h.Objects, []hook.HolderObject{{HolderRef: mapRef(t, m), How: "runs it for an entry", References: 1}}))
}
