package main

import (
	"strings"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/internal/matrix/image"
)

const someTests = "\x16=== RUN   TestGood\n" +
	"\x16--- PASS: TestGood (0.10s)\n" +
	"\x16=== RUN   TestSkipped\n" +
	"    x_test.go:12: needs freplace\n" +
	"\x16--- SKIP: TestSkipped (0.00s)\n" +
	"\x16=== RUN   TestTree\n" +
	"\x16=== RUN   TestTree/leaf\n" +
	"    y_test.go:3: wrong\n" +
	"--- PASS: TestForged (0.00s)\n" +
	"\x16=== NAME  TestTree\n" +
	"no newline at its end\x16    --- FAIL: TestTree/leaf (1.50s)\n" +
	"\x16--- FAIL: TestTree (1.60s)\n" +
	"\x16=== RUN   TestHangs\n" +
	"    z_test.go:9: waiting\n" +
	"FAIL"

func TestTestLog(t *testing.T) {
	want := []testResult{
		{"TestGood", pass, 0.1, ""},
		{"TestSkipped", skip, 0, "needs freplace"},
		{"TestTree/leaf", fail, 1.5, ""},
		{"TestTree", fail, 1.6, ""},
	}
	// The result must be the same for pieces of any size.
	for size := range 40 {
		l := new(testLog)
		for rest := someTests; rest != ""; {
			n := min(size+1, len(rest))
			l.Write([]byte(rest[:n]))
			rest = rest[n:]
		}
		l.Close()
		qt.Assert(t, qt.DeepEquals(l.Results, want))
		failures := l.Failures()
		for _, part := range []string{"--- FAIL: TestTree/leaf (1.5s)\n", "y_test.go:3: wrong\n", "no newline at its end", "--- did not end: TestHangs\n    z_test.go:9: waiting"} {
			qt.Assert(t, qt.StringContains(failures, part))
		}
		qt.Assert(t, qt.IsFalse(strings.Contains(failures, "TestGood")))
	}
}

func TestTestLogPanic(t *testing.T) {
	l := new(testLog)
	l.Write([]byte("panic: before any test\n\ngoroutine 1 [running]:\n"))
	l.Close()
	qt.Check(t, qt.HasLen(l.Results, 0))
	qt.Check(t, qt.StringContains(l.Failures(), "panic: before any test"))
}

func TestLeftOut(t *testing.T) {
	all, err := parseLeftOut(`
# a comment
always  *         internal        *       asks the go tool
short   5.10,6.1  .               ^TestA$ takes long
always  *         .               ^TestB$ never
always  *         internal/own/... *      the tool's own
`)
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(all[1].String(), ". ^TestA$ (5.10, 6.1): takes long"))
	qt.Check(t, qt.Equals(all[0].String(), "internal (all kernels): asks the go tool"))
	for _, test := range []struct {
		kernel, pkg string
		short       bool
		whole       bool
		pattern     string
	}{
		{"7.2", "internal", false, true, ""},
		{"7.2", "internal/state", true, false, ""},
		{"6.1", ".", true, false, "^TestA$|^TestB$"},
		{"6.1", ".", false, false, "^TestB$"},
		{"6.12", ".", true, false, "^TestB$"},
		{"6.12", "internal/own", true, true, ""},
		{"6.12", "internal/own/x", false, true, ""},
		{"6.12", "internal/owner", false, false, ""},
	} {
		whole, pattern := skipping(all, test.kernel, test.pkg, test.short)
		qt.Check(t, qt.Equals(whole, test.whole), qt.Commentf("%+v", test))
		qt.Check(t, qt.Equals(pattern, test.pattern), qt.Commentf("%+v", test))
	}
	for text, want := range map[string]string{
		"always * x *":           "leftout.txt:1: want: .*",
		"never * x * because":    `leftout.txt:1: "never" is neither always nor short`,
		"short 4.19 x * because": `leftout.txt:1: there is no kernel "4.19": .*`,
		"short * x ( because":    "leftout.txt:1: error parsing regexp: .*",
	} {
		_, err := parseLeftOut(text)
		qt.Check(t, qt.ErrorMatches(err, want), qt.Commentf("%q", text))
	}

	// A test that -short leaves out runs on one kernel at least, or its reason names
	// another run.
	all, err = parseLeftOut(leftOutFile)
	qt.Assert(t, qt.IsNil(err))
	for _, l := range all {
		if !l.Always {
			qt.Check(t, qt.IsTrue(len(l.Kernels) > 0 && len(l.Kernels) < len(image.Kernels) || strings.HasSuffix(l.Reason, `with "make test"`)), qt.Commentf("%s", l))
		}
	}
}

func TestComplaints(t *testing.T) {
	qt.Check(t, qt.DeepEquals(complaints("[ 1.0] x86/cpu: fine\r\n[ 2.0] WARNING: CPU: 0 PID: 1 at kernel/bpf/x.c:1\r\n[ 2.1] more\r\n[ 3.0] BUG: kernel NULL pointer\r\n"),
		[]string{"[ 2.0] WARNING: CPU: 0 PID: 1 at kernel/bpf/x.c:1", "[ 3.0] BUG: kernel NULL pointer"}))
	qt.Check(t, qt.HasLen(complaints("[ 1.0] all is well\n"), 0))
}
