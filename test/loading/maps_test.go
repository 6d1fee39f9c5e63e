package loading

import (
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
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

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

// The maps of a persistent member can be found beside it, and are those that its program uses.
func TestMapPinsBesideMember(t *testing.T) {
	s := scene.New(t)
	link := s.Join(t, scene.File("filter.o", ""), dispatcher.Options{Name: "a.b", Persistent: true})
	want := []string{"map_%2Ebss", "map_%2Edata", "map_ldt_dropped", "slot"}
	qt.Assert(t, qt.DeepEquals(s.MemberPins(t, "a%2Eb"), want))
	qt.Assert(t, qt.IsTrue(s.Drops(t)))
	dropped := slices.IndexFunc(s.Read(t).Pins, func(path string) bool { return strings.HasSuffix(path, "map_ldt_dropped") })
	path := s.Read(t).Pins[dropped]
	qt.Check(t, qt.Equals(scene.PinnedCount(t, path), 10))
	qt.Check(t, qt.IsTrue(scene.PinnedCount(t, filepath.Dir(path)+"/map_%2Ebss") >= 10))

	// They go on counting when no process holds the member, and go with the member.
	qt.Assert(t, qt.IsNil(link.Close()))
	qt.Assert(t, qt.IsTrue(s.Drops(t)))
	qt.Check(t, qt.Equals(scene.PinnedCount(t, path), 20))
	s.Detach(t, "a.b")
	s.WantFree(t)

	// A member that is not persistent has no pins, until it becomes so.
	link = s.Join(t, scene.File("filter.o", ""), dispatcher.Options{})
	s.WantNoPins(t)
	qt.Assert(t, qt.IsNil(scene.Second(link.Pin(t.Context()))))
	qt.Assert(t, qt.DeepEquals(s.MemberPins(t, "ldt_filter"), want))
	qt.Assert(t, qt.IsNil(link.Unpin(t.Context())))
	s.WantNoPins(t)
}

// A new version of a program goes on with the maps of the old one, its counters with them, unless it is told not to. The
// pins beside the member always belong to the program that runs.
func TestUpdateAndMaps(t *testing.T) {
	s := scene.New(t)
	link := s.Join(t, scene.File("filter.o", ""), dispatcher.Options{Name: "filter", Persistent: true})
	path := strings.TrimSuffix(s.Read(t).Pins[0], filepath.Base(s.Read(t).Pins[0])) + "map_ldt_dropped"
	old := []string{"map_%2Ebss", "map_%2Edata", "map_ldt_dropped", "slot"}
	next := []string{"map_ldt_dropped", "map_ldt_passed", "slot"}
	qt.Assert(t, qt.IsTrue(s.Drops(t)))
	qt.Assert(t, qt.DeepEquals(s.MemberPins(t, "filter"), old))
	qt.Assert(t, qt.Equals(scene.PinnedCount(t, path), 10))

	update := func(from dispatcher.Source, drops bool, count uint64, pins []string) {
		t.Helper()
		qt.Assert(t, qt.IsNil(link.Update(t.Context(), from)))
		qt.Assert(t, qt.DeepEquals(s.MemberPins(t, "filter"), pins))
		qt.Assert(t, qt.Equals(s.Drops(t), drops))
		qt.Assert(t, qt.Equals(scene.PinnedCount(t, path), count))
	}
	update(scene.File("other.o", ""), false, 10, next)
	update(scene.File("filter.o", ""), true, 20, old)
	update(options("filter.o", dispatcher.LoadOptions{NewMaps: true}), true, 10, old)
	update(options("other.o", dispatcher.LoadOptions{NewMaps: true}), false, 0, next)

	// A process that opens the member later has the same maps as the owner.
	again := s.Open(t, "filter")
	qt.Assert(t, qt.IsNil(again.Update(t.Context(), scene.File("filter.o", ""))))
	qt.Check(t, qt.DeepEquals(s.MemberPins(t, "filter"), old))
	qt.Assert(t, qt.IsTrue(s.Drops(t)))
	qt.Check(t, qt.Equals(scene.PinnedCount(t, path), 10))

	// What is refused changes nothing: a program, or a map that is another one under the same name.
	spec, err := ebpf.LoadCollectionSpec("../testdata/filter.o")
	qt.Assert(t, qt.IsNil(err))
	spec.Maps["ldt_dropped"].ValueSize = 16
	spec.Maps["ldt_dropped"].Value = nil
	err = link.Update(t.Context(), dispatcher.Spec(spec, dispatcher.LoadOptions{}))
	qt.Check(t, qt.ErrorIs(err, dispatcher.ErrIncompatible))
	qt.Check(t, qt.ErrorMatches(err, `replace xdp veth1: .*map "ldt_dropped" differs from .*`))
	qt.Check(t, qt.IsNotNil(link.Update(t.Context(), scene.File("refused.o", ""))))
	qt.Check(t, qt.DeepEquals(s.MemberPins(t, "filter"), old))
	qt.Assert(t, qt.IsTrue(s.Drops(t)))
	qt.Check(t, qt.Equals(scene.PinnedCount(t, path), 20))

	update(dispatcher.Spec(spec, dispatcher.LoadOptions{NewMaps: true}), true, 10, old)
	qt.Assert(t, qt.IsNil(link.Update(t.Context(), dispatcher.Program(s.Tracer(t, 1, testenv.XDPPass)))))
	qt.Check(t, qt.DeepEquals(s.MemberPins(t, "filter"), []string{"slot"}))
	s.Clear(t)
}

// The kernel keeps 15 bytes of a map's name. Where that does not tell two maps apart, none is taken for the other, and no
// counter is lost without a word.
func TestUpdateAndLongMapNames(t *testing.T) {
	s := scene.New(t)
	counting := func(o dispatcher.LoadOptions, names ...string) dispatcher.Source {
		spec := scene.CountingOn(hook.XDP)
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
			link := s.Join(t, counting(dispatcher.LoadOptions{}, test.old...), dispatcher.Options{Persistent: true})
			s.Send(t, scene.Port, 10)
			err := link.Update(t.Context(), counting(test.o, test.next...))
			if test.fails {
				qt.Check(t, qt.ErrorIs(err, dispatcher.ErrUsage))
				qt.Check(t, qt.ErrorMatches(err, `.*there are several maps whose name begins with "ldt_a_long_name", .*NewMaps.*`))
			} else {
				qt.Check(t, qt.IsNil(err))
			}
			for _, path := range s.Read(t).Pins {
				if strings.HasPrefix(filepath.Base(path), "map_") {
					qt.Check(t, qt.Equals(scene.PinnedCount(t, path) >= 10, test.fails || test.kept), qt.Commentf("%s", path))
				}
			}
			s.Clear(t)
		})
	}
}

// libbpf's LIBBPF_PIN_BY_NAME: programs share a map through the bpffs, with programs of other loaders too.
func TestPinByName(t *testing.T) {
	s := scene.New(t)
	path := filepath.Join(s.BPFFS, "ldt_counts")
	from := options("shared.o", dispatcher.LoadOptions{}) // the bpffs is the member's
	first := s.Join(t, from, dispatcher.Options{Name: "first"})
	s.Join(t, from, dispatcher.Options{Name: "second", Persistent: true})
	s.Send(t, scene.Port, 10)
	qt.Check(t, qt.Equals(scene.PinnedCount(t, path), 20))
	qt.Check(t, qt.DeepEquals(s.MemberPins(t, "second"), []string{"slot"})) // not once more

	// It belongs to all that share it, so it stays when members go.
	qt.Assert(t, qt.IsNil(first.Detach(t.Context())))
	s.Clear(t)
	qt.Check(t, qt.Equals(scene.PinnedCount(t, path), 20))
	s.Join(t, from, dispatcher.Options{})
	s.Send(t, scene.Port, 10)
	qt.Check(t, qt.Equals(scene.PinnedCount(t, path), 30))

	// A map of that name that is another one is not taken for it, and not removed.
	s.WantRefused(t, options("shared_wide.o", dispatcher.LoadOptions{BPFFS: s.BPFFS}), dispatcher.Options{Name: "wide"}, dispatcher.ErrIncompatible, `.*a shared map differs from the file's: .*`)
	qt.Check(t, qt.Equals(scene.PinnedCount(t, path), 30))
}

// A folder for the maps: it is made, shared by all that name it, and left as it was when an attach fails.
func TestMapPins(t *testing.T) {
	s := scene.New(t)
	dir := filepath.Join(s.BPFFS, "a/b")
	o := dispatcher.LoadOptions{MapPins: dir}

	// Failures first, at each stage: nothing may be there yet.
	s.WantRefused(t, options("filter.o", dispatcher.LoadOptions{MapPins: dir, Globals: map[string]string{"port": "x"}}), dispatcher.Options{}, dispatcher.ErrUsage, `.*`)
	_, err := s.TryJoin(t, options("refused.o", o), dispatcher.Options{})
	qt.Check(t, qt.ErrorMatches(err, `.*verifier refused.*`))
	blocker := s.Attach(t, s.Tracer(t, 1, testenv.XDPPass), dispatcher.Options{Name: "taken"})
	s.WantRefused(t, options("filter.o", o), dispatcher.Options{Name: "taken"}, fs.ErrExist, `.*taken.*`)
	qt.Assert(t, qt.IsNil(blocker.Detach(t.Context())))
	_, err = dispatcher.Plan(t.Context(), s.Target, options("filter.o", o), dispatcher.Options{BPFFS: s.BPFFS})
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.DeepEquals(pinsBelow(t, s.BPFFS), []string{}))

	link := s.Join(t, options("filter.o", o), dispatcher.Options{Persistent: true})
	qt.Check(t, qt.DeepEquals(pinsBelow(t, dir), []string{"ldt_dropped"}))
	qt.Check(t, qt.DeepEquals(s.MemberPins(t, "ldt_filter"), []string{"map_%2Ebss", "map_%2Edata", "slot"}))
	qt.Assert(t, qt.IsTrue(s.Drops(t)))
	qt.Check(t, qt.Equals(scene.PinnedCount(t, dir+"/ldt_dropped"), 10))
	s.Detach(t, "ldt_filter")
	qt.Assert(t, qt.IsNil(link.Close()))

	// The next one finds it, and adds its own.
	s.Join(t, options("filter.o", o), dispatcher.Options{})
	s.Join(t, options("other.o", o), dispatcher.Options{Priority: 1})
	qt.Check(t, qt.DeepEquals(pinsBelow(t, dir), []string{"ldt_dropped", "ldt_passed"}))
	qt.Assert(t, qt.IsTrue(s.Drops(t)))
	qt.Check(t, qt.Equals(scene.PinnedCount(t, dir+"/ldt_dropped"), 20))

	// Of a failed attach only the new pins go.
	s.Join(t, options("shared.o", o), dispatcher.Options{})
	s.WantRefused(t, options("shared_wide.o", o), dispatcher.Options{Name: "wide"}, dispatcher.ErrIncompatible, `.*a shared map differs.*`)
	qt.Assert(t, qt.IsNil(os.Remove(dir+"/ldt_passed")))
	s.WantRefused(t, options("other.o", o), dispatcher.Options{}, fs.ErrExist, `.*ldt_other.*`)
	qt.Check(t, qt.DeepEquals(pinsBelow(t, dir), []string{"ldt_counts", "ldt_dropped"}))

	// Not on a disk, and nothing is left there.
	disk := t.TempDir()
	s.WantRefused(t, options("filter.o", dispatcher.LoadOptions{MapPins: disk + "/maps"}), dispatcher.Options{}, dispatcher.ErrUsage, `.*maps cannot be pinned in .*/maps: it is not in a bpffs; mount one .*`)
	s.WantRefused(t, options("shared.o", dispatcher.LoadOptions{BPFFS: disk}), dispatcher.Options{}, dispatcher.ErrUsage, `.*it is not in a bpffs; .*`)
	entries, err := os.ReadDir(disk)
	qt.Check(t, qt.IsNil(err))
	qt.Check(t, qt.HasLen(entries, 0))
}

// A map that the caller has: the program uses it instead of one of its own, and it stays the caller's.
func TestMapReplacement(t *testing.T) {
	s := scene.New(t)
	array := func(size uint32) *ebpf.Map {
		m, err := ebpf.NewMap(&ebpf.MapSpec{Name: "ldt_mine", Type: ebpf.Array, KeySize: 4, ValueSize: size, MaxEntries: 1})
		qt.Assert(t, qt.IsNil(err))
		t.Cleanup(func() { m.Close() })
		return m
	}
	mine := array(8)
	with := func(m map[string]*ebpf.Map) dispatcher.Source {
		return options("filter.o", dispatcher.LoadOptions{Maps: m, MapPins: s.BPFFS + "/maps"})
	}
	s.WantRefused(t, with(map[string]*ebpf.Map{"ldt_droped": mine}), dispatcher.Options{}, dispatcher.ErrUsage, `../testdata/filter.o: there is no map "ldt_droped" in the file \(it has: .*ldt_dropped\)`)
	s.WantRefused(t, with(map[string]*ebpf.Map{"ldt_dropped": array(16)}), dispatcher.Options{}, dispatcher.ErrIncompatible, `.*a shared map differs.*`)

	link := s.Join(t, with(map[string]*ebpf.Map{"ldt_dropped": mine}), dispatcher.Options{Persistent: true})
	qt.Assert(t, qt.IsTrue(s.Drops(t)))
	count := func() (n uint64) {
		qt.Assert(t, qt.IsNil(mine.Lookup(uint32(0), &n)))
		return n
	}
	qt.Check(t, qt.Equals(count(), 10))
	qt.Check(t, qt.DeepEquals(s.MemberPins(t, "ldt_filter"), []string{"map_%2Ebss", "map_%2Edata", "slot"}))
	qt.Check(t, qt.DeepEquals(pinsBelow(t, s.BPFFS+"/maps"), []string{}))
	qt.Assert(t, qt.IsNil(link.Detach(t.Context())))
	qt.Assert(t, qt.IsNil(link.Close()))
	qt.Check(t, qt.Equals(count(), 10))
}

// A loader may give a map another size than its file does. Such a map can be shared, and a replacement keeps it.
func TestMapSizedByLoader(t *testing.T) {
	s := scene.New(t)
	sized, err := ebpf.LoadCollectionSpec("../testdata/filter.o")
	qt.Assert(t, qt.IsNil(err))
	sized.Maps["ldt_dropped"].MaxEntries = 64
	link := s.Join(t, dispatcher.Spec(sized, dispatcher.LoadOptions{}), dispatcher.Options{})
	mapOf := func() *ebpf.Map {
		prog, err := link.Program(t.Context())
		qt.Assert(t, qt.IsNil(err))
		defer prog.Close()
		info, err := prog.Info()
		qt.Assert(t, qt.IsNil(err))
		ids, _ := info.MapIDs()
		for _, id := range ids {
			m, err := ebpf.NewMapFromID(id)
			qt.Assert(t, qt.IsNil(err))
			t.Cleanup(func() { m.Close() })
			if info, err := m.Info(); err == nil && info.Name == "ldt_dropped" {
				return m
			}
		}
		t.Fatal("no map")
		return nil
	}
	qt.Assert(t, qt.IsTrue(s.Drops(t)))
	before := mapOf()
	qt.Assert(t, qt.IsNil(link.Update(t.Context(), scene.File("filter.o", ""))))
	qt.Check(t, qt.Equals(mapOf().MaxEntries(), 64))
	var n uint64
	qt.Check(t, qt.IsNil(before.Lookup(uint32(0), &n)))
	qt.Check(t, qt.Not(qt.Equals(n, 0)))
	s.Join(t, options("filter.o", dispatcher.LoadOptions{Maps: map[string]*ebpf.Map{"ldt_dropped": before}}), dispatcher.Options{Name: "second"})
}

// Maps within maps come along, though no instruction names the inner one.
func TestMapInMap(t *testing.T) {
	s := scene.New(t)
	s.Join(t, scene.File("mapinmap.o", ""), dispatcher.Options{Persistent: true})
	pins := s.MemberPins(t, "ldt_nested")
	qt.Assert(t, qt.DeepEquals(pins, []string{"map_ldt_inner", "map_ldt_outer", "slot"}))
	inner, err := ebpf.LoadPinnedMap(s.Read(t).Pins[0], nil)
	qt.Assert(t, qt.IsNil(err))
	defer inner.Close()
	s.WantDropped(t)
	qt.Assert(t, qt.IsNil(inner.Put(uint32(0), uint32(scene.Port+3))))
	s.WantDropped(t, scene.Port+3)
	s.Clear(t)
}
