package mapdata_test

import (
	"io/fs"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/mapdata"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/internal/typed"
	"github.com/libdispatcher/dispatcher/programs"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// open loads a built-in program, and opens its maps.
func open(t *testing.T, name string) (of map[string]*mapdata.Map, real map[string]*ebpf.Map) {
	t.Helper()
	testenv.CheckLeaks(t)
	spec, err := programs.Spec(name)
	qt.Assert(t, qt.IsNil(err))
	if m := spec.Maps["droplist_v4"]; m != nil {
		m.MaxEntries = 2
	}
	function := programs.Function(name, hook.XDP)
	spec.Programs = map[string]*ebpf.ProgramSpec{function: spec.Programs[function]} // the others need newer kernels
	collection, err := ebpf.NewCollection(spec)
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(collection.Close)
	info, err := collection.Programs[function].Info()
	qt.Assert(t, qt.IsNil(err))
	id, _ := info.ID()
	list, err := mapdata.Of(uint32(id))
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { mapdata.Close(list) })
	of = map[string]*mapdata.Map{}
	for i, m := range list {
		qt.Check(t, qt.IsTrue(i == 0 || list[i-1].Name <= m.Name))
		of[m.Name] = m
	}
	return of, collection.Maps
}

func parse(t *testing.T, of typed.Type, words ...string) []byte {
	t.Helper()
	b, err := of.Parse(words, nil)
	qt.Assert(t, qt.IsNil(err))
	return b
}

// Entries are added, changed, found, listed and deleted in the kernel's map, by words that its BTF gives a meaning.
func TestEntries(t *testing.T) {
	of, real := open(t, "droplist")
	m := of["droplist_v4"]
	qt.Assert(t, qt.IsNotNil(m))
	qt.Check(t, qt.Equals(m.Key.String(), "IPv4 prefix"))
	qt.Check(t, qt.Equals(m.MaxEntries, 2))
	ten, other := parse(t, m.Key, "10.0.0.0/8"), parse(t, m.Key, "192.0.2.7")

	qt.Check(t, qt.IsNil(m.Put(ten, parse(t, m.Value, "3"), true)))
	var there uint64
	qt.Assert(t, qt.IsNil(real["droplist_v4"].Lookup(ten, &there)))
	qt.Check(t, qt.Equals(there, 3))
	err := m.Put(ten, parse(t, m.Value, "4"), true)
	qt.Check(t, qt.ErrorIs(err, fs.ErrExist))
	qt.Check(t, qt.ErrorMatches(err, "map droplist_v4 has an entry 10.0.0.0/8 already.*"))
	qt.Check(t, qt.IsNil(m.Put(ten, parse(t, m.Value, "5"), false)))

	_, err = m.Get(other)
	qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
	qt.Check(t, qt.ErrorMatches(err, "map droplist_v4 has no entry 192.0.2.7/32"))
	qt.Check(t, qt.IsNil(m.Put(other, parse(t, m.Value, "0"), true)))
	entry, err := m.Get(other)
	qt.Check(t, qt.IsNil(err))
	qt.Check(t, qt.IsTrue(entry.Zero()))
	err = m.Put(parse(t, m.Key, "10.1.0.0/16"), parse(t, m.Value, "0"), true)
	qt.Check(t, qt.ErrorIs(err, unix.ENOSPC))
	qt.Check(t, qt.ErrorMatches(err, "map droplist_v4 is full: it has 2 entries.*"))

	got := map[string]string{}
	qt.Check(t, qt.IsNil(m.Each(func(e mapdata.Entry) error {
		got[typed.Words(m.Key.Value(e.Key))] = typed.Words(m.Value.Value(e.Value))
		return nil
	})))
	qt.Check(t, qt.DeepEquals(got, map[string]string{"10.0.0.0/8": "5", "192.0.2.7/32": "0"}))

	qt.Check(t, qt.IsNil(m.Delete(ten)))
	qt.Check(t, qt.ErrorIs(real["droplist_v4"].Lookup(ten, &there), ebpf.ErrKeyNotExist))
	qt.Check(t, qt.ErrorIs(m.Delete(ten), fs.ErrNotExist))

	constants := of[".rodata"]
	qt.Assert(t, qt.IsNotNil(constants))
	qt.Check(t, qt.IsTrue(constants.Frozen))
	qt.Check(t, qt.ErrorIs(constants.Put(make([]byte, 4), make([]byte, constants.Value.Size()), false), hook.ErrIncompatible))
}

// The values of all CPUs are added up, field by field, and a value that is set is the sum.
func TestPerCPU(t *testing.T) {
	of, real := open(t, "count")
	m, array := of["protocols"], of["total"]
	qt.Assert(t, qt.IsNotNil(m))
	qt.Assert(t, qt.IsNotNil(array))
	qt.Check(t, qt.IsTrue(m.PerCPU && array.PerCPU))
	key := parse(t, m.Key, "ethertype=2048", "protocol=17")
	perCPU := make([][]byte, ebpf.MustPossibleCPU())
	for cpu := range perCPU {
		perCPU[cpu] = parse(t, m.Value, "packets=2", "bytes=100")
	}
	qt.Assert(t, qt.IsNil(real["protocols"].Put(key, perCPU)))
	want := parse(t, m.Value, "packets="+typed.Words(2*len(perCPU)), "bytes="+typed.Words(100*len(perCPU)))
	entry, err := m.Get(key)
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.DeepEquals(entry.Value, want))
	qt.Check(t, qt.DeepEquals(entry.PerCPU, perCPU))
	qt.Check(t, qt.IsNil(m.Each(func(e mapdata.Entry) error {
		qt.Check(t, qt.DeepEquals(e, entry))
		return nil
	})))

	seven := parse(t, m.Value, "packets=7")
	qt.Check(t, qt.IsNil(m.Put(key, seven, false)))
	entry, err = m.Get(key)
	qt.Check(t, qt.IsNil(err))
	qt.Check(t, qt.DeepEquals(entry.Value, seven))

	first, last := parse(t, array.Key, "0"), parse(t, array.Key, "1000")
	qt.Check(t, qt.IsNil(array.Put(first, seven, true))) // all entries are there from the start
	err = array.Put(last, seven, false)
	qt.Check(t, qt.ErrorIs(err, hook.ErrUsage))
	qt.Check(t, qt.ErrorMatches(err, "map total has entries 0 to 0"))
	qt.Check(t, qt.ErrorIs(array.Delete(first), hook.ErrUsage))
}

// The kernel cuts the names of maps.
func TestCalled(t *testing.T) {
	cut := &mapdata.Map{Name: "a_name_of_fifte"}
	qt.Check(t, qt.IsTrue(cut.Called("a_name_of_fifteen_and_more")))
	qt.Check(t, qt.IsFalse(cut.Called("a_name_of")))
	short := &mapdata.Map{Name: "list"}
	qt.Check(t, qt.IsTrue(short.Called("list")))
	qt.Check(t, qt.IsFalse(short.Called("lists")))
}
