package observe

import (
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// dispatcherOf opens the dispatcher on the device.
func dispatcherOf(t testing.TB, s *scene.Scene) *ebpf.Program {
	t.Helper()
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(s.Read(t).DispatcherID))
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { prog.Close() })
	return prog
}

// functions are the names of the functions of a program, the main one first.
func functions(t testing.TB, prog *ebpf.Program) (names []string) {
	t.Helper()
	info, err := prog.Info()
	qt.Assert(t, qt.IsNil(err))
	offsets, err := info.FuncInfos()
	qt.Assert(t, qt.IsNil(err))
	for _, o := range offsets {
		names = append(names, o.Func.Name)
	}
	return names
}

// wantStatic checks that the kernel lets nobody replace a function of a program: neither by a program that is loaded for
// that, nor by one that was loaded for another program.
func wantStatic(t testing.TB, prog *ebpf.Program, names ...string) {
	t.Helper()
	qt.Assert(t, qt.DeepEquals(functions(t, prog), names))
	other := testenv.VerdictSpec("ldt_other", testenv.XDPPass)
	other.Instructions = testenv.Typed("ldt_other", other.Instructions)
	loaded, err := testenv.Extension(testenv.Load(t, other), "ldt_other", testenv.XDPDrop)
	qt.Assert(t, qt.IsNil(err))
	defer loaded.Close()
	for _, name := range names {
		_, err := testenv.Extend(prog, name, testenv.XDPDrop)
		qt.Check(t, qt.ErrorIs(err, unix.EINVAL), qt.Commentf("%s", name))
		qt.Check(t, qt.ErrorMatches(err, `(?s).*`+name+`\(\) is not a global function.*`))
		_, err = link.AttachFreplace(prog, name, loaded)
		qt.Check(t, qt.ErrorIs(err, unix.EINVAL), qt.Commentf("%s", name))
	}
}

// The kernel lets nobody put a function in the place of one of the dispatcher's.
func TestFreplaceRefused(t *testing.T) {
	testenv.NeedFreplace(t)
	s := scene.NewSealScene(t)
	s.Member(t, 1)
	s.Member(t, 2)
	s.Member(t, 9)
	wantStatic(t, dispatcherOf(t, s), "libdispatcher", "member_0", "member_1")
	s.WantRun(t, 1, 2, 9)
	qt.Assert(t, qt.IsTrue(s.Drops(t)))

	// The one that counts, and the one that calls it.
	sample(t, s, s.Target, func() {
		wantStatic(t, dispatcherOf(t, s), "libdispatcher", "member_0", "member_1")
		array, err := ebpf.NewMapFromID(ebpf.MapID(watchOf(t, s)))
		qt.Assert(t, qt.IsNil(err))
		defer array.Close()
		var counting *ebpf.Program
		qt.Assert(t, qt.IsNil(array.Lookup(uint32(0), &counting)))
		defer counting.Close()
		wantStatic(t, counting, "ld_counting", "member_0", "member_1", "member_2")
		s.WantRun(t, 1, 2, 9)
	})

	// One that has members of its own, which stand in main.
	s.Attach(t, s.Tracer(t, 4, testenv.XDPPass), dispatcher.Options{Name: "4", Priority: 5})
	s.Seal(t, "4! 1 2 9", `it is not pinned: .*`)
	wantStatic(t, dispatcherOf(t, s), "libdispatcher", "member_0")
	s.WantRun(t, 4, 1, 2, 9)
	qt.Assert(t, qt.IsTrue(s.Drops(t)))
	s.Clear(t)
}

// extend puts a program in the place of a function. It is gone with the test, or when the caller closes it.
func extend(t testing.TB, target *ebpf.Program, function string, verdict int) (l link.Link, id uint32) {
	t.Helper()
	l, err := testenv.Extend(target, function, int32(verdict))
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { l.Close() })
	info, err := l.Info()
	qt.Assert(t, qt.IsNil(err))
	return l, uint32(info.ID)
}

// wantExtension checks that it is that one, and that all who show it show the same.
func wantExtension(t testing.TB, s *scene.Scene, of func(*hook.Chain) []hook.Extension, want hook.Extension) *hook.Chain {
	t.Helper()
	c := s.Read(t)
	list := of(c)
	qt.Assert(t, qt.HasLen(list, 1))
	qt.Check(t, qt.Equals(list[0].Program.Name, "ldt_freplace"))
	qt.Check(t, qt.Not(qt.Equals(list[0].Program.ID, 0)))
	want.Program = list[0].Program
	qt.Check(t, qt.Equals(list[0], want))

	all, err := dispatcher.List(t.Context(), dispatcher.ListOptions{BPFFS: s.BPFFS, Hooks: []hook.Hook{c.Hook}})
	qt.Assert(t, qt.IsNil(err))
	i := slices.IndexFunc(all, func(l hook.Chain) bool {
		return l.Target == c.Target && l.NetNS.Inode == c.NetNS.Inode && l.CgroupID == c.CgroupID
	})
	qt.Assert(t, qt.IsTrue(i >= 0))
	qt.Check(t, qt.DeepEquals(all[i].Members, c.Members))
	qt.Check(t, qt.DeepEquals(all[i].Extensions, c.Extensions))

	// The kernel takes it away for nobody.
	err = dispatcher.DetachLink(t.Context(), want.LinkID, dispatcher.DetachOptions{BPFFS: s.BPFFS, Force: true})
	qt.Check(t, qt.ErrorIs(err, ebpf.ErrNotSupported))
	qt.Check(t, qt.ErrorMatches(err, `.* holders --link \d+".*`))
	return c
}

func ofMember(name string) func(*hook.Chain) []hook.Extension {
	return func(c *hook.Chain) []hook.Extension { return c.Member(name).Extensions }
}

// A large member that is sealed is a global function of the dispatcher: who replaces it takes it out, and that is said.
func TestFreplaceOfSealed(t *testing.T) {
	testenv.NeedFreplace(t)
	testenv.Need(t, testenv.FeatureLinkTarget)
	s := scene.NewSealScene(t)
	s.Member(t, 1)
	large := s.Trace.Spec(2, testenv.XDPDrop)
	large.Instructions = slices.Concat(slices.Repeat(asm.Instructions{asm.Mov.Imm(asm.R5, 1)}, 600), large.Instructions)
	qt.Assert(t, qt.IsNil(s.Attach(t, scene.Coded(t, large), scene.Persistent("2", 20)).Close()))
	s.Member(t, 3)
	s.Seal(t, "1 2 3")
	s.WantRun(t, 1, 2)
	qt.Assert(t, qt.IsTrue(s.Drops(t)))

	w := watch(t, s, watchHere(s))
	_, id := extend(t, dispatcherOf(t, s), "ldt_trace_2", testenv.XDPPass)
	s.WantRun(t, 1, 3)
	qt.Assert(t, qt.IsFalse(s.Drops(t)))
	c := wantExtension(t, s, ofMember("2"), hook.Extension{LinkID: id, Function: "ldt_trace_2", Main: true})
	qt.Check(t, qt.Equals(scene.Summary(c), "1* 2*(bypassed) 3*"))
	qt.Check(t, qt.HasLen(c.Extensions, 0))
	got := w.want(t, "extended 2 2>2/3")
	qt.Check(t, qt.Equals(got[0].Extension.LinkID, id))
	qt.Check(t, qt.Equals(got[0].After.State, hook.StateBypassed))

	mends(t, s, "extended broken 2")
	s.WantRun(t, 1, 2)
	qt.Assert(t, qt.IsTrue(s.Drops(t)))
	s.WantChain(t, "1* 2* 3*")
	w.want(t, "restored 2 2>2/3")
	w.wantNone(t)
	s.Clear(t)
}

// A dispatcher whose functions are global, as those of versions before this one were, can be replaced as a whole.
func TestFreplaceOfDispatcher(t *testing.T) {
	testenv.NeedFreplace(t)
	testenv.Need(t, testenv.FeatureLinkTarget)
	s := scene.New(t)
	s.Member(t, 1)
	s.Member(t, 9)
	swapInGlobal(t, s)
	s.WantRun(t, 1, 9)
	s.WantChain(t, "1* 9*")

	w := watch(t, s, watchHere(s))
	_, id := extend(t, dispatcherOf(t, s), "libdispatcher", testenv.XDPPass)
	s.WantRun(t)
	qt.Assert(t, qt.IsFalse(s.Drops(t)))
	c := wantExtension(t, s, func(c *hook.Chain) []hook.Extension { return c.Extensions },
		hook.Extension{LinkID: id, Function: "libdispatcher", Main: true})
	qt.Check(t, qt.Equals(scene.Summary(c), "1*(bypassed) 9*(bypassed)"))
	qt.Check(t, qt.IsTrue(c.Bypassed()))
	qt.Check(t, qt.IsFalse(c.Protected()))
	wantFindings(t, s, "extended broken")
	got := w.want(t, "extended xdp "+s.ServerDev)
	qt.Check(t, qt.Equals(got[0].Extension.LinkID, id))

	// The next change has a dispatcher of its own.
	s.Member(t, 3, 15)
	s.WantRun(t, 1, 3, 9)
	s.WantChain(t, "1* 3* 9*")
	qt.Check(t, qt.IsTrue(s.Read(t).Protected()))
	wantFindings(t, s)
	w.want(t, "attached 3 0>2/3", "restored xdp "+s.ServerDev)
	s.Clear(t)
}

// swapInGlobal puts a dispatcher of global functions in the place of the one that is there.
func swapInGlobal(t testing.TB, s *scene.Scene) {
	t.Helper()
	was, chain := dispatcherOf(t, s), described(t, s)
	var settings []hook.Settings
	for _, slot := range chain.Slots {
		settings = append(settings, slot.Settings)
	}
	insns := dispatch.Link(settings, nil, false)
	for i := range insns {
		if fn := btf.FuncMetadata(&insns[i]); fn != nil {
			insns[i] = btf.WithFuncMetadata(insns[i], &btf.Func{Name: fn.Name, Type: fn.Type, Linkage: btf.GlobalFunc})
		}
	}
	var description *ebpf.Map
	for _, m := range testenv.Maps(t, was) {
		defer m.Close()
		info, err := m.Info()
		qt.Assert(t, qt.IsNil(err))
		id, _ := info.ID()
		i := chain.Index(uint32(id))
		if i >= 0 {
			qt.Assert(t, qt.IsNil(insns.AssociateMap(dispatch.SlotRef(i), m)))
		} else {
			description = m
		}
	}
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: dispatch.ProgramName, Type: ebpf.XDP, AttachType: chain.Shape.AttachType, License: "Dual BSD/GPL", Instructions: insns,
	})
	qt.Assert(t, qt.IsNil(err))
	defer prog.Close()
	qt.Assert(t, qt.IsNil(prog.BindMap(description)))
	root, err := link.NewFromID(link.ID(s.Read(t).LinkID))
	qt.Assert(t, qt.IsNil(err))
	defer root.Close()
	qt.Assert(t, qt.IsNil(root.Update(prog)))
}

// Elsewhere a member is what its owner loaded: with types, as clang makes it, it can be replaced.
func TestFreplaceOfLinks(t *testing.T) {
	testenv.NeedFreplace(t)
	testenv.Need(t, testenv.FeatureLinkTarget)
	for h, context := range map[hook.Hook]string{hook.TCXIngress: "__sk_buff", hook.CgroupConnect4: "bpf_sock_addr"} {
		t.Run(string(h), func(t *testing.T) {
			testenv.NeedHook(t, h)
			keepApps(t)
			s := scene.New(t).OnHook(t, h)
			s.Member(t, 1)
			spec := s.Trace.Spec(2, s.GoOn(), s.On())
			spec.Instructions[0] = btf.WithFuncMetadata(spec.Instructions[0], &btf.Func{Name: spec.Name, Linkage: btf.GlobalFunc, Type: &btf.FuncProto{
				Return: &btf.Int{Name: "int", Size: 4, Encoding: btf.Signed},
				Params: []btf.FuncParam{{Name: "ctx", Type: &btf.Pointer{Target: &btf.Struct{Name: context}}}},
			}})
			prog := testenv.Load(t, spec)
			s.Attach(t, prog, dispatcher.Options{Name: "2", Priority: 20})
			s.Member(t, 3)
			s.WantRun(t, 1, 2, 3)
			c := s.Read(t)
			qt.Check(t, qt.IsTrue(c.Protected()))

			w := watch(t, s, dispatcher.WatchOptions{Hooks: []hook.Hook{h}})
			l, id := extend(t, prog, "ldt_trace_2", s.GoOn())
			s.WantRun(t, 1, 3)
			c = wantExtension(t, s, ofMember("2"), hook.Extension{LinkID: id, Function: "ldt_trace_2", Main: true})
			qt.Check(t, qt.Equals(scene.Summary(c), "1* 2(bypassed) 3*"))
			qt.Check(t, qt.IsFalse(c.Protected()))
			found := wantFindings(t, s, "extended broken 2")
			qt.Check(t, qt.Equals(found[0].Mend, ""))
			w.want(t, "extended 2 2>2/3")

			qt.Assert(t, qt.IsNil(l.Close()))
			s.WantRunSoon(t, 1, 2, 3)
			w.want(t, "restored 2 2>2/3")
			s.WantChain(t, "1* 2 3*")
			wantFindings(t, s)
			s.Clear(t)
		})
	}
}

// A program in a slot: from Linux 6.12 the kernel extends none of its functions. Before that its main function is what it
// was, since a tail call goes past the jump at its beginning, and the others are what they are replaced by.
func TestFreplaceOfSlots(t *testing.T) {
	testenv.NeedFreplace(t)
	s := scene.New(t)
	spec := testenv.VerdictSpec("ldt_main", testenv.XDPPass)
	spec.Instructions = slices.Concat(
		testenv.Typed("ldt_main", asm.Instructions{asm.Call.Label("ldt_part"), asm.Return()}),
		testenv.Typed("ldt_part", asm.Instructions{asm.Mov.Imm(asm.R0, testenv.XDPDrop), asm.Return()}),
	)
	prog := testenv.Load(t, spec)
	s.Attach(t, prog, dispatcher.Options{Name: "1"})
	qt.Assert(t, qt.IsTrue(s.Drops(t)))
	for _, name := range []string{"ldt_main", "ldt_part"} {
		if testenv.Has(t, testenv.FeatureSlotsAlone) {
			_, err := testenv.Extend(prog, name, testenv.XDPPass)
			qt.Check(t, qt.ErrorIs(err, unix.EBUSY), qt.Commentf("%s", name))
			qt.Check(t, qt.IsTrue(s.Drops(t)))
			continue
		}
		l, id := extend(t, prog, name, testenv.XDPPass)
		qt.Check(t, qt.Equals(s.Drops(t), name == "ldt_main"), qt.Commentf("%s", name))
		s.WantChain(t, "1")
		if testenv.Has(t, testenv.FeatureLinkTarget) {
			wantExtension(t, s, ofMember("1"), hook.Extension{LinkID: id, Function: name, Main: name == "ldt_main"})
			wantFindings(t, s, "extended note 1")
		}
		qt.Assert(t, qt.IsNil(l.Close()))
		scene.Soon(t, func() bool { return len(s.Read(t).Member("1").Extensions) == 0 })
	}
	qt.Check(t, qt.IsTrue(s.Drops(t)))
}
