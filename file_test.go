package dispatcher_test

import (
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

//go:generate sh testdata/build.sh

// options makes a source of a test object.
func options(object string, o dispatcher.LoadOptions) dispatcher.Source {
	return dispatcher.File("testdata/"+object, o)
}

// pinsBelow are the pins in a folder, by their path in it.
func pinsBelow(t testing.TB, dir string) []string {
	t.Helper()
	found := []string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && filepath.Ext(path) != ".debug" { // of the kernel's own (CONFIG_BPF_PRELOAD)
			name, _ := filepath.Rel(dir, path)
			found = append(found, name)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	})
	qt.Assert(t, qt.IsNil(err))
	return found
}

// memberPins are the names of the pins of the only chain's member, the root not among them.
func (s *scene) memberPins(t testing.TB, member string) []string {
	t.Helper()
	var found []string
	for _, path := range s.read(t).Pins {
		if dir, name := filepath.Split(path); strings.HasSuffix(dir, "/member_"+member+"/") {
			found = append(found, name)
		}
	}
	return found
}

// pinnedCount reads the first number of a pinned array.
func pinnedCount(t testing.TB, path string) uint64 {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(path, nil)
	qt.Assert(t, qt.IsNil(err))
	defer m.Close()
	b, err := m.LookupBytes(uint32(0))
	qt.Assert(t, qt.IsNil(err))
	return binary.NativeEndian.Uint64(b)
}

// What is no object file must be named as what it is, and change nothing.
func TestBadFiles(t *testing.T) {
	s := newScene(t)
	dir := t.TempDir()
	write := func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		qt.Assert(t, qt.IsNil(os.WriteFile(path, b, 0o600)))
		return path
	}
	object, err := os.ReadFile("testdata/filter.o")
	qt.Assert(t, qt.IsNil(err))
	huge := write("huge", object)
	qt.Assert(t, qt.IsNil(os.Truncate(huge, 100<<20)))

	link := s.attach(t, testenv.DropUDPPort(t, "ldt_drop", port), dispatcher.Options{})
	for _, test := range []struct {
		path  string
		cause error
		text  string
	}{
		{filepath.Join(dir, "missing.o"), fs.ErrNotExist, `.*missing.o: no such file or directory`},
		{"", fs.ErrNotExist, `.*no such file or directory`},
		{dir, dispatcher.ErrUsage, `.*: not a regular file`},
		{huge, dispatcher.ErrUsage, `.*huge: 104857600 bytes; object files are at most 67108864`},
		{write("empty.o", nil), dispatcher.ErrUsage, `.*/empty.o: the file is empty`},
		{"testdata/filter.c", dispatcher.ErrUsage, `testdata/filter.c: not an ELF file; compile the program with clang .*`},
		{"/bin/true", dispatcher.ErrUsage, `/bin/true: an ELF file for EM_.*, not for BPF; compile .*`},
		{"programs/internal/object/count_bpfeb.o", dispatcher.ErrUsage, `.*/count_bpfeb.o: compiled for the other byte order \(BigEndian\)`},
		{write("header.o", object[:64]), dispatcher.ErrUsage, `.*/header.o: (damaged ELF file|not a usable BPF object): .*`},
		{write("half.o", object[:len(object)/2]), dispatcher.ErrUsage, `.*/half.o: damaged ELF file: .*`},
		{write("almost.o", object[:len(object)-1]), dispatcher.ErrUsage, `.*/almost.o: damaged ELF file: .*`},
		{"testdata/noxdp.o", dispatcher.ErrIncompatible, `testdata/noxdp.o: no program for xdp in the file; .*`},
	} {
		t.Run(filepath.Base(test.path), func(t *testing.T) {
			from := dispatcher.File(test.path, dispatcher.LoadOptions{})
			s.wantRefused(t, from, dispatcher.Options{}, test.cause, test.text)
			err := link.Update(t.Context(), from)
			qt.Check(t, qt.ErrorIs(err, test.cause))
			qt.Check(t, qt.ErrorMatches(err, `replace xdp veth1: `+test.text))
			qt.Assert(t, qt.IsTrue(s.drops(t)))
		})
	}
}

// A file with several programs: the chosen one runs and is called by its name, and without a choice the names are listed.
func TestChooseProgram(t *testing.T) {
	s := newScene(t)
	for _, test := range []struct {
		choice, name string
		dropped      int
	}{
		{"ldt_first", "ldt_first", port}, {"ldt_second", "ldt_second", port + 1}, {"xdp.frags", "ldt_frags", port + 2},
	} {
		if test.choice == "xdp.frags" && !testenv.Has(t, testenv.FeatureFrags) {
			s.wantRefused(t, file("several.o", test.choice), dispatcher.Options{}, ebpf.ErrNotSupported,
				`program "ldt_frags" is for packets in fragments, which needs Linux 5.18: .*; load it from SEC\("xdp"\)`)
			continue
		}
		link := s.join(t, file("several.o", test.choice), dispatcher.Options{})
		s.wantChain(t, test.name)
		s.wantDropped(t, test.dropped)
		qt.Assert(t, qt.IsNil(link.Detach(t.Context())))
	}
	s.wantRefused(t, file("several.o", ""), dispatcher.Options{}, dispatcher.ErrUsage, `testdata/several.o: the file has several programs for xdp: choose one of .*ldt_first, ldt_frags, ldt_second`)
	s.wantRefused(t, file("several.o", "xdp"), dispatcher.Options{}, dispatcher.ErrUsage, `testdata/several.o: section "xdp" has several programs: choose one of ldt_first, ldt_second`)
	s.wantRefused(t, file("several.o", "ldt_third"), dispatcher.Options{}, fs.ErrNotExist, `testdata/several.o: .*ldt_third.*ldt_first, ldt_frags, ldt_second.*`)
	s.wantRefused(t, file("runconfig.o", "ldt_nun"), dispatcher.Options{}, fs.ErrNotExist, `.*ldt_none.*`)
}

// When the verifier refuses, the cause is one line, the whole log is there for those who want it, and no pin stays.
func TestVerifierRefusal(t *testing.T) {
	s := newScene(t)
	from := options("refused.o", dispatcher.LoadOptions{BPFFS: s.bpffs})
	_, err := s.tryJoin(t, from, dispatcher.Options{Persistent: true})
	qt.Check(t, qt.ErrorMatches(err, `attach xdp veth1: testdata/refused.o: the verifier refused program "ldt_refused": invalid access to packet, .* \(permission denied\)`))
	var refusal *dispatcher.VerifierRefusal
	qt.Assert(t, qt.ErrorAs(err, &refusal))
	qt.Check(t, qt.Equals(refusal.Program, "ldt_refused"))
	qt.Check(t, qt.IsTrue(len(refusal.Verifier.Log) > 5))
	qt.Check(t, qt.DeepEquals(pinsBelow(t, s.bpffs), []string{}))
	s.wantFree(t)
}

// The maps of a persistent member can be found beside it, and are those that its program uses.
func TestMapPinsBesideMember(t *testing.T) {
	s := newScene(t)
	link := s.join(t, file("filter.o", ""), dispatcher.Options{Name: "a.b", Persistent: true})
	want := []string{"map_%2Ebss", "map_%2Edata", "map_ldt_dropped", "slot"}
	qt.Assert(t, qt.DeepEquals(s.memberPins(t, "a%2Eb"), want))
	qt.Assert(t, qt.IsTrue(s.drops(t)))
	dropped := slices.IndexFunc(s.read(t).Pins, func(path string) bool { return strings.HasSuffix(path, "map_ldt_dropped") })
	path := s.read(t).Pins[dropped]
	qt.Check(t, qt.Equals(pinnedCount(t, path), 10))
	qt.Check(t, qt.IsTrue(pinnedCount(t, filepath.Dir(path)+"/map_%2Ebss") >= 10))

	// They go on to count when nobody holds the member, and go with it.
	qt.Assert(t, qt.IsNil(link.Close()))
	qt.Assert(t, qt.IsTrue(s.drops(t)))
	qt.Check(t, qt.Equals(pinnedCount(t, path), 20))
	s.detach(t, "a.b")
	s.wantFree(t)

	// A member that is not persistent has no pins, until it becomes so.
	link = s.join(t, file("filter.o", ""), dispatcher.Options{})
	s.wantNoPins(t)
	qt.Assert(t, qt.IsNil(link.Pin(t.Context())))
	qt.Assert(t, qt.DeepEquals(s.memberPins(t, "ldt_filter"), want))
	qt.Assert(t, qt.IsNil(link.Unpin(t.Context())))
	s.wantNoPins(t)
}

// A new version of a program goes on with the maps of the old one, its counters with them, unless it is told not to. The
// pins beside the member are always those of the program that runs.
func TestUpdateAndMaps(t *testing.T) {
	s := newScene(t)
	link := s.join(t, file("filter.o", ""), dispatcher.Options{Name: "filter", Persistent: true})
	path := strings.TrimSuffix(s.read(t).Pins[0], filepath.Base(s.read(t).Pins[0])) + "map_ldt_dropped"
	old := []string{"map_%2Ebss", "map_%2Edata", "map_ldt_dropped", "slot"}
	next := []string{"map_ldt_dropped", "map_ldt_passed", "slot"}
	qt.Assert(t, qt.IsTrue(s.drops(t)))
	qt.Assert(t, qt.DeepEquals(s.memberPins(t, "filter"), old))
	qt.Assert(t, qt.Equals(pinnedCount(t, path), 10))

	update := func(from dispatcher.Source, drops bool, count uint64, pins []string) {
		t.Helper()
		qt.Assert(t, qt.IsNil(link.Update(t.Context(), from)))
		qt.Assert(t, qt.DeepEquals(s.memberPins(t, "filter"), pins))
		qt.Assert(t, qt.Equals(s.drops(t), drops))
		qt.Assert(t, qt.Equals(pinnedCount(t, path), count))
	}
	update(file("other.o", ""), false, 10, next)
	update(file("filter.o", ""), true, 20, old)
	update(options("filter.o", dispatcher.LoadOptions{NewMaps: true}), true, 10, old)
	update(options("other.o", dispatcher.LoadOptions{NewMaps: true}), false, 0, next)

	// Whoever opens the member later has no other maps than its owner.
	again := s.open(t, "filter")
	qt.Assert(t, qt.IsNil(again.Update(t.Context(), file("filter.o", ""))))
	qt.Check(t, qt.DeepEquals(s.memberPins(t, "filter"), old))
	qt.Assert(t, qt.IsTrue(s.drops(t)))
	qt.Check(t, qt.Equals(pinnedCount(t, path), 10))

	// What is refused changes nothing: a program, or a map that is another one under the same name.
	spec, err := ebpf.LoadCollectionSpec("testdata/filter.o")
	qt.Assert(t, qt.IsNil(err))
	spec.Maps["ldt_dropped"].ValueSize = 16
	spec.Maps["ldt_dropped"].Value = nil
	err = link.Update(t.Context(), dispatcher.Spec(spec, dispatcher.LoadOptions{}))
	qt.Check(t, qt.ErrorIs(err, dispatcher.ErrIncompatible))
	qt.Check(t, qt.ErrorMatches(err, `replace xdp veth1: .*map "ldt_dropped" differs from .*`))
	qt.Check(t, qt.IsNotNil(link.Update(t.Context(), file("refused.o", ""))))
	qt.Check(t, qt.DeepEquals(s.memberPins(t, "filter"), old))
	qt.Assert(t, qt.IsTrue(s.drops(t)))
	qt.Check(t, qt.Equals(pinnedCount(t, path), 20))

	update(dispatcher.Spec(spec, dispatcher.LoadOptions{NewMaps: true}), true, 10, old)
	qt.Assert(t, qt.IsNil(link.Update(t.Context(), dispatcher.Program(s.tracer(t, 1, testenv.XDPPass)))))
	qt.Check(t, qt.DeepEquals(s.memberPins(t, "filter"), []string{"slot"}))
	s.clear(t)
}

// The kernel keeps 15 bytes of a map's name. Where that does not tell two maps apart, none is taken for the other, and no
// counter is lost without a word.
func TestUpdateAndLongMapNames(t *testing.T) {
	s := newScene(t)
	counting := func(o dispatcher.LoadOptions, names ...string) dispatcher.Source {
		spec := countingSpec()
		m, prog := spec.Maps["ldt_counts"], spec.Programs["ldt_counting"]
		delete(spec.Maps, "ldt_counts")
		prog.Instructions = nil
		for _, name := range names {
			spec.Maps[name] = m.Copy()
			spec.Maps[name].Name = name
			prog.Instructions = append(prog.Instructions,
				asm.LoadMapValue(asm.R1, 0, 0).WithReference(name), asm.Mov.Imm(asm.R2, 1), asm.AddAtomic.Mem(asm.R1, asm.R2, asm.DWord, 0))
		}
		prog.Instructions = append(prog.Instructions, asm.Mov.Imm(asm.R0, testenv.XDPPass), asm.Return())
		return dispatcher.Spec(spec, o)
	}
	const one, two = "ldt_a_long_name_of_a_map_1", "ldt_a_long_name_of_a_map_2"
	for name, test := range map[string]struct {
		old, next []string
		o         dispatcher.LoadOptions
		fails     bool
		kept      bool
	}{
		"one, itself":        {old: []string{one}, next: []string{one}, kept: true},
		"one, another":       {old: []string{one}, next: []string{one, two}, fails: true},
		"two, the same two":  {old: []string{one, two}, next: []string{one, two}, fails: true},
		"two, new ones":      {old: []string{one, two}, next: []string{one, two}, o: dispatcher.LoadOptions{NewMaps: true}},
		"two, one of them":   {old: []string{one, two}, next: []string{one}, fails: true},
		"two, none of these": {old: []string{one, two}, next: []string{"ldt_short"}},
	} {
		t.Run(name, func(t *testing.T) {
			link := s.join(t, counting(dispatcher.LoadOptions{}, test.old...), dispatcher.Options{Persistent: true})
			s.Send(t, port, 10)
			err := link.Update(t.Context(), counting(test.o, test.next...))
			if test.fails {
				qt.Check(t, qt.ErrorIs(err, dispatcher.ErrUsage))
				qt.Check(t, qt.ErrorMatches(err, `.*there are several maps whose name begins with "ldt_a_long_name", .*NewMaps.*`))
			} else {
				qt.Check(t, qt.IsNil(err))
			}
			for _, path := range s.read(t).Pins {
				if strings.HasPrefix(filepath.Base(path), "map_") {
					qt.Check(t, qt.Equals(pinnedCount(t, path) >= 10, test.fails || test.kept), qt.Commentf("%s", path))
				}
			}
			s.clear(t)
		})
	}
}

// libbpf's LIBBPF_PIN_BY_NAME: programs share a map through the bpffs, those of other loaders included.
func TestPinByName(t *testing.T) {
	s := newScene(t)
	path := filepath.Join(s.bpffs, "ldt_counts")
	from := options("shared.o", dispatcher.LoadOptions{}) // the bpffs is the member's
	first := s.join(t, from, dispatcher.Options{Name: "first"})
	s.join(t, from, dispatcher.Options{Name: "second", Persistent: true})
	s.Send(t, port, 10)
	qt.Check(t, qt.Equals(pinnedCount(t, path), 20))
	qt.Check(t, qt.DeepEquals(s.memberPins(t, "second"), []string{"slot"})) // not once more

	// It belongs to all who share it, so it stays when members go.
	qt.Assert(t, qt.IsNil(first.Detach(t.Context())))
	s.clear(t)
	qt.Check(t, qt.Equals(pinnedCount(t, path), 20))
	s.join(t, from, dispatcher.Options{})
	s.Send(t, port, 10)
	qt.Check(t, qt.Equals(pinnedCount(t, path), 30))

	// A map of that name that is another one is not taken for it, and not removed.
	s.wantRefused(t, options("shared_wide.o", dispatcher.LoadOptions{BPFFS: s.bpffs}), dispatcher.Options{Name: "wide"}, dispatcher.ErrIncompatible, `.*a shared map differs from the file's: .*`)
	qt.Check(t, qt.Equals(pinnedCount(t, path), 30))
}

// A folder for the maps: it is made, shared by all who name it, and left as it was when an attach fails.
func TestMapPins(t *testing.T) {
	s := newScene(t)
	dir := filepath.Join(s.bpffs, "a/b")
	o := dispatcher.LoadOptions{MapPins: dir}

	// Failures first, at each stage: nothing may be there yet.
	s.wantRefused(t, options("filter.o", dispatcher.LoadOptions{MapPins: dir, Globals: map[string]string{"port": "x"}}), dispatcher.Options{}, dispatcher.ErrUsage, `.*`)
	_, err := s.tryJoin(t, options("refused.o", o), dispatcher.Options{})
	qt.Check(t, qt.ErrorMatches(err, `.*verifier refused.*`))
	blocker := s.attach(t, s.tracer(t, 1, testenv.XDPPass), dispatcher.Options{Name: "taken"})
	s.wantRefused(t, options("filter.o", o), dispatcher.Options{Name: "taken"}, fs.ErrExist, `.*taken.*`)
	qt.Assert(t, qt.IsNil(blocker.Detach(t.Context())))
	_, err = dispatcher.Plan(t.Context(), s.target, options("filter.o", o), dispatcher.Options{BPFFS: s.bpffs})
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.DeepEquals(pinsBelow(t, s.bpffs), []string{}))

	link := s.join(t, options("filter.o", o), dispatcher.Options{Persistent: true})
	qt.Check(t, qt.DeepEquals(pinsBelow(t, dir), []string{"ldt_dropped"}))
	qt.Check(t, qt.DeepEquals(s.memberPins(t, "ldt_filter"), []string{"map_%2Ebss", "map_%2Edata", "slot"}))
	qt.Assert(t, qt.IsTrue(s.drops(t)))
	qt.Check(t, qt.Equals(pinnedCount(t, dir+"/ldt_dropped"), 10))
	s.detach(t, "ldt_filter")
	qt.Assert(t, qt.IsNil(link.Close()))

	// The next one finds it, and adds its own.
	s.join(t, options("filter.o", o), dispatcher.Options{})
	s.join(t, options("other.o", o), dispatcher.Options{Settings: priority(1)})
	qt.Check(t, qt.DeepEquals(pinsBelow(t, dir), []string{"ldt_dropped", "ldt_passed"}))
	qt.Assert(t, qt.IsTrue(s.drops(t)))
	qt.Check(t, qt.Equals(pinnedCount(t, dir+"/ldt_dropped"), 20))

	// Of a failed attach only the new pins go.
	s.join(t, options("shared.o", o), dispatcher.Options{})
	s.wantRefused(t, options("shared_wide.o", o), dispatcher.Options{Name: "wide"}, dispatcher.ErrIncompatible, `.*a shared map differs.*`)
	qt.Assert(t, qt.IsNil(os.Remove(dir+"/ldt_passed")))
	s.wantRefused(t, options("other.o", o), dispatcher.Options{}, fs.ErrExist, `.*ldt_other.*`)
	qt.Check(t, qt.DeepEquals(pinsBelow(t, dir), []string{"ldt_counts", "ldt_dropped"}))

	// Not on a disk, and nothing is left there.
	disk := t.TempDir()
	s.wantRefused(t, options("filter.o", dispatcher.LoadOptions{MapPins: disk + "/maps"}), dispatcher.Options{}, dispatcher.ErrUsage, `.*maps cannot be pinned in .*/maps: it is not in a bpffs; mount one .*`)
	s.wantRefused(t, options("shared.o", dispatcher.LoadOptions{BPFFS: disk}), dispatcher.Options{}, dispatcher.ErrUsage, `.*it is not in a bpffs; .*`)
	entries, err := os.ReadDir(disk)
	qt.Check(t, qt.IsNil(err))
	qt.Check(t, qt.HasLen(entries, 0))
}

// A map that the caller has: the program uses it instead of one of its own, and it stays the caller's.
func TestMapReplacement(t *testing.T) {
	s := newScene(t)
	array := func(size uint32) *ebpf.Map {
		m, err := ebpf.NewMap(&ebpf.MapSpec{Name: "ldt_mine", Type: ebpf.Array, KeySize: 4, ValueSize: size, MaxEntries: 1})
		qt.Assert(t, qt.IsNil(err))
		t.Cleanup(func() { m.Close() })
		return m
	}
	mine := array(8)
	with := func(m map[string]*ebpf.Map) dispatcher.Source {
		return options("filter.o", dispatcher.LoadOptions{Maps: m, MapPins: s.bpffs + "/maps"})
	}
	s.wantRefused(t, with(map[string]*ebpf.Map{"ldt_droped": mine}), dispatcher.Options{}, dispatcher.ErrUsage, `testdata/filter.o: there is no map "ldt_droped" in the file \(it has: .*ldt_dropped\)`)
	s.wantRefused(t, with(map[string]*ebpf.Map{"ldt_dropped": array(16)}), dispatcher.Options{}, dispatcher.ErrIncompatible, `.*a shared map differs.*`)

	link := s.join(t, with(map[string]*ebpf.Map{"ldt_dropped": mine}), dispatcher.Options{Persistent: true})
	qt.Assert(t, qt.IsTrue(s.drops(t)))
	count := func() (n uint64) {
		qt.Assert(t, qt.IsNil(mine.Lookup(uint32(0), &n)))
		return n
	}
	qt.Check(t, qt.Equals(count(), 10))
	qt.Check(t, qt.DeepEquals(s.memberPins(t, "ldt_filter"), []string{"map_%2Ebss", "map_%2Edata", "slot"}))
	qt.Check(t, qt.DeepEquals(pinsBelow(t, s.bpffs+"/maps"), []string{}))
	qt.Assert(t, qt.IsNil(link.Detach(t.Context())))
	qt.Assert(t, qt.IsNil(link.Close()))
	qt.Check(t, qt.Equals(count(), 10))
}

// Maps within maps come along, though no instruction names the inner one.
func TestMapInMap(t *testing.T) {
	s := newScene(t)
	s.join(t, file("mapinmap.o", ""), dispatcher.Options{Persistent: true})
	pins := s.memberPins(t, "ldt_nested")
	qt.Assert(t, qt.DeepEquals(pins, []string{"map_ldt_inner", "map_ldt_outer", "slot"}))
	inner, err := ebpf.LoadPinnedMap(s.read(t).Pins[0], nil)
	qt.Assert(t, qt.IsNil(err))
	defer inner.Close()
	s.wantDropped(t)
	qt.Assert(t, qt.IsNil(inner.Put(uint32(0), uint32(port+3))))
	s.wantDropped(t, port+3)
	s.clear(t)
}

// Constants and variables set before the load are what the program sees.
func TestGlobals(t *testing.T) {
	s := newScene(t)
	set := func(globals map[string]string) dispatcher.Source {
		return options("filter.o", dispatcher.LoadOptions{Globals: globals})
	}
	link := s.join(t, set(map[string]string{"port": "0x1b5b", "seen": "1000000"}), dispatcher.Options{Persistent: true}) // 7003
	s.wantDropped(t, port+3)
	qt.Check(t, qt.IsTrue(pinnedCount(t, s.read(t).Pins[0]) > 1000000))
	qt.Assert(t, qt.IsNil(link.Update(t.Context(), set(map[string]string{"port": "7004"}))))
	s.wantDropped(t, port+4)
	for text, why := range map[string]string{
		"70000": `testdata/filter.o: global "port": 70000 is out of range for 16 bits`,
		"http":  `testdata/filter.o: global "port": "http" is not a number`,
	} {
		s.wantRefused(t, set(map[string]string{"port": text}), dispatcher.Options{}, dispatcher.ErrUsage, why)
	}
	s.wantRefused(t, set(map[string]string{"prot": "1"}), dispatcher.Options{}, dispatcher.ErrUsage, `testdata/filter.o: there is no global "prot" in the file \(it has: left, port, seen\)`)
	s.clear(t)
}

// Programs made for libxdp bring their settings along; those of the caller come first, one by one.
func TestRunConfig(t *testing.T) {
	s := newScene(t)
	pass, drop := hook.SetOf(hook.Pass), hook.SetOf(hook.Drop)
	for _, test := range []struct {
		program  string
		settings hook.Settings // the caller's
		want     hook.Settings
	}{
		{"ldt_none", hook.Settings{}, hook.Settings{Priority: 50, ContinueOn: pass}},
		{"ldt_drop_only", hook.Settings{}, hook.Settings{Priority: 10, ContinueOn: drop}},
		{"ldt_drop_only", priority(70), hook.Settings{Priority: 70, ContinueOn: drop}},
		{"ldt_drop_only", hook.Settings{ContinueOn: pass}, hook.Settings{Priority: 10, ContinueOn: pass}},
		{"ldt_drop_only", hook.Settings{OnMissing: hook.MissingDrop}, hook.Settings{Priority: 10, ContinueOn: drop, OnMissing: hook.MissingDrop}},
		{"ldt_prio_only", hook.Settings{}, hook.Settings{Priority: 5, ContinueOn: pass}},
		{"ldt_never", hook.Settings{}, hook.Settings{Priority: 50, ContinueOn: hook.Never}},
		{"ldt_zero", hook.Settings{}, hook.Settings{Priority: 1, ContinueOn: pass}},
	} {
		link := s.join(t, file("runconfig.o", test.program), dispatcher.Options{Settings: test.settings})
		m, err := link.Info(t.Context())
		qt.Assert(t, qt.IsNil(err))
		qt.Check(t, qt.Equals(m.Settings, test.want.WithDefaults()), qt.Commentf("%s with %+v", test.program, test.settings))
		qt.Assert(t, qt.IsNil(link.Detach(t.Context())))
		qt.Assert(t, qt.IsNil(link.Close()))
	}
	for _, program := range []string{"ldt_too_late", "ldt_two", "ldt_unknown", "ldt_plain_int", "ldt_no_struct"} {
		s.wantRefused(t, file("runconfig.o", program), dispatcher.Options{}, dispatcher.ErrUsage, `testdata/runconfig.o: program "`+program+`": \.xdp_run_config: .*`)
	}
	// They are for joining: a new version of the program does not move the member.
	link := s.join(t, file("runconfig.o", "ldt_none"), dispatcher.Options{Settings: priority(33)})
	qt.Assert(t, qt.IsNil(link.Update(t.Context(), file("runconfig.o", "ldt_drop_only"))))
	m, err := link.Info(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(m.Settings, priority(33).WithDefaults()))
}
