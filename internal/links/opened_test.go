package links

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// member is an entry with a link and a record, linked one of another tool, legacy one without a link.
func member(link uint32, name string, priority int) entry {
	return entry{
		Entry:   target.Entry{Program: 100 + link, Link: link, Name: name, Priority: priority},
		carried: 100 + link, rec: &state.Record{Name: name, Priority: priority},
	}
}

func linked(link uint32) entry {
	return entry{Entry: target.Entry{Program: 100 + link, Link: link}, carried: 100 + link}
}

func legacy(prog uint32) entry {
	return entry{Entry: target.Entry{Program: prog}, carried: prog}
}

// said returns the text and the hints of an error, as a user reads both.
func said(err error) string {
	if err == nil {
		return ""
	}
	return strings.TrimPrefix(hook.Wrap("", "", "", err).Error(), ": ")
}

func onDevice() *opened {
	return &opened{Opened: &target.Opened{Target: target.Target{Hook: hook.TCXIngress}}, name: "eth0"}
}

func onCgroup() *opened {
	return &opened{Opened: &target.Opened{Target: target.Target{Hook: hook.CgroupConnect4}}, cgroup: &kernel.Cgroup{Path: "/a"}}
}

// Where a link is to go is said by a link beside it, by an end, or on a device by a program.
func TestNeighbor(t *testing.T) {
	const (
		needs617 = "a place among others on a cgroup needs Linux 6.17: not supported; this kernel attaches behind all others: ask for that (--last), or for a priority of "
		noLinks  = "number 2 of 3 is between programs 201 and 202, which have no links, and the kernel puts a link on a cgroup next to links only: not supported; " +
			"adopt one of them first (id:201), or choose another place"
	)
	standIn := legacy(202)
	standIn.carried = 902
	for _, test := range []struct {
		about    string
		on       *opened
		revision uint64
		entries  []entry
		i        int
		at       kernel.Neighbor
		text     string
	}{
		{about: "an empty device", on: onDevice(), revision: 1},
		{about: "the end of a device", on: onDevice(), revision: 2, entries: []entry{linked(1)}, i: 1},
		{about: "the start of a device", on: onDevice(), revision: 2, entries: []entry{linked(1)}, at: kernel.Before(0, false)},
		{about: "before a link on a device", on: onDevice(), revision: 2, entries: []entry{legacy(201), linked(2)}, i: 1, at: kernel.Before(2, true)},
		{about: "behind a link on a device", on: onDevice(), revision: 2, entries: []entry{linked(1), legacy(202)}, i: 1, at: kernel.After(1, true)},
		{about: "between links: by the one behind", on: onDevice(), revision: 2, entries: []entry{linked(1), linked(2)}, i: 1, at: kernel.Before(2, true)},
		{about: "between programs on a device", on: onDevice(), revision: 2, entries: []entry{legacy(201), standIn}, i: 1, at: kernel.Before(902, false)},

		{about: "an empty cgroup that is not counted", on: onCgroup()},
		{about: "the end of a cgroup that is not counted", on: onCgroup(), entries: []entry{linked(1)}, i: 1},
		{about: "the start of a cgroup that is not counted", on: onCgroup(), entries: []entry{member(1, "a", 60)}, text: "number 1 of 2: " + needs617 + "60"},
		{about: "between those of a cgroup that is not counted", on: onCgroup(), entries: []entry{member(1, "a", 7), linked(2)}, i: 1, text: "number 2 of 3: " + needs617 + "50"},
		{about: "an empty cgroup", on: onCgroup(), revision: 1, at: kernel.Before(0, false)},
		{about: "the end of a cgroup", on: onCgroup(), revision: 2, entries: []entry{legacy(201)}, i: 1, at: kernel.After(0, false)},
		{about: "the start of a cgroup", on: onCgroup(), revision: 2, entries: []entry{legacy(201)}, at: kernel.Before(0, false)},
		{about: "before a link on a cgroup", on: onCgroup(), revision: 2, entries: []entry{legacy(201), linked(2)}, i: 1, at: kernel.Before(2, true)},
		{about: "behind a link on a cgroup", on: onCgroup(), revision: 2, entries: []entry{linked(1), legacy(202)}, i: 1, at: kernel.After(1, true)},
		{about: "between programs on a cgroup", on: onCgroup(), revision: 2, entries: []entry{legacy(201), legacy(202)}, i: 1, text: noLinks},
	} {
		t.Run(test.about, func(t *testing.T) {
			at, err := test.on.neighbor(&order{Order: test.entries, revision: test.revision}, test.i)
			qt.Check(t, qt.Equals(said(err), test.text))
			qt.Check(t, qt.Equals(at, test.at))
			if test.text != "" {
				qt.Check(t, qt.ErrorIs(err, ebpf.ErrNotSupported))
			}
		})
	}
}

// The highest priority is a member's: what has no record has none.
func TestHighest(t *testing.T) {
	pinned := entry{Entry: target.Entry{Link: 4, Name: "pinned", Priority: 99}, pinned: true}
	qt.Check(t, qt.Equals((&order{}).highest(), 0))
	qt.Check(t, qt.Equals((&order{Order: []entry{member(1, "a", 3), linked(2), member(3, "b", 8), pinned, member(5, "c", 5)}}).highest(), 8))
}

// Entries are the same by their links and places, whatever their programs are by now.
func TestSameLinks(t *testing.T) {
	replaced := linked(2)
	replaced.Program, replaced.carried = 7, 8
	for _, test := range []struct {
		a, b []entry
		same bool
	}{
		{nil, nil, true},
		{[]entry{linked(1), linked(2)}, []entry{linked(1), linked(2)}, true},
		{[]entry{linked(1), linked(2)}, []entry{linked(1), replaced}, true},
		{[]entry{linked(1), linked(2)}, []entry{linked(2), linked(1)}, false},
		{[]entry{linked(1), linked(2)}, []entry{linked(1)}, false},
		{[]entry{linked(1)}, []entry{linked(1), linked(2)}, false},
		{[]entry{linked(1)}, []entry{legacy(101)}, false},
	} {
		qt.Check(t, qt.Equals(sameLinks(&order{Order: test.a}, &order{Order: test.b}), test.same), qt.Commentf("%v, %v", test.a, test.b))
	}
}

func TestCgroupFlags(t *testing.T) {
	for _, test := range []struct {
		flags  uint32
		entry  entry
		text   string
		shared bool
	}{
		{0, legacy(1), "exclusive", false},
		{unix.BPF_F_ALLOW_OVERRIDE, legacy(1), "allow-override", false},
		{unix.BPF_F_ALLOW_MULTI, legacy(1), "allow-multi", true},
		{unix.BPF_F_ALLOW_MULTI | unix.BPF_F_ALLOW_OVERRIDE, legacy(1), "allow-multi", true},
		{unix.BPF_F_ALLOW_MULTI, linked(1), "", true},
	} {
		qt.Check(t, qt.Equals(cgroupFlags(test.flags, test.entry), test.text))
		qt.Check(t, qt.Equals(sharesCgroup(test.flags), test.shared))
	}
}

// What is adopted has no link. Where several have none, one has to be chosen.
func TestAdoptable(t *testing.T) {
	for _, test := range []struct {
		about   string
		entries []entry
		ref     hook.Ref
		i       int
		text    string
		is      error
	}{
		{about: "the only one without a link", entries: []entry{linked(1), legacy(7), member(2, "a", 1)}, i: 1},
		{about: "the one that is named", entries: []entry{legacy(7), legacy(8)}, ref: "id:8", i: 1},
		{about: "nothing", text: "nothing is attached that could be adopted", is: fs.ErrNotExist},
		{about: "only links", entries: []entry{linked(1), member(2, "a", 1)}, text: "nothing is attached without a link", is: fs.ErrNotExist},
		{about: "several", entries: []entry{legacy(7), linked(1), legacy(8)}, text: "several programs have no link: choose one, id:7 or id:8", is: hook.ErrUsage},
		{about: "a member", entries: []entry{member(2, "a", 1)}, ref: "a", text: `"a" is a member already`, is: fs.ErrExist},
		{about: "what is not there", entries: []entry{legacy(7)}, ref: "id:9", text: `there is no "id:9" (there are: id:7)`, is: fs.ErrNotExist},
	} {
		t.Run(test.about, func(t *testing.T) {
			i, err := onDevice().adoptable(&order{Order: test.entries}, test.ref)
			qt.Check(t, qt.Equals(said(err), test.text))
			qt.Check(t, qt.Equals(i, test.i))
			qt.Check(t, qt.Equals(errors.Is(err, test.is), true))
		})
	}
}

// What an opened target is called in an error, in a hint and in a record.
func TestOpenedNames(t *testing.T) {
	dev, cg := onDevice(), onCgroup()
	dev.NS = &kernel.NetNS{}
	qt.Check(t, qt.Equals(fmt.Sprint(dev), `device "eth0"`))
	qt.Check(t, qt.Equals(fmt.Sprint(cg), "the cgroup /a"))
	qt.Check(t, qt.Equals(dev.target(), "eth0"))
	qt.Check(t, qt.Equals(cg.target(), "/a"))
	qt.Check(t, qt.Equals(dev.seen(), state.LastSeen{Target: "eth0"}))
	qt.Check(t, qt.Equals(cg.seen(), state.LastSeen{Target: "/a"}))
	dev.kind.Attach = ebpf.AttachTCXIngress
	rec := dev.newRecord("a", "me", 7)
	qt.Check(t, qt.Not(qt.Equals(rec.Member, dev.newRecord("b", "me", 7).Member)))
	rec.Member = 0
	qt.Check(t, qt.DeepEquals(rec,
		&state.Record{Name: "a", Owner: "me", Priority: 7, Attach: ebpf.AttachTCXIngress, LastSeen: state.LastSeen{Target: "eth0"}}))
}
