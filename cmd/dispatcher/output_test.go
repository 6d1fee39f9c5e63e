package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
)

// chains are one of each kind.
func chains() []hook.Chain {
	at := time.Date(2026, 3, 1, 12, 30, 0, 500, time.UTC)
	program := func(id uint32, name string) hook.Program {
		return hook.Program{ID: id, Name: name, Tag: "2cdaa4a309ea9ba2", LoadedAt: at}
	}
	ns := hook.NetNS{Inode: 4026531840, Cookie: 1}
	return []hook.Chain{
		{
			Hook: hook.XDP, Target: "eth0", Ifindex: 7, NetNS: ns, Mode: hook.ModeNative, LinkID: 12, DispatcherID: 45, Frags: true,
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
	}
}

func TestPrintChains(t *testing.T) {
	local := time.Local
	time.Local = time.UTC
	defer func() { time.Local = local }()

	for _, test := range []struct {
		file string
		app
		dryRun bool
	}{
		{"list.txt", app{format: formatTable}, false},
		{"list-wide.txt", app{format: formatWide}, false},
		{"list-color.txt", app{format: formatTable, color: "always"}, false},
		{"list.json", app{format: formatJSON}, false},
		{"dry-run.txt", app{format: formatTable}, true},
		{"dry-run.json", app{format: formatJSON}, true},
	} {
		t.Run(test.file, func(t *testing.T) {
			var out bytes.Buffer
			a := test.app
			a.stdout, a.stderr = &out, &out
			list := chains()
			if test.dryRun {
				list[0].LinkID, list[0].Members = 0, list[0].Members[:1]
				list = list[:1]
			}
			qt.Assert(t, qt.IsNil(a.printChains(list, test.dryRun)))
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
	qt.Assert(t, qt.IsNil(a.printChains(free, false)))
	qt.Assert(t, qt.IsNil(a.printChains(nil, false)))
	qt.Check(t, qt.Equals(out.String(), ""))
	qt.Check(t, qt.Equals(errs.String(), "dispatcher: note: nothing is attached to xdp eth0\ndispatcher: note: nothing is attached\n"))

	a.format = formatJSON
	qt.Assert(t, qt.IsNil(a.printChains(nil, false)))
	qt.Check(t, qt.Equals(out.String(), "{\n  \"version\": 1,\n  \"hooks\": []\n}\n"))
}

func TestPrintFeatures(t *testing.T) {
	features := []dispatcher.Feature{
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
