package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"
)

func features(list string) json.RawMessage {
	return json.RawMessage(`{"version": 1, "features": [` + list + `]}`)
}

func someResults() []kernelResult {
	return []kernelResult{
		{
			Series: "5.10", Release: "5.10.0-32-amd64",
			Features: features(`{"name": "xdp", "supported": true, "needs": "Linux 4.8"}, {"name": "frags", "supported": false, "needs": "Linux 5.18"}`),
			Packages: []packageResult{
				{Package: "programs", Tests: []testResult{{Name: "TestA", Outcome: pass}, {Name: "TestB", Outcome: skip, Reason: "no frags"}, {Name: "TestD", Outcome: skip, Reason: "nowhere"}}},
				{Package: ".", Status: 1, Tests: []testResult{{Name: "TestA", Outcome: fail}}},
			},
		},
		{
			Series: "7.2", Release: "7.2.13+deb14-amd64",
			Features: features(`{"name": "xdp", "supported": true, "needs": "Linux 4.8"}, {"name": "frags", "supported": true, "needs": "Linux 5.18"}`),
			Packages: []packageResult{
				{Package: "programs", Tests: []testResult{{Name: "TestA", Outcome: pass}, {Name: "TestD", Outcome: skip, Reason: "nowhere"}, {Name: "TestB", Outcome: pass}}},
				{Package: "libxdp", Tests: []testResult{{Name: "TestX", Outcome: pass}}},
			},
		},
	}
}

func TestKernelsPage(t *testing.T) {
	page, err := kernelsPage(someResults())
	qt.Assert(t, qt.IsNil(err))
	for _, line := range []string{
		"Seen on 5.10.0-32-amd64, 7.2.13+deb14-amd64.",
		"| feature | 5.10 | 7.2 | needs |",
		"| `xdp` | yes | yes | Linux 4.8 |",
		"| `frags` | no | yes | Linux 5.18 |",
		"| `.` | fails | - |",
		"| `libxdp` | - | yes |",
		"| `programs` | part | yes |",
		"- `programs`, 5.10: no frags",
	} {
		qt.Check(t, qt.StringContains(string(page), line+"\n"))
	}
	qt.Check(t, qt.IsFalse(strings.Contains(string(page), "nowhere")))
}

func TestDocCommand(t *testing.T) {
	dir := t.TempDir()
	page := filepath.Join(dir, "kernels.md")
	call := func() error { return docCommand(t.Context(), []string{"-results", dir, "-file", page}) }
	put := func(r kernelResult, series string) {
		r.Series = series
		content, err := json.Marshal(r)
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.IsNil(os.WriteFile(filepath.Join(dir, series+".json"), content, 0o644)))
	}
	old, young := someResults()[0], someResults()[1]
	put(old, "5.10")
	put(old, "6.1")
	put(young, "6.12")
	qt.Check(t, qt.ErrorMatches(call(), "no results of kernel 7.2 in .*"))
	put(young, "7.2")
	qt.Check(t, qt.ErrorMatches(call(), ".*kernels.md was out of date, and has been written again.*"))
	qt.Check(t, qt.IsNil(call()))

	// A new version of a kernel that can do the same changes nothing worth a commit.
	before, err := os.ReadFile(page)
	qt.Assert(t, qt.IsNil(err))
	young.Release = "7.2.14+deb14-amd64"
	put(young, "7.2")
	qt.Check(t, qt.IsNil(call()))
	after, err := os.ReadFile(page)
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(string(after), string(before)))

	young.Packages[0].Status = 1
	put(young, "7.2")
	qt.Check(t, qt.ErrorMatches(call(), ".*was out of date.*"))
	after, err = os.ReadFile(page)
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.StringContains(string(after), "| `programs` | part | part | yes | fails |"))
	qt.Check(t, qt.IsTrue(strings.Contains(string(after), "7.2.14")))
}
