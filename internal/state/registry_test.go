package state_test

import (
	"encoding/binary"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// These are offsets in a record; other programs read them, too.
const (
	offRecordMagic    = 0
	offRecordVersion  = 4
	offRecordPriority = 8
	offRecordAttach   = 12
	offRecordTo       = 16
	offRecordFrom     = 20
	offRecordName     = 24
	offRecordOwner    = 88
	offRecordInode    = 152
	offRecordCookie   = 160
	offRecordTarget   = 168
	recordBytes       = 424
)

func record() *state.Record {
	return &state.Record{
		Name: "guard", Owner: "ddos-filter", Priority: 65535, Attach: ebpf.AttachTCXEgress, MovedTo: 1<<32 - 1, MovedFrom: 7,
		LastSeen: state.LastSeen{Target: "eth0.100", NetNS: hook.NetNS{Inode: 0x1122334455667788, Cookie: 1<<64 - 1}},
	}
}

func marshalRecord(t testing.TB, r *state.Record) []byte {
	t.Helper()
	b, err := r.MarshalBinary()
	qt.Assert(t, qt.IsNil(err))
	return b
}

// A record is read as it was written.
func TestRecordRoundTrip(t *testing.T) {
	for _, want := range []*state.Record{
		record(),
		{Name: "x", Priority: 1},
		{Name: strings.Repeat("ü", 31) + "x", Owner: strings.Repeat("y", hook.MaxName), Priority: 50, Attach: ebpf.AttachCGroupInet4Connect,
			LastSeen: state.LastSeen{Target: "/" + strings.Repeat("z", 254)}},
	} {
		var got state.Record
		qt.Assert(t, qt.IsNil(got.UnmarshalBinary(marshalRecord(t, want))))
		qt.Check(t, qt.DeepEquals(&got, want))
	}
}

// The layout is a contract with programs of other versions.
func TestRecordLayout(t *testing.T) {
	b := marshalRecord(t, record())
	qt.Assert(t, qt.Equals(len(b), recordBytes))
	for off, want := range map[int]uint32{
		offRecordMagic: 0x6c647231, offRecordVersion: 1, offRecordPriority: 65535, offRecordAttach: uint32(ebpf.AttachTCXEgress),
		offRecordTo: 1<<32 - 1, offRecordFrom: 7,
	} {
		qt.Check(t, qt.Equals(binary.NativeEndian.Uint32(b[off:]), want), qt.Commentf("at %d", off))
	}
	qt.Check(t, qt.Equals(string(b[offRecordName:][:6]), "guard\x00"))
	qt.Check(t, qt.Equals(string(b[offRecordOwner:][:12]), "ddos-filter\x00"))
	qt.Check(t, qt.Equals(string(b[offRecordTarget:][:9]), "eth0.100\x00"))
	qt.Check(t, qt.Equals(binary.NativeEndian.Uint64(b[offRecordInode:]), 0x1122334455667788))
	qt.Check(t, qt.Equals(binary.NativeEndian.Uint64(b[offRecordCookie:]), 1<<64-1))
}

// A path that is too long is left out: a part of it could be another cgroup's path. So is a path without an end.
func TestRecordOfLongPath(t *testing.T) {
	long := record()
	long.LastSeen.Target = "/" + strings.Repeat("z", 255)
	endless := marshalRecord(t, record())
	copy(endless[offRecordTarget:], strings.Repeat("z", 256))
	for name, b := range map[string][]byte{"long": marshalRecord(t, long), "endless": endless} {
		var got state.Record
		qt.Assert(t, qt.IsNil(got.UnmarshalBinary(b)))
		qt.Check(t, qt.Equals(got.LastSeen.Target, ""), qt.Commentf("%s", name))
		qt.Check(t, qt.Equals(got.Name, "guard"))
	}
}

// A damaged record does not count: no name is better than a wrong name.
func TestRecordRejects(t *testing.T) {
	put := func(off int, v uint32) func([]byte) []byte {
		return func(b []byte) []byte { binary.NativeEndian.PutUint32(b[off:], v); return b }
	}
	text := func(off int, s string) func([]byte) []byte {
		return func(b []byte) []byte { copy(b[off:], s); return b }
	}
	for name, tc := range map[string]struct {
		damage func([]byte) []byte
		cause  error
	}{
		"empty":                   {func([]byte) []byte { return nil }, state.ErrNotOurs},
		"zeros":                   {func(b []byte) []byte { clear(b); return b }, state.ErrNotOurs},
		"cut":                     {func(b []byte) []byte { return b[:recordBytes-1] }, state.ErrNotOurs},
		"bad magic":               {put(offRecordMagic, 0x6c646331), state.ErrNotOurs},
		"later version":           {put(offRecordVersion, 2), ebpf.ErrNotSupported},
		"later version, cut name": {func(b []byte) []byte { return text(offRecordName, "\x00")(put(offRecordVersion, 9)(b)) }, ebpf.ErrNotSupported},
		"no priority":             {put(offRecordPriority, 0), state.ErrNotOurs},
		"priority too high":       {put(offRecordPriority, 65536), state.ErrNotOurs},
		"negative priority":       {put(offRecordPriority, 1<<31), state.ErrNotOurs},
		"no name":                 {text(offRecordName, "\x00"), state.ErrNotOurs},
		"name with a space":       {text(offRecordName, "a b\x00"), state.ErrNotOurs},
		"name of a link":          {text(offRecordName, "link:5\x00"), state.ErrNotOurs},
		"name without an end":     {text(offRecordName, strings.Repeat("x", 64)), state.ErrNotOurs},
		"name that is not UTF-8":  {text(offRecordName, "\xff\x00"), state.ErrNotOurs},
		"bad owner":               {text(offRecordOwner, "-x\x00"), state.ErrNotOurs},
	} {
		t.Run(name, func(t *testing.T) {
			var r state.Record
			qt.Check(t, qt.ErrorIs(r.UnmarshalBinary(tc.damage(marshalRecord(t, record()))), tc.cause))
			qt.Check(t, qt.Equals(r, state.Record{}))
		})
	}
}

// Any process with CAP_BPF can write to the registry: what is accepted must be a record that could have been written.
func FuzzRecord(f *testing.F) {
	f.Add(marshalRecord(f, record()))
	f.Add(marshalRecord(f, &state.Record{Name: "x", Priority: 1}))
	f.Add([]byte{})
	f.Add(make([]byte, recordBytes))
	f.Fuzz(func(t *testing.T, b []byte) {
		var r, again state.Record
		if r.UnmarshalBinary(b) != nil {
			qt.Assert(t, qt.Equals(r, state.Record{}))
			return
		}
		qt.Assert(t, qt.IsNil(hook.CheckName(r.Name)))
		qt.Assert(t, qt.IsTrue(r.Owner == "" || hook.CheckName(r.Owner) == nil))
		qt.Assert(t, qt.IsTrue(r.Priority >= hook.MinPriority && r.Priority <= hook.MaxPriority))
		qt.Assert(t, qt.IsNil(again.UnmarshalBinary(marshalRecord(t, &r))))
		qt.Assert(t, qt.Equals(again, r))
	})
}

// lockPins takes the lock of the pins in a bpffs.
func lockPins(t testing.TB, bpffs string) *state.Locked {
	t.Helper()
	pins, err := state.OpenPins(bpffs)
	qt.Assert(t, qt.IsNil(err))
	l, err := pins.Lock(t.Context())
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(l.Unlock)
	return l
}

// All processes share one registry.
func TestRegistry(t *testing.T) {
	testenv.CheckLeaks(t)
	l := lockPins(t, testenv.BPFFS(t))
	_, err := l.OpenRegistry()
	qt.Assert(t, qt.ErrorIs(err, fs.ErrNotExist))
	r, err := l.Registry()
	qt.Assert(t, qt.IsNil(err))
	defer r.Close()
	other, err := l.OpenRegistry()
	qt.Assert(t, qt.IsNil(err))
	defer other.Close()

	qt.Check(t, qt.IsNil(get(t, other, 5)))
	qt.Assert(t, qt.IsNil(r.Put(5, record())))
	qt.Check(t, qt.DeepEquals(get(t, other, 5), record()))
	qt.Assert(t, qt.IsNil(other.Put(1<<32-1, record())))
	qt.Check(t, qt.DeepEquals(links(t, r), []uint32{5, 1<<32 - 1}))
	for range 2 { // the second time there is nothing to delete
		qt.Assert(t, qt.IsNil(other.Delete(5)))
	}
	qt.Check(t, qt.IsNil(get(t, r, 5)))
	qt.Check(t, qt.DeepEquals(links(t, r), []uint32{1<<32 - 1}))
}

func get(t testing.TB, r *state.Registry, link uint32) *state.Record {
	t.Helper()
	rec, err := r.Get(link)
	qt.Assert(t, qt.IsNil(err))
	return rec
}

func links(t testing.TB, r *state.Registry) []uint32 {
	t.Helper()
	ids, err := r.Links()
	qt.Assert(t, qt.IsNil(err))
	slices.Sort(ids)
	return ids
}

// A member that was moved several times is found, also by its first link.
func TestRegistryMoved(t *testing.T) {
	testenv.CheckLeaks(t)
	r, err := lockPins(t, testenv.BPFFS(t)).Registry()
	qt.Assert(t, qt.IsNil(err))
	defer r.Close()
	for link := uint32(1); link <= 5; link++ {
		qt.Assert(t, qt.IsNil(r.Put(link, &state.Record{Name: fmt.Sprint(link), Priority: 1})))
	}
	move := func(from, to uint32) {
		t.Helper()
		qt.Assert(t, qt.IsNil(r.Moved(from, to, get(t, r, from))))
	}
	move(1, 2)
	move(2, 3)
	qt.Assert(t, qt.IsNil(r.Delete(2)))
	move(3, 4)
	for link, want := range map[uint32]uint32{1: 4, 3: 4, 4: 0, 5: 0} {
		qt.Check(t, qt.Equals(get(t, r, link).MovedTo, want), qt.Commentf("%d", link))
	}
}

// Without a registry nothing has a name, and nothing fails.
func TestNoRegistry(t *testing.T) {
	var r *state.Registry
	qt.Check(t, qt.IsNil(r.Put(1, record())))
	qt.Check(t, qt.IsNil(get(t, r, 1)))
	qt.Check(t, qt.HasLen(links(t, r), 0))
	qt.Check(t, qt.IsNil(r.Moved(1, 2, record())))
	qt.Check(t, qt.IsNil(r.Delete(1)))
	r.Close()
}

// Processes that make the registry at once, one of them without the lock, share one registry.
func TestRegistryMadeAtOnce(t *testing.T) {
	testenv.CheckLeaks(t)
	bpffs := testenv.BPFFS(t)
	l := lockPins(t, bpffs)
	var all sync.WaitGroup
	registries := make([]*state.Registry, 8)
	for i := range registries {
		all.Go(func() {
			r, err := l.Registry()
			if err != nil {
				t.Error(err)
				return
			}
			registries[i] = r
			if err := r.Put(uint32(i), record()); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if t.Failed() {
		return
	}
	for _, r := range registries {
		qt.Check(t, qt.HasLen(links(t, r), len(registries)))
		r.Close()
	}
}

// A map of another version is left alone.
func TestRegistryOfAnotherVersion(t *testing.T) {
	for name, spec := range map[string]*ebpf.MapSpec{
		"another size": {Type: ebpf.Hash, KeySize: 4, ValueSize: recordBytes + 8, MaxEntries: 4},
		"another key":  {Type: ebpf.Hash, KeySize: 8, ValueSize: recordBytes, MaxEntries: 4},
		"another type": {Type: ebpf.Array, KeySize: 4, ValueSize: recordBytes, MaxEntries: 4},
	} {
		t.Run(name, func(t *testing.T) {
			testenv.CheckLeaks(t)
			l := lockPins(t, testenv.BPFFS(t))
			spec.Name = "ldt_registry"
			m, err := ebpf.NewMap(spec)
			qt.Assert(t, qt.IsNil(err))
			defer m.Close()
			qt.Assert(t, qt.IsNil(m.Pin(l.Path("registry"))))
			r, err := l.Registry()
			qt.Check(t, qt.IsNil(err))
			qt.Check(t, qt.IsNil(r))
			_, err = l.OpenRegistry()
			qt.Check(t, qt.ErrorIs(err, ebpf.ErrNotSupported))
		})
	}
}

// Only what was read can count as a registry of another version: what could not be read may be good.
func TestRegistryThatCannotBeRead(t *testing.T) {
	testenv.CheckLeaks(t)
	l := lockPins(t, testenv.BPFFS(t))
	unreadable := func(cause error) {
		t.Helper()
		for _, open := range []func() (*state.Registry, error){l.OpenRegistry, l.Registry} {
			_, err := open()
			qt.Check(t, qt.ErrorIs(err, cause))
			qt.Check(t, qt.Not(qt.ErrorIs(err, ebpf.ErrNotSupported)))
			qt.Check(t, qt.Not(qt.ErrorIs(err, fs.ErrNotExist)))
		}
	}
	qt.Assert(t, qt.IsNil(os.Symlink("registry", l.RegistryPath())))
	unreadable(unix.ELOOP)
	qt.Assert(t, qt.IsNil(os.Remove(l.RegistryPath())))
	r, err := l.Registry()
	qt.Assert(t, qt.IsNil(err))
	testenv.WithFiles(t, 0, func() { unreadable(unix.EMFILE) })
	r.Close()

	// A closed map stands for one that the kernel does not allow to read.
	_, err = r.Links()
	qt.Check(t, qt.IsNotNil(err))
	_, err = r.Get(1)
	qt.Check(t, qt.IsNotNil(err))
	qt.Check(t, qt.IsNotNil(r.Moved(1, 2, record())))

	for name, put := range map[string]func(path string) error{
		"a folder":  func(path string) error { return os.Mkdir(path, 0o700) },
		"a program": testenv.VerdictProgram(t, "ldt_registry", testenv.XDPPass).Pin,
	} {
		qt.Assert(t, qt.IsNil(os.Remove(l.RegistryPath())))
		qt.Assert(t, qt.IsNil(put(l.RegistryPath())), qt.Commentf("%s", name))
		_, err = l.OpenRegistry()
		qt.Check(t, qt.ErrorIs(err, ebpf.ErrNotSupported), qt.Commentf("%s", name))
	}
}

// Without this program an administrator can read the registry with bpftool.
func TestBpftoolShowsRegistry(t *testing.T) {
	testenv.CheckLeaks(t)
	l := lockPins(t, testenv.BPFFS(t))
	r, err := l.Registry()
	qt.Assert(t, qt.IsNil(err))
	defer r.Close()
	qt.Assert(t, qt.IsNil(r.Put(12, record())))
	out, err := exec.Command("bpftool", "map", "dump", "pinned", l.Path("registry")).CombinedOutput()
	qt.Assert(t, qt.IsNil(err), qt.Commentf("bpftool is in the Debian package of that name: %s", out))
	for _, want := range []string{
		`"key": 12`, `"version": 1`, `"priority": 65535`, fmt.Sprintf(`"attach_type": %d`, ebpf.AttachTCXEgress),
		`"moved_to": 4294967295`, `"moved_from": 7`, `"name": "guard"`, `"owner": "ddos-filter"`,
	} {
		qt.Check(t, qt.StringContains(string(out), want))
	}
}
