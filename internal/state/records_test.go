package state_test

import (
	"encoding/binary"
	"fmt"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// These are offsets in a record; other programs read them, too.
const (
	offRecordMagic    = 0
	offRecordVersion  = 4
	offRecordPriority = 8
	offRecordAttach   = 12
	offRecordMember   = 16
	offRecordFrom     = 24
	offRecordName     = 32
	offRecordOwner    = 96
	offRecordInode    = 160
	offRecordCookie   = 168
	offRecordTarget   = 176
	recordBytes       = 432
)

func record() *state.Record {
	return &state.Record{
		Name: "guard", Owner: "ddos-filter", Priority: 65535, Attach: ebpf.AttachTCXEgress, Member: 1<<64 - 2, MovedFrom: 7,
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
		offRecordFrom: 7,
	} {
		qt.Check(t, qt.Equals(binary.NativeEndian.Uint32(b[off:]), want), qt.Commentf("at %d", off))
	}
	qt.Check(t, qt.Equals(binary.NativeEndian.Uint64(b[offRecordMember:]), 1<<64-2))
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

// Any process with CAP_BPF can write records: what is accepted must be a record that could have been written.
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

// What has the records of a program is found from the program, by every process.
func TestRecords(t *testing.T) {
	testenv.CheckLeaks(t)
	prog := testenv.VerdictProgram(t, "ldt_member", testenv.TCNext, testenv.On(hook.TCIngress))
	qt.Check(t, qt.HasLen(recordsOf(t, prog), 0))
	r := keepRecords(t, prog)
	other := recordsOf(t, prog)
	qt.Assert(t, qt.HasLen(other, 1))
	qt.Check(t, qt.IsNil(get(t, other, 5)))
	qt.Assert(t, qt.IsNil(r.Put(5, record())))
	qt.Check(t, qt.DeepEquals(get(t, other, 5), record()))
	again := record()
	again.Priority = 7
	qt.Assert(t, qt.IsNil(other.Put(5, again)))
	qt.Check(t, qt.DeepEquals(get(t, r, 5), again))
	for range 2 { // the second time there is nothing to delete
		qt.Assert(t, qt.IsNil(other.Delete(5)))
	}
	qt.Check(t, qt.IsNil(get(t, r, 5)))

	// Another program can have them too.
	twin := testenv.VerdictProgram(t, "ldt_twin", testenv.TCNext, testenv.On(hook.TCIngress))
	qt.Assert(t, qt.IsNil(r.Bind(twin)))
	qt.Assert(t, qt.IsNil(keepRecords(t, twin).Put(6, record())))
	qt.Check(t, qt.DeepEquals(get(t, r, 6), record()))
	// Of a link that does not exist the record goes with the next one.
	qt.Assert(t, qt.IsNil(r.Put(7, record())))
	qt.Check(t, qt.IsNil(get(t, other, 6)))
}

func recordsOf(t testing.TB, prog *ebpf.Program) state.Records {
	t.Helper()
	r, err := state.RecordsOf(prog)
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(r.Close)
	return r
}

func keepRecords(t testing.TB, prog *ebpf.Program) state.Records {
	t.Helper()
	r, err := state.KeepRecords(prog)
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(r.Close)
	return r
}

func get(t testing.TB, r state.Records, link uint32) *state.Record {
	t.Helper()
	rec, err := r.Get(link)
	qt.Assert(t, qt.IsNil(err))
	return rec
}

// Processes that make the records of a program at once make several; all are read.
func TestRecordsMadeAtOnce(t *testing.T) {
	testenv.CheckLeaks(t)
	prog := testenv.VerdictProgram(t, "ldt_member", testenv.TCNext, testenv.On(hook.TCIngress))
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			r, err := state.KeepRecords(prog)
			if err != nil {
				t.Error(err)
				return
			}
			r.Close()
		})
	}
	all.Wait()
	r := recordsOf(t, prog)
	qt.Assert(t, qt.IsTrue(len(r) > 0))
	for i := range r {
		qt.Assert(t, qt.IsNil(r[i:i+1].Put(9, record())))
		qt.Check(t, qt.DeepEquals(get(t, recordsOf(t, prog), 9), record()))
		qt.Assert(t, qt.IsNil(r.Delete(9)))
	}
}

// A map that only looks like records is none.
func TestForeignRecords(t *testing.T) {
	trie := func(name string, value uint32) *ebpf.MapSpec {
		return &ebpf.MapSpec{Name: name, Type: ebpf.LPMTrie, KeySize: 8, ValueSize: value, MaxEntries: 4, Flags: unix.BPF_F_NO_PREALLOC}
	}
	for name, spec := range map[string]*ebpf.MapSpec{
		"another size": trie("ld_records", recordBytes+8),
		"another name": trie("ldt_records", recordBytes),
		"another type": {Name: "ld_records", Type: ebpf.Hash, KeySize: 8, ValueSize: recordBytes, MaxEntries: 4},
	} {
		t.Run(name, func(t *testing.T) {
			testenv.CheckLeaks(t)
			prog := testenv.VerdictProgram(t, "ldt_member", testenv.TCNext, testenv.On(hook.TCIngress))
			m, err := ebpf.NewMap(spec)
			qt.Assert(t, qt.IsNil(err))
			defer m.Close()
			qt.Assert(t, qt.IsNil(prog.BindMap(m)))
			qt.Check(t, qt.HasLen(recordsOf(t, prog), 0))
			qt.Assert(t, qt.IsNil(keepRecords(t, prog).Put(1, record())))
			qt.Check(t, qt.DeepEquals(get(t, recordsOf(t, prog), 1), record()))
		})
	}
}

// Without this program an administrator can read the records with bpftool.
func TestBpftoolShowsRecords(t *testing.T) {
	testenv.CheckLeaks(t)
	prog := testenv.VerdictProgram(t, "ldt_member", testenv.TCNext, testenv.On(hook.TCIngress))
	r := keepRecords(t, prog)
	qt.Assert(t, qt.IsNil(r.Put(12, record())))
	id, err := kernel.MapID(r[0])
	qt.Assert(t, qt.IsNil(err))
	out, err := exec.Command("bpftool", "map", "dump", "id", fmt.Sprint(id)).CombinedOutput()
	qt.Assert(t, qt.IsNil(err), qt.Commentf("bpftool is in the Debian package of that name: %s", out))
	for _, want := range []string{
		`"link": 12`, `"version": 1`, `"priority": 65535`, fmt.Sprintf(`"attach_type": %d`, ebpf.AttachTCXEgress),
		`"moved_from": 7`, `"name": "guard"`, `"owner": "ddos-filter"`,
	} {
		qt.Check(t, qt.StringContains(string(out), want))
	}
}
