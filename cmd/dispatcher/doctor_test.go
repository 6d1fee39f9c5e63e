package main

import (
	"bytes"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
)

func TestPrintFindings(t *testing.T) {
	found := []hook.Finding{
		{Check: "kernel", Level: hook.LevelOK, Text: "Linux 6.18.1"},
		{Check: "feature-freplace", Level: hook.LevelNote, Text: "does not work: operation not permitted"},
		{Check: "leftover", Level: hook.LevelDrift, Text: "/sys/fs/bpf/libdispatcher/tmp_7_9 was left", Mend: "dispatcher recover"},
		{
			Check: "empty", Level: hook.LevelBroken, Hook: hook.XDP, Target: "eth0", NetNS: hook.NetNS{Inode: 4026532177, Cookie: 4099, Name: "blue"},
			Member: "guard", Text: "its owner is gone", Mend: "dispatcher -n blue detach xdp eth0 guard",
		},
		{Check: "order", Level: hook.LevelDrift, Hook: hook.CgroupSKBEgress, Target: "/sys/fs/cgroup/a", Member: "count", Text: "it is not where <it> was"},
	}
	for _, test := range []struct {
		file           string
		format         string
		verbose, quiet bool
	}{
		{"doctor.txt", formatTable, false, false},
		{"doctor-verbose.txt", formatTable, true, false},
		{"doctor-quiet.txt", formatTable, false, true},
		{"doctor-wide.txt", formatWide, false, false},
		{"doctor.json", formatJSON, false, false},
	} {
		var out bytes.Buffer
		a := app{stdout: &out, format: test.format, verbose: test.verbose, quiet: test.quiet}
		qt.Assert(t, qt.IsNil(a.printFindings(a.worthwhile(found))))
		golden(t, test.file, out.String())
	}
}

// Without findings there is a message, but not in JSON.
func TestPrintNoFindings(t *testing.T) {
	for format, want := range map[string]string{
		formatTable: "nothing to mend\n", formatWide: "nothing to mend\n", formatJSON: "{\n  \"version\": 1,\n  \"findings\": []\n}\n",
	} {
		var out bytes.Buffer
		a := app{stdout: &out, format: format}
		qt.Assert(t, qt.IsNil(a.printFindings(a.worthwhile([]hook.Finding{{Check: "kernel", Level: hook.LevelOK}}))))
		qt.Check(t, qt.Equals(out.String(), want))
	}
}
