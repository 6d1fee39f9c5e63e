package main

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
)

func program(id uint32, name string) hook.Program {
	at := time.Date(2026, 3, 1, 12, 30, 0, 500, time.UTC)
	return hook.Program{ID: id, Name: name, Tag: "2cdaa4a309ea9ba2", LoadedAt: at}
}

// chains returns one chain of each kind on XDP.
func chains() []hook.Chain {
	ns := hook.NetNS{Inode: 4026531840, Cookie: 1}
	return []hook.Chain{
		{
			Hook: hook.XDP, Target: "eth0", Ifindex: 7, NetNS: ns, Mode: hook.ModeNative, Style: hook.StyleOwned, LinkID: 12, DispatcherID: 45, Frags: true,
			Pins: []string{"/sys/fs/bpf/libdispatcher/xdp_12/member_droplist/slot", "/sys/fs/bpf/libdispatcher/xdp_12/root"},
			Members: []hook.Member{
				{
					Name: "droplist", Settings: hook.Settings{Priority: 10, ContinueOn: hook.SetOf(hook.Pass), OnMissing: hook.MissingContinue},
					Program: program(41, "droplist"), Persistent: true, Kind: hook.KindMember, State: hook.StateRunning, Owner: "dispatcher", SlotID: 90,
				},
				{
					Name: "Größe/v1.2", Settings: hook.Settings{Priority: 65535, ContinueOn: hook.SetOf(hook.Pass, hook.TX), OnMissing: hook.MissingDrop},
					Program: program(4294967295, "lb_xdp"), Kind: hook.KindMember, State: hook.StateRunning, Owner: "agent", SlotID: 91, TailCalls: true,
				},
				{
					Name: "empty", Settings: hook.Settings{Priority: 65535, ContinueOn: hook.Never, OnMissing: hook.MissingAborted},
					Kind: hook.KindMember, State: hook.StateEmpty, SlotID: 92,
				},
			},
		},
		{
			Hook: hook.XDP, Target: "eth1", Ifindex: 8, NetNS: ns, Mode: hook.ModeGeneric,
			Members: []hook.Member{{Name: "xdp_filter", Program: program(50, "xdp_filter"), Kind: hook.KindLegacy, State: hook.StateRunning}},
		},
		{
			Hook: hook.XDP, Target: "eth2", Ifindex: 9, NetNS: ns, Mode: hook.ModeNative, LinkID: 3,
			Members: []hook.Member{{Program: hook.Program{ID: 51, Tag: "a04f5eef06a7f555"}, Kind: hook.KindForeign, State: hook.StateRunning}},
		},
		{
			Hook: hook.XDP, NetNS: ns, Mode: hook.ModeNative, LinkID: 4, DispatcherID: 60,
			Members: []hook.Member{{
				Name: "gone", Settings: hook.Settings{}.WithDefaults(), Program: program(52, "gone"),
				Persistent: true, Kind: hook.KindMember, State: hook.StateDefunct, SlotID: 93,
			}},
		},
		{
			Hook: hook.XDP, Target: "eth9", Ifindex: 16, NetNS: ns, Mode: hook.ModeNative, Style: hook.StyleLibxdp, ConfigVersion: 2, DispatcherID: 60,
			Pins: []string{"/sys/fs/bpf/xdp/dispatch-16-60/prog0-link", "/sys/fs/bpf/xdp/dispatch-16-60/prog0-prog"},
			Members: []hook.Member{
				{
					Name: "xdp_filter", Settings: hook.Settings{ContinueOn: hook.SetOf(hook.Pass, hook.TX)}, Program: program(61, "xdp_filter"),
					Persistent: true, Kind: hook.KindLibxdp, State: hook.StateRunning, LinkID: 30,
				},
				{Settings: hook.Settings{Priority: 50, ContinueOn: hook.SetOf(hook.Pass)}, Kind: hook.KindLibxdp, State: hook.StateEmpty},
			},
		},
		{
			Hook: hook.XDP, Target: "eth3", Ifindex: 10, NetNS: ns, Mode: hook.ModeNative, Style: hook.StyleOwned, LinkID: 5, DispatcherID: 70,
			Extensions: []hook.Extension{{LinkID: 31, Program: program(71, "decoy"), Function: "libdispatcher", Main: true}},
			Members: []hook.Member{{
				Name: "guard", Settings: hook.Settings{}.WithDefaults(), Program: program(53, "guard"), Kind: hook.KindMember, State: hook.StateBypassed, SlotID: 94,
				Extensions: []hook.Extension{{LinkID: 32, Program: program(72, "helper"), Function: "parse"}},
			}},
		},
	}
}

// otherHooks returns chains on other hooks than XDP.
func otherHooks() []hook.Chain {
	blue := hook.NetNS{Inode: 4026531999, Cookie: 7, Name: "blue"}
	mine := hook.Member{
		Name: "mine", Settings: hook.Settings{Priority: 50}, Program: program(41, "filter"), Persistent: true,
		Kind: hook.KindMember, State: hook.StateRunning, Owner: "dispatcher", LinkID: 12,
	}
	theirs := hook.Member{Name: "cil_from_netdev", Program: program(60, "cil_from_netdev"), Kind: hook.KindForeign, State: hook.StateRunning, LinkID: 9}
	theirs.Program.LoadedBy = 1000
	bare := hook.Member{Name: "bare", Program: program(61, "bare"), Kind: hook.KindLegacy, State: hook.StateRunning}
	exclusive := bare
	exclusive.Detail = "exclusive"
	filter := func(m hook.Member, pref uint16, detail string) hook.Member {
		m.LinkID, m.Detail = 0, detail
		m.Filter = &hook.Filter{Parent: 0xfffffff2, Pref: pref, Protocol: 3, Handle: 1, DirectAction: true}
		return m
	}
	from := func(m hook.Member, cgroup string) hook.Member {
		m.From = cgroup
		return m
	}
	return []hook.Chain{
		{
			Hook: hook.TCXIngress, Target: "eth0", Ifindex: 2, NetNS: blue, Revision: 5,
			Pins:    []string{"/sys/fs/bpf/libdispatcher/tcx_12/member_mine/link"},
			Members: []hook.Member{theirs, mine, bare},
		},
		{
			Hook: hook.TCIngress, Target: "eth0", Ifindex: 2, NetNS: blue,
			Members: []hook.Member{filter(bare, 1, "pref 1 handle 0x1"), filter(mine, 50, "pref 50 handle 0x1")},
		},
		{Hook: hook.CgroupConnect4, Target: "/sys/fs/cgroup/web.slice", CgroupID: 321, Members: []hook.Member{exclusive}},
		{
			Hook: hook.CgroupSKBEgress, Target: "/sys/fs/cgroup/web.slice", CgroupID: 321,
			Members: []hook.Member{from(mine, "/sys/fs/cgroup/web.slice"), from(theirs, "/sys/fs/cgroup")},
		},
		{Hook: hook.Netfilter, NetNS: blue, Members: []hook.Member{{
			Name: "nf", Program: program(62, "nf"), Kind: hook.KindForeign, State: hook.StateRunning, LinkID: 13, Detail: "ipv4 prerouting, priority -128",
		}}},
		// Chains that could not be read, and links without a known target.
		{Hook: hook.XDP, Target: "eth1", Ifindex: 3, NetNS: blue, Err: errors.New("no permission\nat all")},
		{NetNS: blue, Err: errors.New("it is gone")},
		{Hook: "cgroup", Target: "/sys/fs/cgroup/x", Err: errors.New("no permission")},
		{Err: errors.New("no permission")},
		{Hook: hook.TCXEgress, Ifindex: 7, Err: errors.New("its place was not found"), Members: []hook.Member{theirs}},
		{Hook: hook.CgroupSockOps, CgroupID: 99, Err: errors.New("its place was not found"), Members: []hook.Member{theirs}},
		{Hook: hook.SKLookup, NetNS: hook.NetNS{Inode: 4026532001}, Err: errors.New("its place was not found"), Members: []hook.Member{theirs}},
		// The link's target is gone.
		{Hook: hook.TCXEgress, Members: []hook.Member{theirs}},
		{Hook: hook.CgroupSockOps, Members: []hook.Member{theirs}},
	}
}

func TestPrintChains(t *testing.T) {
	local := time.Local
	time.Local = time.UTC
	defer func() { time.Local = local }()

	for _, test := range []struct {
		file string
		app
		list   []hook.Chain
		dryRun bool
	}{
		{"list.txt", app{format: formatTable}, chains(), false},
		{"list-wide.txt", app{format: formatWide}, chains(), false},
		{"list-color.txt", app{format: formatTable, color: "always"}, chains(), false},
		{"list.json", app{format: formatJSON}, chains(), false},
		{"hooks.txt", app{format: formatTable}, otherHooks(), false},
		{"hooks-wide.txt", app{format: formatWide}, otherHooks(), false},
		{"hooks.json", app{format: formatJSON}, otherHooks(), false},
		{"dry-run.txt", app{format: formatTable}, chains()[:1], true},
		{"dry-run.json", app{format: formatJSON}, chains()[:1], true},
		{"dry-run-tcx.json", app{format: formatJSON}, otherHooks()[:1], true},
	} {
		t.Run(test.file, func(t *testing.T) {
			var out bytes.Buffer
			a := test.app
			a.stdout, a.stderr = &out, &out
			if c := &test.list[0]; test.dryRun {
				c.LinkID, c.Members = 0, c.Members[:len(c.Members)-2]
				for i := range c.Members {
					c.Members[i].Kind, c.Members[i].LinkID = hook.KindMember, 0
				}
			}
			qt.Assert(t, qt.IsNil(a.printChains(test.list, nil, test.dryRun)))
			golden(t, test.file, out.String())
			for line := range strings.Lines(out.String()) {
				qt.Check(t, qt.IsFalse(strings.HasSuffix(line, " \n")), qt.Commentf("%q", line))
			}
		})
	}
}

func TestPrintNothing(t *testing.T) {
	var out, errs bytes.Buffer
	a := app{stdout: &out, stderr: &errs, format: formatTable}
	free := []hook.Chain{{Hook: hook.XDP, Target: "eth0", Ifindex: 7}}
	qt.Assert(t, qt.IsNil(a.printChains(free, nil, false)))
	qt.Assert(t, qt.IsNil(a.printChains(nil, nil, false)))
	qt.Check(t, qt.Equals(out.String(), ""))
	qt.Check(t, qt.Equals(errs.String(), "dispatcher: note: nothing is attached to xdp eth0\ndispatcher: note: nothing is attached\n"))

	a.format = formatJSON
	qt.Assert(t, qt.IsNil(a.printChains(nil, nil, false)))
	qt.Check(t, qt.Equals(out.String(), "{\n  \"version\": 1,\n  \"hooks\": []\n}\n"))
}

func TestPrintFeatures(t *testing.T) {
	features := []hook.Feature{
		{Name: "xdp-link", Supported: true, Needs: "Linux 5.9"},
		{Name: "freplace", Needs: "Linux 5.6", Detail: "operation not permitted"},
	}
	for file, format := range map[string]string{"features.txt": formatTable, "features.json": formatJSON} {
		var out bytes.Buffer
		a := app{stdout: &out, format: format}
		qt.Assert(t, qt.IsNil(a.printFeatures(features)))
		golden(t, file, out.String())
	}
}

func TestWords(t *testing.T) {
	var errs bytes.Buffer
	a := app{stderr: &errs, format: formatTable}
	a.note("one\nline")
	a.warn("%d", 2)
	a.format = formatJSON
	a.note("n")
	a.warn("<w>")
	a.quiet = true
	a.note("x")
	a.warn("x")
	qt.Assert(t, qt.Equals(errs.String(), "dispatcher: note: one line\ndispatcher: warning: 2\n"+
		"{\"version\":1,\"note\":\"n\"}\n{\"version\":1,\"warning\":\"<w>\"}\n"))
}

// A program that is attached to hundreds of cgroups does not show all of them with each.
func TestPrintManyHolders(t *testing.T) {
	var h hook.Holders
	for id := range uint32(300) {
		h.Objects = append(h.Objects, hook.HolderObject{HolderRef: hook.HolderRef{Kind: hook.HolderLink, ID: id + 1}, How: "program"})
	}
	a := app{format: formatWide}
	var b strings.Builder
	a.holders(&b, "", h, mostObjects)
	lines := strings.Split(strings.TrimSpace(b.String()), "\n")
	qt.Assert(t, qt.HasLen(lines, mostObjects+1))
	qt.Check(t, qt.StringContains(lines[mostObjects], `292 more, which "dispatcher holders" shows`))
	b.Reset()
	a.holders(&b, "", h, len(h.Objects))
	qt.Check(t, qt.Equals(strings.Count(b.String(), "\n"), 300))
}
