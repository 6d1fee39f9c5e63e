package dispatcher_test

import (
	"io/fs"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// join is attach for any source.
func (s *scene) join(t testing.TB, from dispatcher.Source, o dispatcher.Options) *dispatcher.Link {
	t.Helper()
	link, err := s.tryJoin(t, from, o)
	qt.Assert(t, qt.IsNil(err))
	return link
}

func (s *scene) tryJoin(t testing.TB, from dispatcher.Source, o dispatcher.Options) (*dispatcher.Link, error) {
	t.Helper()
	if o.BPFFS == "" {
		o.BPFFS = s.bpffs
	}
	link, err := dispatcher.Attach(t.Context(), s.target, from, o)
	if err == nil {
		t.Cleanup(func() { link.Close() })
	}
	return link, err
}

// file is a program in one of the test objects.
func file(object, program string) dispatcher.Source {
	return dispatcher.File("testdata/"+object, dispatcher.LoadOptions{Program: program})
}

// wantRefused tries to attach what must be refused, and checks that nothing has changed by it.
func (s *scene) wantRefused(t testing.TB, from dispatcher.Source, o dispatcher.Options, cause error, text string) {
	t.Helper()
	before := s.read(t)
	_, err := s.tryJoin(t, from, o)
	qt.Check(t, qt.ErrorIs(err, cause))
	qt.Check(t, qt.ErrorMatches(err, "attach xdp veth1: "+text))
	qt.Check(t, qt.DeepEquals(s.read(t), before))

	o.BPFFS = s.bpffs
	_, err = dispatcher.Plan(t.Context(), s.target, from, o)
	qt.Check(t, qt.ErrorIs(err, cause))
}

// wantDropped checks which of the ports from 7000 on are dropped; the others must pass.
func (s *scene) wantDropped(t testing.TB, ports ...int) {
	t.Helper()
	want := map[int]int{}
	for p := port; p < port+8; p++ {
		want[p] = 5
	}
	for _, p := range ports {
		want[p] = 0
	}
	got := map[int]int{}
	for p := range want {
		got[p] = s.Passed(t, p, 5)
	}
	qt.Assert(t, qt.DeepEquals(got, want))
}

// Whoever loaded a program, and with what, it can be a member.
func TestOrigins(t *testing.T) {
	eachMode(t, func(t *testing.T, s *scene, mode hook.Mode) {
		byTool, object, first := filepath.Join(s.bpffs, "tool"), "testdata/several.o", "ldt_first"
		if !testenv.Has(t, testenv.FeatureFrags) { // bpftool loads all that is in the file
			object, first = "testdata/filter.o", "ldt_filter"
		}
		out, err := exec.Command("bpftool", "prog", "loadall", object, byTool).CombinedOutput()
		qt.Assert(t, qt.IsNil(err), qt.Commentf("%s", out))
		spec, err := ebpf.LoadCollectionSpec("testdata/several.o")
		qt.Assert(t, qt.IsNil(err))
		byID := testenv.DropUDPPort(t, "ldt_by_id", port+4)

		s.join(t, dispatcher.ProgramPin(byTool+"/"+first), dispatcher.Options{Mode: mode})
		s.join(t, file("several.o", "ldt_second"), dispatcher.Options{})
		s.join(t, dispatcher.Spec(spec, dispatcher.LoadOptions{Program: "ldt_frags"}), dispatcher.Options{})
		s.join(t, dispatcher.Program(testenv.DropUDPPort(t, "ldt_by_fd", port+3)), dispatcher.Options{})
		s.join(t, dispatcher.ProgramID(idOf(t, byID)), dispatcher.Options{})
		s.join(t, file("nobtf.o", ""), dispatcher.Options{})
		s.wantChain(t, first+" ldt_second ldt_frags ldt_by_fd ldt_by_id ldt_nobtf")
		s.wantDropped(t, port, port+1, port+2, port+3, port+4)

		// The caller's spec is not changed: it can be used again.
		qt.Check(t, qt.HasLen(spec.Programs, 6))
	})
}

// Sources that are no program at all.
func TestNoProgram(t *testing.T) {
	s := newScene(t)
	m, err := ebpf.NewMap(&ebpf.MapSpec{Name: "ldt_map", Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	qt.Assert(t, qt.IsNil(err))
	defer m.Close()
	pinned := filepath.Join(s.bpffs, "map")
	qt.Assert(t, qt.IsNil(m.Pin(pinned)))
	link := s.attach(t, s.tracer(t, 1, testenv.XDPPass), dispatcher.Options{})
	for name, test := range map[string]struct {
		from  dispatcher.Source
		cause error
		text  string
	}{
		"nil":         {dispatcher.Program(nil), dispatcher.ErrUsage, `the program is nil`},
		"zero":        {dispatcher.Source{}, dispatcher.ErrUsage, `.*program.*`},
		"nil spec":    {dispatcher.Spec(nil, dispatcher.LoadOptions{}), dispatcher.ErrUsage, `the collection spec is nil`},
		"id 0":        {dispatcher.ProgramID(0), fs.ErrNotExist, `.*program.*id 0.*`},
		"unknown id":  {dispatcher.ProgramID(1 << 30), fs.ErrNotExist, `.*program.*id 1073741824.*"bpftool prog" lists the loaded ones`},
		"missing pin": {dispatcher.ProgramPin(s.bpffs + "/missing"), fs.ErrNotExist, `.*pinned program .*/missing.*`},
	} {
		t.Run(name, func(t *testing.T) {
			s.wantRefused(t, test.from, dispatcher.Options{}, test.cause, test.text)
			qt.Check(t, qt.ErrorIs(link.Update(t.Context(), test.from), test.cause))
		})
	}
	for _, path := range []string{pinned, s.bpffs, "/etc/passwd", ""} {
		_, err := s.tryJoin(t, dispatcher.ProgramPin(path), dispatcher.Options{})
		qt.Check(t, qt.ErrorMatches(err, `attach xdp veth1: .*pinned program .*`), qt.Commentf("%q", path))
	}
	s.wantRun(t, 1)
}

// Programs of other kinds must be refused with the reason, not with the kernel's EINVAL alone.
func TestIncompatiblePrograms(t *testing.T) {
	s := newScene(t)
	insns := asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()}
	other := func(typ ebpf.ProgramType) dispatcher.Source {
		return dispatcher.Program(testenv.Load(t, &ebpf.ProgramSpec{Name: "ldt_other", Type: typ, Instructions: insns, License: "GPL"}))
	}
	link := s.attach(t, s.tracer(t, 1, testenv.XDPPass), dispatcher.Options{})
	type refused struct {
		from dispatcher.Source
		text string
	}
	tests := map[string]refused{
		"socket filter":  {other(ebpf.SocketFilter), `program "ldt_other" is a SocketFilter program; xdp takes XDP programs`},
		"sched_cls":      {other(ebpf.SchedCLS), `program "ldt_other" is a SchedCLS program; xdp takes XDP programs`},
		"devmap":         {dispatcher.Program(testenv.VerdictProgram(t, "ldt_devmap", 2, testenv.ExpectedAttachType(ebpf.AttachXDPDevMap))), `program "ldt_devmap": it was loaded for a map entry .*; load it from SEC\("xdp"\)`},
		"cpumap":         {dispatcher.Program(testenv.VerdictProgram(t, "ldt_cpumap", 2, testenv.ExpectedAttachType(ebpf.AttachXDPCPUMap))), `program "ldt_cpumap": it was loaded for a map entry .*`},
		"devmap in file": {file("several.o", "ldt_devmap"), `testdata/several.o: program "ldt_devmap" is for a map entry .*`},
		"cpumap in file": {file("several.o", "ldt_cpumap"), `testdata/several.o: program "ldt_cpumap" is for a map entry .*`},
		"tc in file":     {file("several.o", "tc"), `testdata/several.o: program "ldt_tc" is a SchedCLS program; xdp takes XDP programs`},
		"dispatcher":     {dispatcher.ProgramID(ebpf.ProgramID(s.read(t).DispatcherID)), `program "libdispatcher" is itself a dispatcher of libdispatcher`},
	}
	if testenv.Has(t, testenv.FeatureSlotTypes) {
		tests["attach type 0"] = refused{dispatcher.Program(testenv.VerdictProgram(t, "ldt_none", 2, testenv.ExpectedAttachType(ebpf.AttachNone))), `program "ldt_none" has no expected attach type, without frags, the chain attach type BPF_XDP, without frags, .*`}
	}
	if testenv.Has(t, testenv.FeatureFrags) {
		tests["frags"] = refused{dispatcher.Program(testenv.VerdictProgram(t, "ldt_frags", 2, testenv.Frags())), `program "ldt_frags" has attach type BPF_XDP, with frags, the chain attach type BPF_XDP, without frags, .*load it from SEC\("xdp"\)`}
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			s.wantRefused(t, test.from, dispatcher.Options{}, dispatcher.ErrIncompatible, test.text)
			err := link.Update(t.Context(), test.from)
			qt.Check(t, qt.ErrorIs(err, dispatcher.ErrIncompatible))
			qt.Check(t, qt.ErrorMatches(err, `replace xdp veth1: `+test.text))
			s.wantRun(t, 1)
		})
	}

	// On a free device they are refused as well, and the device stays free.
	qt.Assert(t, qt.IsNil(link.Close()))
	for _, typ := range []ebpf.AttachType{ebpf.AttachXDPDevMap, ebpf.AttachXDPCPUMap} {
		kinds := [][]testenv.ProgramOption{{testenv.ExpectedAttachType(typ)}, {testenv.ExpectedAttachType(typ), testenv.Frags()}}
		if !testenv.Has(t, testenv.FeatureFrags) {
			kinds = kinds[:1]
		}
		for _, opts := range kinds {
			s.wantRefused(t, dispatcher.Program(testenv.VerdictProgram(t, "ldt_map_entry", 2, opts...)), dispatcher.Options{}, dispatcher.ErrIncompatible, `.*map entry.*`)
		}
	}
	s.wantRefused(t, other(ebpf.SocketFilter), dispatcher.Options{}, dispatcher.ErrIncompatible, `.*xdp takes XDP programs`)
	s.wantRefused(t, file("noxdp.o", ""), dispatcher.Options{}, dispatcher.ErrIncompatible, `testdata/noxdp.o: no program for xdp in the file; .*`)
}

// The first member decides the kind of the chain; files are loaded to fit, and what is loaded already must.
func TestShapes(t *testing.T) {
	none, frags := testenv.ExpectedAttachType(ebpf.AttachNone), testenv.Frags()
	type misfit struct {
		opts  []testenv.ProgramOption
		why   string
		frags bool // other frags than the chain's; else only another attach type
	}
	for _, test := range []struct {
		name    string
		first   []testenv.ProgramOption
		fits    []string // programs of several.o
		refused string   // why ldt_second is not among them
		misfits []misfit // programs that are loaded already
	}{
		{
			name: "plain", fits: []string{"ldt_second", "ldt_frags"},
			misfits: []misfit{
				{[]testenv.ProgramOption{none}, `.*no expected attach type.* give the file, which is then loaded to fit`, false},
				{[]testenv.ProgramOption{frags}, `.*load it from SEC\("xdp"\)`, true},
			},
		},
		{
			name: "attach type 0", first: []testenv.ProgramOption{none}, fits: []string{"ldt_second", "ldt_frags"},
			misfits: []misfit{
				{nil, `.*has attach type BPF_XDP, without frags, the chain no expected attach type, without frags, .* give the file, which is then loaded to fit`, false},
				{[]testenv.ProgramOption{frags}, `.*load it from SEC\("xdp"\)`, true},
			},
		},
		{
			name: "frags", first: []testenv.ProgramOption{frags}, fits: []string{"ldt_frags"}, refused: `.*without frags, the chain .*with frags, .*SEC\("xdp.frags"\).*`,
			misfits: []misfit{{nil, `.*would see only the first buffer of a packet; load it from SEC\("xdp.frags"\).*`, true}},
		},
		{
			name: "both", first: []testenv.ProgramOption{none, frags}, fits: []string{"ldt_frags"}, refused: `.*SEC\("xdp.frags"\).*`,
			misfits: []misfit{{nil, `.*`, true}, {[]testenv.ProgramOption{frags}, `.*`, false}, {[]testenv.ProgramOption{none}, `.*`, true}},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			if test.refused != "" {
				testenv.Need(t, testenv.FeatureFrags)
			}
			s := newScene(t)
			s.attach(t, testenv.DropUDPPort(t, "ldt_one", port, test.first...), dispatcher.Options{})
			dropped := []int{port, port + 3}
			for _, name := range test.fits {
				s.join(t, file("several.o", name), dispatcher.Options{})
				dropped = append(dropped, map[string]int{"ldt_second": port + 1, "ldt_frags": port + 2}[name])
			}
			s.attach(t, testenv.DropUDPPort(t, "ldt_same", port+3, test.first...), dispatcher.Options{})
			if test.refused != "" {
				s.wantRefused(t, file("several.o", "ldt_second"), dispatcher.Options{}, dispatcher.ErrIncompatible, test.refused)
			}
			for _, m := range test.misfits {
				if m.frags && !testenv.Has(t, testenv.FeatureFrags) {
					continue // nobody can load it
				}
				if !m.frags && !testenv.Has(t, testenv.FeatureSlotTypes) {
					prog := testenv.DropUDPPort(t, "ldt_other_type", port+4, m.opts...)
					s.join(t, dispatcher.Program(prog), dispatcher.Options{}) // what this kernel takes is a member
					dropped = append(dropped, port+4)
					continue
				}
				prog := testenv.VerdictProgram(t, "ldt_misfit", testenv.XDPDrop, m.opts...)
				s.wantRefused(t, dispatcher.Program(prog), dispatcher.Options{}, dispatcher.ErrIncompatible, m.why)
			}
			s.wantDropped(t, dropped...)
		})
	}
}

// The kernel skips tail calls beyond its limit without a word. So all 32 must run, and a 33rd must not get in.
func TestFullChain(t *testing.T) {
	eachMode(t, func(t *testing.T, s *scene, mode hook.Mode) {
		var want []int
		var links []*dispatcher.Link
		for i := range hook.MaxMembers {
			links = append(links, s.attach(t, s.tracer(t, i, testenv.XDPPass), dispatcher.Options{Mode: mode}))
			want = append(want, i)
		}
		s.wantRun(t, want...)
		one := dispatcher.Program(s.tracer(t, 99, testenv.XDPPass))
		s.wantRefused(t, one, dispatcher.Options{}, dispatcher.ErrChainFull, `the chain has 32 members, .*`)
		s.wantRefused(t, one, dispatcher.Options{Name: "ldt_trace_0"}, fs.ErrExist, `.*`)
		s.wantRun(t, want...)

		// All of them may change their mind, and when one leaves there is room again.
		qt.Assert(t, qt.IsNil(links[0].Set(t.Context(), hook.Settings{Priority: hook.MaxPriority, ContinueOn: hook.Never})))
		qt.Assert(t, qt.IsNil(links[31].Update(t.Context(), one)))
		want = append(want[1:31:31], 99, 0)
		s.wantRun(t, want...)
		qt.Assert(t, qt.IsNil(links[5].Close()))
		s.attach(t, s.tracer(t, 100, testenv.XDPPass), dispatcher.Options{})
		s.wantRun(t, append(append(want[:4:4], want[5:31]...), 100, 0)...)
	})
}

// A member with tail calls of its own: it works, and is marked, since its calls count towards the kernel's limit.
func TestMemberWithTailCalls(t *testing.T) {
	for name, first := range map[string][]testenv.ProgramOption{
		"plain": nil, "attach type 0": {testenv.ExpectedAttachType(ebpf.AttachNone)},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t)
			s.attach(t, s.trace.Program(t, 1, testenv.XDPPass, first...), dispatcher.Options{})
			s.join(t, file("tailcall.o", "ldt_entry"), dispatcher.Options{})
			s.attach(t, testenv.DropUDPPort(t, "ldt_drop", port+1, first...), dispatcher.Options{})
			s.wantDropped(t, port, port+1)
			c := s.read(t)
			for _, m := range c.Members {
				qt.Check(t, qt.Equals(m.TailCalls, m.Name == "ldt_entry"), qt.Commentf("%s", m.Name))
			}
		})
	}
}

// Members change packets: what the first one does to the headers or the metadata, the next one finds.
func TestMembersThatChangePackets(t *testing.T) {
	for _, pair := range [][2]string{{"ldt_grow", "ldt_shrink"}, {"ldt_mark", "ldt_marked"}} {
		t.Run(pair[0], func(t *testing.T) {
			eachMode(t, func(t *testing.T, s *scene, mode hook.Mode) {
				s.join(t, file("adjust.o", pair[1]), dispatcher.Options{Mode: mode, Settings: priority(20)})
				qt.Assert(t, qt.IsTrue(s.drops(t))) // alone it finds nothing
				s.join(t, file("adjust.o", pair[0]), dispatcher.Options{Settings: priority(10)})
				qt.Check(t, qt.Equals(s.Passed(t, port, 100), 100))
				qt.Check(t, qt.Equals(s.Passed6(t, port, 100), 100))
			})
		})
	}
}

// Jumbo frames: the driver refuses a chain that would see only a part of each, and the message says what to do.
func TestBigMTU(t *testing.T) {
	s := newScene(t)
	s.Client.IP(t, "link", "set", s.ClientDev, "mtu", "9000")
	s.Server.IP(t, "link", "set", s.ServerDev, "mtu", "9000")
	for _, mode := range []hook.Mode{hook.ModeAuto, hook.ModeNative} {
		_, err := s.tryJoin(t, dispatcher.Program(s.tracer(t, 1, testenv.XDPPass)), dispatcher.Options{Mode: mode})
		qt.Check(t, qt.ErrorMatches(err, `attach xdp veth1: the kernel or the driver refused the dispatcher: .*MTU.*frags.*generic mode.*`))
	}
	s.wantFree(t)

	if testenv.Has(t, testenv.FeatureFrags) {
		frags := s.attach(t, s.trace.Program(t, 2, testenv.XDPPass, testenv.Frags()), dispatcher.Options{Mode: hook.ModeNative})
		s.wantRun(t, 2)
		qt.Assert(t, qt.IsNil(frags.Close()))
	}
	s.attach(t, s.tracer(t, 3, testenv.XDPPass), dispatcher.Options{Mode: hook.ModeGeneric})
	s.wantRun(t, 3)
}

// Devices of other kinds: loopback has no native XDP, which auto falls back from and native must not.
func TestDeviceWithoutNativeXDP(t *testing.T) {
	s := newScene(t)
	lo := s.onDevice(dispatcher.XDP("lo").In(s.Server.Name))
	_, err := lo.tryJoin(t, dispatcher.Program(s.tracer(t, 1, testenv.XDPPass)), dispatcher.Options{Mode: hook.ModeNative})
	qt.Check(t, qt.ErrorIs(err, ebpf.ErrNotSupported))
	qt.Check(t, qt.ErrorMatches(err, `attach xdp lo: the driver has no native XDP: .*; use generic mode`))
	lo.attach(t, s.tracer(t, 1, testenv.XDPPass), dispatcher.Options{})
	qt.Check(t, qt.Equals(lo.read(t).Mode, hook.ModeGeneric))
}
