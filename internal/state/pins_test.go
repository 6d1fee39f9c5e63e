package state_test

import (
	"fmt"
	"io/fs"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// A bpffs refuses dots, and no file name has a slash: every name of a member must
// become a valid file name, and must be read back from it.
func TestEscape(t *testing.T) {
	for name, want := range map[string]string{
		"":          "",
		"guard":     "guard",
		"A-z_09":    "A-z_09",
		"eth0.100":  "eth0%2E100",
		"a/b":       "a%2Fb",
		"..":        "%2E%2E",
		"100%":      "100%25",
		"%2E":       "%252E",
		"grün":      "gr%C3%BCn",
		"\x00\xff ": "%00%FF%20",
	} {
		qt.Check(t, qt.Equals(state.Escape(name), want))
		back, err := state.Unescape(want)
		qt.Check(t, qt.IsNil(err))
		qt.Check(t, qt.Equals(back, name))
	}
	for _, bad := range []string{"%", "%2", "a%", "%zz", "%+1"} {
		_, err := state.Unescape(bad)
		qt.Check(t, qt.IsNotNil(err), qt.Commentf("%s", bad))
	}
}

func FuzzEscape(f *testing.F) {
	f.Add("eth0.100")
	f.Add("%2E/\x00ü")
	f.Fuzz(func(t *testing.T, name string) {
		file := state.Escape(name)
		qt.Assert(t, qt.IsFalse(strings.ContainsAny(file, "./\x00")))
		back, err := state.Unescape(file)
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.Equals(back, name))
		_, _ = state.Unescape(name) // must not panic
	})
}

func TestParseChainFolder(t *testing.T) {
	for _, tc := range []struct {
		link  uint32
		chain uint64
		name  string
	}{
		{12, 99, "xdp_12"},
		{1<<32 - 1, 0, "xdp_4294967295"},
		{0, 0xabc, "xdp_chain_0000000000000abc"},
		{0, 1<<64 - 1, "xdp_chain_ffffffffffffffff"},
	} {
		qt.Check(t, qt.Equals(state.ChainFolder(tc.link, tc.chain), tc.name))
		link, chain := state.ParseChainFolder(tc.name)
		qt.Check(t, qt.Equals(link, tc.link))
		if tc.link == 0 {
			qt.Check(t, qt.Equals(chain, tc.chain))
		}
	}
	for _, other := range []string{"", "xdp_", "xdp_x", "xdp_chain_", "xdp_chain_xyz", "tmp_1", "xdp_-1"} {
		link, chain := state.ParseChainFolder(other)
		qt.Check(t, qt.Equals(link, 0), qt.Commentf("%s", other))
		qt.Check(t, qt.Equals(chain, 0), qt.Commentf("%s", other))
	}
}

func TestParseHeldPath(t *testing.T) {
	for _, path := range []string{
		"/sys/fs/bpf/libdispatcher/xdp_12/member_eth0%2E100/slot",
		"/sys/fs/bpf/libdispatcher/xdp_12/member_eth0%2E100",
		"/sys/fs/bpf/libdispatcher/xdp_12/member_eth0%2E100/",
		"/sys/fs/bpf//libdispatcher/./xdp_12/member_eth0%2E100/slot",
	} {
		pins, folder, member, err := state.ParseHeldPath(path)
		qt.Assert(t, qt.IsNil(err), qt.Commentf("%s", path))
		qt.Check(t, qt.Equals(folder, "xdp_12"))
		qt.Check(t, qt.Equals(member, "eth0.100"))
		qt.Check(t, qt.Equals(pins.BPFFS(), "/sys/fs/bpf"))
		qt.Check(t, qt.Equals(pins.HeldPath(folder, member), "/sys/fs/bpf/libdispatcher/xdp_12/member_eth0%2E100/slot"))
	}
	for _, path := range []string{
		"", "/", "slot", "/sys/fs/bpf", "/sys/fs/bpf/libdispatcher", "/sys/fs/bpf/libdispatcher/xdp_12", "/sys/fs/bpf/libdispatcher/xdp_12/root",
		"/sys/fs/bpf/other/xdp_12/member_a/slot", "/sys/fs/bpf/libdispatcher/xdp_12/member_%2/slot", "/sys/fs/bpf/libdispatcher/xdp_12/member_a/map_x",
	} {
		_, _, _, err := state.ParseHeldPath(path)
		qt.Check(t, qt.ErrorMatches(err, ".* is not a member's pin; such a path looks like /sys/fs/bpf/libdispatcher/xdp_12/member_NAME/slot or \\.\\.\\./tcx_13/member_NAME/link"), qt.Commentf("%s", path))
	}
}

func FuzzParseHeldPath(f *testing.F) {
	f.Add("/sys/fs/bpf/libdispatcher/xdp_12/member_eth0%2E100/slot")
	f.Add("/libdispatcher/x/member_")
	f.Fuzz(func(t *testing.T, path string) {
		pins, folder, member, err := state.ParseHeldPath(path)
		if err != nil {
			return
		}
		// The parts give a path that leads to the same parts.
		again, f2, m2, err := state.ParseHeldPath(pins.HeldPath(folder, member))
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.Equals(again.BPFFS(), pins.BPFFS()))
		qt.Assert(t, qt.Equals(f2, folder))
		qt.Assert(t, qt.Equals(m2, member))
	})
}

// pinnable is a map that serves as a root link.
func newPinnable(t *testing.T) *ebpf.Map {
	t.Helper()
	slot, err := state.NewSlot("ldt")
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { slot.Close() })
	return slot
}

func lock(t *testing.T, bpffs string) *state.Locked {
	t.Helper()
	pins, err := state.OpenPins(bpffs)
	qt.Assert(t, qt.IsNil(err))
	l, err := pins.Lock(t.Context(), nil)
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(l.Unlock)
	return l
}

// The folder of a chain is made with its first member and removed with its last.
func TestPins(t *testing.T) {
	testenv.CheckLeaks(t)
	l := lock(t, testenv.BPFFS(t))
	qt.Assert(t, qt.IsTrue(l.Alone))
	const folder = "xdp_12"
	add := func(name string, maps ...string) {
		t.Helper()
		m := state.MemberPins{Name: name, Slot: newPinnable(t), Maps: map[string]*ebpf.Map{}}
		for _, n := range maps {
			m.Maps[n] = newPinnable(t)
		}
		qt.Assert(t, qt.IsNil(l.Add(folder, newPinnable(t), m)))
	}
	// tree lists the pins below the chain's folder.
	tree := func() (paths []string) {
		for _, p := range l.List(folder) {
			paths = append(paths, strings.TrimPrefix(p, l.Path(folder)+"/"))
		}
		return paths
	}

	add("eth0.100", "counts", ".bss")
	add("b")
	qt.Assert(t, qt.DeepEquals(listed(t)(l.Chains()), []string{folder}))
	qt.Assert(t, qt.DeepEquals(listed(t)(l.Members(folder)), []string{"b", "eth0.100"}))
	qt.Assert(t, qt.IsTrue(l.Has(folder, "b")))
	qt.Assert(t, qt.IsFalse(l.Has(folder, "c")))
	qt.Assert(t, qt.DeepEquals(tree(), []string{
		"member_b/slot", "member_eth0%2E100/map_%2Ebss", "member_eth0%2E100/map_counts", "member_eth0%2E100/slot", "root",
	}))

	// The member's next program has another map.
	qt.Assert(t, qt.IsNil(l.SetMaps(folder, "eth0.100", map[string]*ebpf.Map{"counts": newPinnable(t), "flows": newPinnable(t)})))
	qt.Assert(t, qt.DeepEquals(tree(), []string{
		"member_b/slot", "member_eth0%2E100/map_counts", "member_eth0%2E100/map_flows", "member_eth0%2E100/slot", "root",
	}))

	qt.Assert(t, qt.IsNil(l.Remove(folder, "none")))
	qt.Assert(t, qt.IsNil(l.Remove(folder, "eth0.100")))
	qt.Assert(t, qt.DeepEquals(tree(), []string{"member_b/slot", "root"}))
	qt.Assert(t, qt.IsNil(l.Move(folder, "xdp_13", nil)))
	qt.Assert(t, qt.DeepEquals(listed(t)(l.Chains()), []string{"xdp_13"}))
	qt.Assert(t, qt.IsNil(l.Remove("xdp_13", "b")))
	qt.Assert(t, qt.HasLen(listed(t)(l.Chains()), 0))
}

// listed returns the list, which must have been read without an error.
func listed(t testing.TB) func(names []string, err error) []string {
	t.Helper()
	return func(names []string, err error) []string {
		t.Helper()
		qt.Assert(t, qt.IsNil(err))
		return names
	}
}

// A folder that cannot be read does not count as empty: the chain's folder is removed with the last member.
func TestPinsThatCannotBeRead(t *testing.T) {
	testenv.CheckLeaks(t)
	l := lock(t, testenv.BPFFS(t))
	for _, folder := range []string{"xdp_12", "tcx_13"} {
		qt.Assert(t, qt.IsNil(l.Add(folder, nil, state.MemberPins{Name: "one", Slot: newPinnable(t)})))
	}
	testenv.WithFiles(t, 0, func() {
		for name, list := range map[string]func() ([]string, error){
			"chains": l.Chains, "links": l.Links, "moves": l.Moves, "leftovers": l.Leftovers,
			"members": func() ([]string, error) { return l.Members("xdp_12") },
		} {
			_, err := list()
			qt.Check(t, qt.ErrorIs(err, unix.EMFILE), qt.Commentf("%s", name))
		}
		qt.Check(t, qt.ErrorIs(l.Remove("xdp_12", "one"), unix.EMFILE))
	})
	qt.Check(t, qt.IsTrue(l.Has("xdp_12", "one")))
}

// A process that waits for the lock gets it when it is free, also after its owner was killed.
func TestLockIsExclusive(t *testing.T) {
	testenv.CheckLeaks(t)
	bpffs := testenv.BPFFS(t)
	first := lock(t, bpffs)
	got := make(chan error)
	go func() {
		pins, err := state.OpenPins(bpffs)
		if err == nil {
			var l *state.Locked
			if l, err = pins.Lock(t.Context(), nil); err == nil {
				l.Unlock()
			}
		}
		got <- err
	}()
	select {
	case err := <-got:
		t.Fatalf("two have the lock: %v", err)
	default:
	}
	first.Unlock()
	qt.Assert(t, qt.IsNil(<-got))
}

func TestNoBPFFS(t *testing.T) {
	_, err := state.OpenPins(t.TempDir())
	qt.Assert(t, qt.ErrorIs(err, fs.ErrNotExist))
	_, err = state.OpenPins(fmt.Sprintf("%s/none", t.TempDir()))
	qt.Assert(t, qt.ErrorIs(err, fs.ErrNotExist))
}
