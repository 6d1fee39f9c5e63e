package filters

import (
	"fmt"
	"io/fs"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// A filter of tc for a test: at that preference and handle, of that name.
func filter(pref uint16, handle uint32, name string) rtnl.Filter {
	return rtnl.Filter{
		Filter:  hook.Filter{Parent: rtnl.ClsactIngress, Pref: pref, Protocol: unix.ETH_P_ALL, Handle: handle, DirectAction: true},
		Kind:    "bpf",
		Name:    name,
		Qdisc:   "clsact",
		Program: 100*uint32(pref) + handle,
	}
}

// member is the filter of a member, named after its place.
func member(pref uint16, handle uint32) rtnl.Filter {
	return filter(pref, handle, label{Name: fmt.Sprintf("m%d.%d", pref, handle), Priority: int(max(pref, 1))}.String())
}

// foreign is a filter of another tool.
func foreign(pref uint16, handle uint32) rtnl.Filter { return filter(pref, handle, "cls") }

func ingress(all ...rtnl.Filter) *side {
	o := &target.Opened{Target: target.Target{Hook: hook.TCIngress}}
	return newSide(o, o.Hook, &rtnl.Device{Name: "eth0", Index: 7}, all)
}

// said returns the text and the hints of an error, as a user reads both.
func said(err error) string {
	if err == nil {
		return ""
	}
	return strings.TrimPrefix(hook.Wrap("", "", "", err).Error(), ": ")
}

func TestLabel(t *testing.T) {
	for _, test := range []struct {
		label label
		text  string
	}{
		{label{"a", "me", 50}, "libdispatcher priority=50 owner=me name=a"},
		{label{"a", "", 65535}, "libdispatcher priority=65535 owner=- name=a"},
		{label{"name=ä", "owner=x", 1}, "libdispatcher priority=1 owner=owner=x name=name=ä"},
	} {
		qt.Check(t, qt.Equals(test.label.String(), test.text))
		parsed, ok := parseLabel(test.text)
		qt.Check(t, qt.IsTrue(ok))
		qt.Check(t, qt.Equals(parsed, test.label))
	}
}

// foreignNames are names of filters that are no labels.
var foreignNames = []string{
	"", "cls", "bpf_prog.o:[classifier]", "libdispatcher", "libdispatcher priority=50 owner=me",
	"libdispatcher priority=50 owner=me name=",
	"libdispatcher priority=0 owner=me name=a",
	"libdispatcher priority=65536 owner=me name=a",
	"libdispatcher priority=-1 owner=me name=a",
	"libdispatcher priority=050 owner=me name=a", // not as it is written
	"libdispatcher priority=+5 owner=me name=a",
	"libdispatcher  priority=5 owner=me name=a",
	"libdispatcher priority=5 owner=me name=a ",
	"libdispatcher priority=5 owner=me name=a b",
	"libdispatcher priority=5 owner=me name=-a",
	"libdispatcher priority=5 owner=-me name=a",
	"libdispatcher priority=5 owner=me name=id:7",
	"libdispatcher priority=5 owner= name=a",
	"libdispatcher priority=99999999999999999999 owner=me name=a",
	" libdispatcher priority=5 owner=me name=a",
	"libdispatcher priority=5 owner=me name=a\n",
	"libdispatcher priority=5 owner=me name=" + strings.Repeat("a", hook.MaxName+1),
}

func TestParseLabelForeign(t *testing.T) {
	for _, name := range foreignNames {
		_, ok := parseLabel(name)
		qt.Check(t, qt.IsFalse(ok), qt.Commentf("%q", name))
	}
}

// What is taken for a label has been written by this package: it reads the same when it is written again.
func FuzzParseLabel(f *testing.F) {
	for _, name := range foreignNames {
		f.Add(name)
	}
	f.Add(label{"a", "me", 50}.String())
	f.Add(label{"a", "", 1}.String())
	f.Fuzz(func(t *testing.T, name string) {
		l, ok := parseLabel(name)
		if !ok {
			return
		}
		qt.Check(t, qt.Equals(l.String(), name))
		qt.Check(t, qt.IsNil(hook.CheckName(l.Name)))
		qt.Check(t, qt.IsTrue(l.Priority >= hook.MinPriority && l.Priority <= hook.MaxPriority))
	})
}

// A side has the filters of its hook only, and of these those with a label are members, if their program's verdict counts.
func TestNewSide(t *testing.T) {
	egress := member(1, 1)
	egress.Parent = rtnl.ClsactEgress
	class := member(3, 1)
	class.DirectAction = false
	sd := ingress(egress, member(2, 1), class, foreign(4, 1))
	qt.Assert(t, qt.HasLen(sd.list, 3))
	qt.Check(t, qt.Equals(sd.list[0].Entry, target.Entry{Program: 201, Name: "m2.1", Priority: 2, Stays: true}))
	qt.Check(t, qt.IsTrue(sd.list[0].ours()))
	qt.Check(t, qt.Equals(sd.list[0].label(), sd.list[0].Filter.Name))
	qt.Check(t, qt.IsFalse(sd.list[1].ours()))
	qt.Check(t, qt.IsFalse(sd.list[2].ours()))

	less := sd.without(0)
	qt.Check(t, qt.HasLen(less.list, 2))
	qt.Check(t, qt.HasLen(less.all, 3)) // its preference is still taken
	qt.Check(t, qt.HasLen(sd.list, 3))
}

func TestFree(t *testing.T) {
	otherChain, otherProtocol := member(10, 2), member(10, 2)
	otherChain.Chain, otherProtocol.Protocol = 1, unix.ETH_P_IP
	const none = "there is no preference (pref) left between %d and %d, the filters that are to run before and after it; choose another priority"
	for _, test := range []struct {
		about    string
		all      []rtnl.Filter
		i        int
		priority int
		others   map[int]string
		pref     uint16
		handle   uint32
		before   []string // the members that are to be added again
		text     string
	}{
		{about: "an empty side: the priority", priority: 50, pref: 50, handle: 1},
		{about: "an empty side: the highest priority", priority: hook.MaxPriority, pref: hook.MaxPriority, handle: 1},
		{about: "between two: the priority", all: []rtnl.Filter{foreign(10, 1), foreign(90, 1)}, i: 1, priority: 50, pref: 50, handle: 1},
		{about: "between two: not below the one before", all: []rtnl.Filter{foreign(10, 1), foreign(90, 1)}, i: 1, priority: 10, pref: 11, handle: 1},
		{about: "between two: not above the one behind", all: []rtnl.Filter{foreign(10, 1), foreign(90, 1)}, i: 1, priority: 95, pref: 89, handle: 1},
		{about: "before all", all: []rtnl.Filter{foreign(10, 1)}, priority: 50, pref: 9, handle: 1},
		{about: "behind all", all: []rtnl.Filter{foreign(60, 1)}, i: 1, priority: 50, pref: 61, handle: 1},
		{about: "just one is left", all: []rtnl.Filter{foreign(10, 1), foreign(12, 1)}, i: 1, priority: 50, pref: 11, handle: 1},

		{about: "one of another kind has it", priority: 50, others: map[int]string{50: "u32"}, pref: 51, handle: 1},
		{about: "they have those behind it too", all: []rtnl.Filter{foreign(52, 1)}, priority: 50, others: map[int]string{50: "u32", 51: "flower"}, pref: 49, handle: 1},
		{about: "they have all that are left", all: []rtnl.Filter{foreign(10, 1), foreign(12, 1)}, i: 1, priority: 10, others: map[int]string{9: "u32", 11: "matchall"},
			text: strings.Replace(fmt.Sprintf(none, 10, 12), ";", ", with filters of other kinds between them: matchall at 11;", 1)},

		{about: "none is left between others' filters", all: []rtnl.Filter{foreign(10, 1), foreign(11, 1)}, i: 1, priority: 10, text: fmt.Sprintf(none, 10, 11)},
		{about: "none is left before others' filter", all: []rtnl.Filter{foreign(1, 1)}, priority: 1, text: fmt.Sprintf(none, 0, 1)},
		{about: "none is left behind the last", all: []rtnl.Filter{member(hook.MaxPriority, 1)}, i: 1, priority: 1, text: fmt.Sprintf(none, hook.MaxPriority, hook.MaxPriority+1)},
		{about: "shared with the member behind it", all: []rtnl.Filter{foreign(9, 1), member(10, 1)}, i: 1, priority: 10, pref: 10, handle: 2},
		{about: "shared, with a handle of its own", all: []rtnl.Filter{foreign(9, 1), member(10, 7), member(10, 3)}, i: 1, priority: 10, pref: 10, handle: 8},
		{about: "shared: those of the preference before it come again", all: []rtnl.Filter{member(10, 3), member(10, 2), member(10, 1)}, i: 2, priority: 10, pref: 10, handle: 4, before: []string{"m10.3", "m10.2"}},
		{about: "not shared with a filter of others", all: []rtnl.Filter{foreign(9, 1), member(10, 2), foreign(10, 1)}, i: 1, priority: 10, text: fmt.Sprintf(none, 9, 10)},
		{about: "not shared with another chain of tc", all: []rtnl.Filter{foreign(9, 1), otherChain, member(10, 1)}, i: 1, priority: 10, text: fmt.Sprintf(none, 9, 10)},
		{about: "not shared with another protocol", all: []rtnl.Filter{foreign(9, 1), member(10, 1), otherProtocol}, i: 1, priority: 10, text: fmt.Sprintf(none, 9, 10)},
	} {
		t.Run(test.about, func(t *testing.T) {
			for pref, kind := range test.others {
				test.all = append(test.all, rtnl.Filter{Filter: hook.Filter{Parent: rtnl.ClsactIngress, Pref: uint16(pref)}, Kind: kind, Qdisc: "clsact"})
			}
			f, before, err := ingress(test.all...).free(test.i, test.priority)
			qt.Assert(t, qt.Equals(said(err), test.text))
			if err != nil {
				qt.Check(t, qt.ErrorIs(err, hook.ErrBusy))
				return
			}
			qt.Check(t, qt.Equals(f, hook.Filter{Parent: rtnl.ClsactIngress, Pref: test.pref, Protocol: unix.ETH_P_ALL, Handle: test.handle, DirectAction: true}))
			var names []string
			for _, e := range before {
				names = append(names, e.Entry.Name)
			}
			qt.Check(t, qt.DeepEquals(names, test.before))
		})
	}
}

// A filter that is about to leave still has its handle.
func TestFreeBesideALeavingFilter(t *testing.T) {
	f, before, err := ingress(foreign(9, 1), member(10, 5), member(10, 1)).without(1).free(1, 10)
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.HasLen(before, 0))
	qt.Check(t, qt.Equals(f.Handle, 6))
}

func TestFreeOnEgress(t *testing.T) {
	sd := ingress()
	sd.opened.Hook = hook.TCEgress
	f, _, err := sd.free(0, 1)
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(f.Parent, rtnl.ClsactEgress))
}

func TestAllOurs(t *testing.T) {
	sd := ingress(member(1, 1), member(1, 2), member(2, 1), foreign(2, 2), foreign(3, 1))
	for pref, all := range map[int]bool{0: false, 1: true, 2: false, 3: false, 4: false} {
		qt.Check(t, qt.Equals(sd.allOurs(pref), all), qt.Commentf("pref %d", pref))
	}
}

// Without two filters of one member there is nothing to remove, nor to ask the kernel for.
func TestDropTwinsWithoutTwins(t *testing.T) {
	sd := ingress(foreign(1, 1), foreign(1, 2), member(2, 1), member(3, 1))
	qt.Assert(t, qt.IsNil(sd.dropTwins(nil)))
	qt.Check(t, qt.HasLen(sd.list, 4))
}

// A member sees all packets, and its program says what becomes of them: other filters cannot be one.
func TestAdoptable(t *testing.T) {
	class, ip, chain := foreign(1, 1), foreign(1, 1), foreign(1, 1)
	class.DirectAction, ip.Protocol, chain.Chain = false, unix.ETH_P_IP, 4
	for _, test := range []struct {
		about string
		all   []rtnl.Filter
		ref   hook.Ref
		i     int
		text  string
		is    error
	}{
		{about: "the only one", all: []rtnl.Filter{member(1, 1), foreign(2, 1)}, i: 1},
		{about: "the one that is named", all: []rtnl.Filter{foreign(1, 1), foreign(2, 1)}, ref: "id:201", i: 1},
		{about: "nothing", text: "there is no filter that could be adopted", is: fs.ErrNotExist},
		{about: "members only", all: []rtnl.Filter{member(1, 1)}, text: "there is no filter that could be adopted", is: fs.ErrNotExist},
		{about: "several", all: []rtnl.Filter{foreign(1, 1), member(2, 1), foreign(3, 1)}, text: "there are several filters: choose one, id:101 or id:301", is: hook.ErrUsage},
		{about: "what is not there", all: []rtnl.Filter{foreign(1, 1)}, ref: "id:9", text: `there is no "id:9" (there are: id:101)`, is: fs.ErrNotExist},
		{about: "a class", all: []rtnl.Filter{class}, text: "the filter is not in direct-action mode (da): what its program returns is a class, not a verdict", is: hook.ErrIncompatible},
		{about: "one protocol", all: []rtnl.Filter{ip}, text: "the filter is for one protocol (0x0800), and a member sees all packets", is: hook.ErrIncompatible},
		{about: "a chain of tc", all: []rtnl.Filter{chain}, text: "the filter is in chain 4 of tc, where only some packets come", is: hook.ErrIncompatible},
	} {
		t.Run(test.about, func(t *testing.T) {
			i, err := ingress(test.all...).adoptable(test.ref)
			qt.Check(t, qt.Equals(said(err), test.text))
			qt.Check(t, qt.Equals(i, test.i))
			if test.is != nil {
				qt.Check(t, qt.ErrorIs(err, test.is))
			}
		})
	}
}

func TestWithLinks(t *testing.T) {
	qt.Check(t, qt.Equals(withLinks(hook.TCIngress), hook.TCXIngress))
	qt.Check(t, qt.Equals(withLinks(hook.TCEgress), hook.TCXEgress))
}
