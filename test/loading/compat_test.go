package loading

import (
	"io/fs"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/programs"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// A program can be a member, no matter what loaded it.
func TestOrigins(t *testing.T) {
	scene.EachMode(t, func(t *testing.T, s *scene.Scene, mode hook.Mode) {
		byTool, object, first := filepath.Join(s.BPFFS, "tool"), "../testdata/several.o", "ldt_first"
		if !testenv.Has(t, testenv.FeatureFrags) { // bpftool loads all that is in the file
			object, first = "../testdata/filter.o", "ldt_filter"
		}
		out, err := exec.Command("bpftool", "prog", "loadall", object, byTool).CombinedOutput()
		qt.Assert(t, qt.IsNil(err), qt.Commentf("%s", out))
		spec, err := ebpf.LoadCollectionSpec("../testdata/several.o")
		qt.Assert(t, qt.IsNil(err))
		byID := testenv.DropUDPPort(t, "ldt_by_id", scene.Port+4)

		s.Join(t, dispatcher.ProgramPin(byTool+"/"+first), dispatcher.Options{Mode: mode})
		s.Join(t, scene.File("several.o", "ldt_second"), dispatcher.Options{})
		s.Join(t, dispatcher.Spec(spec, dispatcher.LoadOptions{Program: "ldt_frags"}), dispatcher.Options{})
		s.Join(t, dispatcher.Program(testenv.DropUDPPort(t, "ldt_by_fd", scene.Port+3)), dispatcher.Options{})
		s.Join(t, dispatcher.ProgramID(uint32(scene.ID(t, byID))), dispatcher.Options{})
		s.Join(t, scene.File("nobtf.o", ""), dispatcher.Options{})
		s.WantChain(t, first+" ldt_second ldt_frags ldt_by_fd ldt_by_id ldt_nobtf")
		s.WantDropped(t, scene.Port, scene.Port+1, scene.Port+2, scene.Port+3, scene.Port+4)

		// The caller's spec is not changed: it can be used again.
		qt.Check(t, qt.HasLen(spec.Programs, 6))
	})
}

// Sources that are no program at all.
func TestNoProgram(t *testing.T) {
	s := scene.New(t)
	m, err := ebpf.NewMap(&ebpf.MapSpec{Name: "ldt_map", Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	qt.Assert(t, qt.IsNil(err))
	defer m.Close()
	pinned := filepath.Join(s.BPFFS, "map")
	qt.Assert(t, qt.IsNil(m.Pin(pinned)))
	link := s.Attach(t, s.Tracer(t, 1, testenv.XDPPass), dispatcher.Options{})
	for name, test := range map[string]struct {
		from  dispatcher.Source
		cause error
		text  string
	}{
		"nil":         {dispatcher.Program(nil), dispatcher.ErrUsage, `the program is nil`},
		"zero":        {dispatcher.Source{}, dispatcher.ErrUsage, `the source is empty: make one with Program, .*`},
		"nil spec":    {dispatcher.Spec(nil, dispatcher.LoadOptions{}), dispatcher.ErrUsage, `the collection spec is nil`},
		"id 0":        {dispatcher.ProgramID(0), fs.ErrNotExist, `.*program.*id 0.*`},
		"unknown id":  {dispatcher.ProgramID(1 << 30), fs.ErrNotExist, `.*program.*id 1073741824.*"bpftool prog" lists the loaded ones`},
		"missing pin": {dispatcher.ProgramPin(s.BPFFS + "/missing"), fs.ErrNotExist, `.*pinned program .*/missing.*`},
	} {
		t.Run(name, func(t *testing.T) {
			s.WantRefused(t, test.from, dispatcher.Options{}, test.cause, test.text)
			qt.Check(t, qt.ErrorIs(link.Update(t.Context(), test.from), test.cause))
		})
	}
	for path, text := range map[string]string{
		pinned: "is not a Program", s.BPFFS: "is a folder, not a pin.*", "/etc/passwd": "is not in a bpffs, so it is not a pin.*", "": "",
	} {
		_, err := s.TryJoin(t, dispatcher.ProgramPin(path), dispatcher.Options{})
		qt.Check(t, qt.ErrorMatches(err, `attach xdp veth1: .*pinned program .*`+text), qt.Commentf("%q", path))
	}
	s.WantRun(t, 1)
}

// Programs of other kinds must be refused with the reason, not with the kernel's EINVAL alone.
func TestIncompatiblePrograms(t *testing.T) {
	s := scene.New(t)
	insns := asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()}
	other := func(typ ebpf.ProgramType) dispatcher.Source {
		return dispatcher.Program(testenv.Load(t, &ebpf.ProgramSpec{Name: "ldt_other", Type: typ, Instructions: insns, License: "GPL"}))
	}
	link := s.Attach(t, s.Tracer(t, 1, testenv.XDPPass), dispatcher.Options{})
	type refused struct {
		from dispatcher.Source
		text string
	}
	tests := map[string]refused{
		"socket filter":  {other(ebpf.SocketFilter), `program "ldt_other" is a SocketFilter program; xdp takes XDP programs`},
		"sched_cls":      {other(ebpf.SchedCLS), `program "ldt_other" is a SchedCLS program; xdp takes XDP programs`},
		"devmap":         {dispatcher.Program(testenv.VerdictProgram(t, "ldt_devmap", 2, testenv.ExpectedAttachType(ebpf.AttachXDPDevMap))), `program "ldt_devmap": it was loaded for a map entry .*; load it from SEC\("xdp"\)`},
		"cpumap":         {dispatcher.Program(testenv.VerdictProgram(t, "ldt_cpumap", 2, testenv.ExpectedAttachType(ebpf.AttachXDPCPUMap))), `program "ldt_cpumap": it was loaded for a map entry .*`},
		"devmap in file": {scene.File("several.o", "ldt_devmap"), `../testdata/several.o: program "ldt_devmap" is for a map entry .*`},
		"cpumap in file": {scene.File("several.o", "ldt_cpumap"), `../testdata/several.o: program "ldt_cpumap" is for a map entry .*`},
		"tc in file":     {scene.File("several.o", "tc"), `../testdata/several.o: program "ldt_tc" is a SchedCLS program; xdp takes XDP programs`},
		"dispatcher":     {dispatcher.ProgramID(s.Read(t).DispatcherID), `program "libdispatcher" is itself a dispatcher of libdispatcher`},
	}
	if testenv.Has(t, testenv.FeatureSlotTypes) {
		tests["attach type 0"] = refused{dispatcher.Program(testenv.VerdictProgram(t, "ldt_none", 2, testenv.ExpectedAttachType(ebpf.AttachNone))), `program "ldt_none" has no expected attach type, without frags, the chain attach type BPF_XDP, without frags, .*`}
	}
	if testenv.Has(t, testenv.FeatureFrags) {
		tests["frags"] = refused{dispatcher.Program(testenv.VerdictProgram(t, "ldt_frags", 2, testenv.Frags())), `program "ldt_frags" has attach type BPF_XDP, with frags, the chain attach type BPF_XDP, without frags, .*load it from SEC\("xdp"\)`}
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			s.WantRefused(t, test.from, dispatcher.Options{}, dispatcher.ErrIncompatible, test.text)
			err := link.Update(t.Context(), test.from)
			qt.Check(t, qt.ErrorIs(err, dispatcher.ErrIncompatible))
			qt.Check(t, qt.ErrorMatches(err, `replace xdp veth1: `+test.text))
			s.WantRun(t, 1)
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
			s.WantRefused(t, dispatcher.Program(testenv.VerdictProgram(t, "ldt_map_entry", 2, opts...)), dispatcher.Options{}, dispatcher.ErrIncompatible, `.*map entry.*`)
		}
	}
	s.WantRefused(t, other(ebpf.SocketFilter), dispatcher.Options{}, dispatcher.ErrIncompatible, `.*xdp takes XDP programs`)
	s.WantRefused(t, scene.File("noxdp.o", ""), dispatcher.Options{}, dispatcher.ErrIncompatible, `../testdata/noxdp.o: no program for xdp in the file; .*`)
}

// begin makes a program that another tool attached the first member: it keeps its kind, whatever that is.
func begin(t *testing.T, s *scene.Scene, prog *ebpf.Program) {
	t.Helper()
	s.AttachLegacy(t, prog)
	s.Adopt(t, dispatcher.AdoptOptions{})
}

// A program without an expected attach type must not begin a chain: it would shut out all others. Where the kernel makes
// no difference it is a member as any other.
func TestWithoutAttachType(t *testing.T) {
	s := scene.New(t)
	none := dispatcher.Program(testenv.DropUDPPort(t, "ldt_none", scene.Port, testenv.ExpectedAttachType(ebpf.AttachNone)))
	dropped := []int{scene.Port + 1}
	if testenv.Has(t, testenv.FeatureSlotTypes) {
		s.WantRefused(t, none, dispatcher.Options{}, dispatcher.ErrIncompatible, `program "ldt_none" has no expected attach type, without frags, .*ProgramSpec\.AttachType = ebpf\.AttachXDP, .*`)
		s.WantFree(t)
	} else {
		s.Join(t, none, dispatcher.Options{})
		dropped = append(dropped, scene.Port)
	}
	s.Attach(t, testenv.DropUDPPort(t, "ldt_xdp", scene.Port+1), dispatcher.Options{})
	s.WantDropped(t, dropped...)
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
				{[]testenv.ProgramOption{none}, `.*has no expected attach type.*ProgramSpec\.AttachType = ebpf\.AttachXDP, in libbpf SEC\("xdp"\); or give the file, which is loaded to fit`, false},
				{[]testenv.ProgramOption{frags}, `.*load it from SEC\("xdp"\)`, true},
			},
		},
		{
			name: "attach type 0", first: []testenv.ProgramOption{none}, fits: []string{"ldt_second", "ldt_frags"},
			misfits: []misfit{
				{nil, `.*has attach type BPF_XDP, without frags, the chain no expected attach type, without frags, .* give the file, which is loaded to fit, or begin the chain anew .*`, false},
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
			s := scene.New(t)
			begin(t, s, testenv.DropUDPPort(t, "ldt_one", scene.Port, test.first...))
			dropped := []int{scene.Port, scene.Port + 3}
			for _, name := range test.fits {
				s.Join(t, scene.File("several.o", name), dispatcher.Options{})
				dropped = append(dropped, map[string]int{"ldt_second": scene.Port + 1, "ldt_frags": scene.Port + 2}[name])
			}
			s.Attach(t, testenv.DropUDPPort(t, "ldt_same", scene.Port+3, test.first...), dispatcher.Options{})
			if test.refused != "" {
				s.WantRefused(t, scene.File("several.o", "ldt_second"), dispatcher.Options{}, dispatcher.ErrIncompatible, test.refused)
			}
			for _, m := range test.misfits {
				if m.frags && !testenv.Has(t, testenv.FeatureFrags) {
					continue // nobody can load it
				}
				if !m.frags && !testenv.Has(t, testenv.FeatureSlotTypes) {
					prog := testenv.DropUDPPort(t, "ldt_other_type", scene.Port+4, m.opts...)
					s.Join(t, dispatcher.Program(prog), dispatcher.Options{}) // what this kernel takes is a member
					dropped = append(dropped, scene.Port+4)
					continue
				}
				prog := testenv.VerdictProgram(t, "ldt_misfit", testenv.XDPDrop, m.opts...)
				s.WantRefused(t, dispatcher.Program(prog), dispatcher.Options{}, dispatcher.ErrIncompatible, m.why)
			}
			s.WantDropped(t, dropped...)
		})
	}
}

// The kernel skips tail calls beyond its limit without a word. So all 32 must run, and a 33rd must not get in.
func TestFullChain(t *testing.T) {
	scene.EachMode(t, func(t *testing.T, s *scene.Scene, mode hook.Mode) {
		var want []int
		var links []*dispatcher.Link
		for i := range hook.MaxMembers {
			links = append(links, s.Attach(t, s.Tracer(t, i, testenv.XDPPass), dispatcher.Options{Mode: mode}))
			want = append(want, i)
		}
		s.WantRun(t, want...)
		one := dispatcher.Program(s.Tracer(t, 99, testenv.XDPPass))
		s.WantRefused(t, one, dispatcher.Options{}, dispatcher.ErrChainFull, `the chain has 32 members, .*`)
		s.WantRefused(t, one, dispatcher.Options{Name: "ldt_trace_0"}, fs.ErrExist, `.*`)
		s.WantRun(t, want...)

		// All of them may change their mind, and when one leaves there is room again.
		qt.Assert(t, qt.IsNil(links[0].Set(t.Context(), hook.Settings{Priority: hook.MaxPriority, ContinueOn: hook.Never})))
		qt.Assert(t, qt.IsNil(links[31].Update(t.Context(), one)))
		want = append(want[1:31:31], 99, 0)
		s.WantRun(t, want...)
		qt.Assert(t, qt.IsNil(links[5].Close()))
		want = slices.Delete(want, 4, 5)
		s.WantRunSoon(t, want...)
		s.Attach(t, s.Tracer(t, 100, testenv.XDPPass), dispatcher.Options{})
		s.WantRun(t, slices.Insert(want, 30, 100)...)
	})
}

// A member with tail calls of its own: it works, and is marked, since its calls count towards the kernel's limit.
func TestMemberWithTailCalls(t *testing.T) {
	for name, first := range map[string][]testenv.ProgramOption{
		"plain": nil, "attach type 0": {testenv.ExpectedAttachType(ebpf.AttachNone)},
	} {
		t.Run(name, func(t *testing.T) {
			s := scene.New(t)
			begin(t, s, s.Trace.Program(t, 1, testenv.XDPPass, first...))
			s.Join(t, scene.File("tailcall.o", "ldt_entry"), dispatcher.Options{})
			s.Attach(t, testenv.DropUDPPort(t, "ldt_drop", scene.Port+1, first...), dispatcher.Options{})
			s.WantDropped(t, scene.Port, scene.Port+1)
			c := s.Read(t)
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
			scene.EachMode(t, func(t *testing.T, s *scene.Scene, mode hook.Mode) {
				s.Join(t, scene.File("adjust.o", pair[1]), dispatcher.Options{Mode: mode, Priority: 20})
				qt.Assert(t, qt.IsTrue(s.Drops(t))) // alone it finds nothing
				s.Join(t, scene.File("adjust.o", pair[0]), dispatcher.Options{Priority: 10})
				qt.Check(t, qt.Equals(s.Passed(t, scene.Port, 100), 100))
				qt.Check(t, qt.Equals(s.Passed6(t, scene.Port, 100), 100))
			})
		})
	}
}

// Jumbo frames: the driver refuses a chain that would see only a part of each, in its own words, and mode auto takes
// generic mode then.
func TestBigMTU(t *testing.T) {
	s := scene.New(t)
	s.Jumbo(t)
	const why = `the driver of veth1 refused native XDP: .*MTU.*: numerical result out of range`
	_, err := s.TryJoin(t, dispatcher.Program(s.Tracer(t, 1, testenv.XDPPass)), dispatcher.Options{Mode: hook.ModeNative})
	qt.Check(t, qt.ErrorMatches(err, `attach xdp veth1: `+why+`; use generic mode`))
	qt.Check(t, qt.ErrorIs(err, ebpf.ErrNotSupported))
	s.WantFree(t)
	auto := s.Attach(t, s.Tracer(t, 1, testenv.XDPPass), dispatcher.Options{})
	chain, err := auto.Chain(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(chain.Mode, hook.ModeGeneric))
	qt.Check(t, qt.Matches(chain.NativeRefused, why))
	s.WantRun(t, 1)
	qt.Assert(t, qt.IsNil(auto.Close()))

	if testenv.Has(t, testenv.FeatureFrags) {
		frags := s.Attach(t, s.Trace.Program(t, 2, testenv.XDPPass, testenv.Frags()), dispatcher.Options{Mode: hook.ModeNative})
		s.WantRun(t, 2)
		qt.Assert(t, qt.IsNil(frags.Close()))
	}
	s.Attach(t, s.Tracer(t, 3, testenv.XDPPass), dispatcher.Options{Mode: hook.ModeGeneric})
	s.WantRun(t, 3)
}

// A chain has frags only where the driver takes it with them alone: so that programs without can join elsewhere. All
// built-in programs can have them.
func TestFragsWhereNeeded(t *testing.T) {
	s := scene.New(t)
	first := s.Join(t, scene.File("several.o", "ldt_frags"), dispatcher.Options{Mode: hook.ModeNative})
	qt.Check(t, qt.IsFalse(s.Read(t).Frags))
	s.Join(t, scene.File("several.o", "ldt_first"), dispatcher.Options{})
	s.WantDropped(t, scene.Port, scene.Port+2)
	qt.Assert(t, qt.IsNil(first.Update(t.Context(), scene.File("several.o", "ldt_second"))))
	s.WantDropped(t, scene.Port, scene.Port+1)
	s.Clear(t)

	testenv.Need(t, testenv.FeatureFrags)
	s.Jumbo(t)
	for _, name := range programs.Names() {
		spec, err := programs.Spec(name)
		qt.Assert(t, qt.IsNil(err))
		if function := programs.Function(name, hook.XDP); function != "" {
			s.Join(t, dispatcher.Spec(spec, dispatcher.LoadOptions{Program: function}), dispatcher.Options{Mode: hook.ModeNative})
		}
	}
	qt.Check(t, qt.IsTrue(s.Read(t).Frags))
	qt.Check(t, qt.Equals(s.Passed(t, scene.Port, 5), 5))
}

// Devices of other kinds: loopback has no native XDP, which auto falls back from and native must not.
func TestDeviceWithoutNativeXDP(t *testing.T) {
	s := scene.New(t)
	lo := s.OnDevice(dispatcher.XDP("lo").In(s.Server.Name))
	_, err := lo.TryJoin(t, dispatcher.Program(s.Tracer(t, 1, testenv.XDPPass)), dispatcher.Options{Mode: hook.ModeNative})
	qt.Check(t, qt.ErrorIs(err, ebpf.ErrNotSupported))
	qt.Check(t, qt.ErrorMatches(err, `attach xdp lo: the driver of lo refused native XDP: .*; use generic mode`))
	lo.Attach(t, s.Tracer(t, 1, testenv.XDPPass), dispatcher.Options{})
	qt.Check(t, qt.Equals(lo.Read(t).Mode, hook.ModeGeneric))
}
