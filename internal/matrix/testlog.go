package main

import (
	"regexp"
	"strconv"
	"strings"
	"time"
)

// The outcomes of tests, as Go's test output calls them.
const (
	pass = "PASS"
	fail = "FAIL"
	skip = "SKIP"
)

// A testResult is how one test or subtest ended.
type testResult struct {
	Name    string  `json:"name"`
	Outcome string  `json:"outcome"`
	Seconds float64 `json:"seconds"`
	Reason  string  `json:"reason,omitempty"` // why it was skipped
}

// A testLog reads the output of a test binary that was called with -test.v=test2json. The framework
// marks its own lines with a byte, so that a test's output cannot look like one of them.
type testLog struct {
	Results []testResult

	partial string
	current string
	lines   map[string][]string
	rest    []string // output of no test, such as a panic
}

const mark = "\x16"

var (
	testRuns = regexp.MustCompile(`^=== (?:RUN|CONT|NAME|PAUSE)\s+(\S*)`)
	testEnds = regexp.MustCompile(`^\s*--- (PASS|FAIL|SKIP): (\S+) \(([0-9.]+)s\)`)
)

func (l *testLog) Write(p []byte) (int, error) {
	text := l.partial + string(p)
	for {
		line, after, ok := strings.Cut(text, "\n")
		if !ok {
			break
		}
		l.line(line)
		text = after
	}
	l.partial = text
	return len(p), nil
}

// Close handles the output after the last newline.
func (l *testLog) Close() error {
	if l.partial != "" {
		l.line(l.partial)
	}
	l.partial = ""
	return nil
}

func (l *testLog) line(line string) {
	before, own, marked := strings.Cut(line, mark)
	if !marked {
		l.keep(line)
		return
	}
	// A subtest's line has the mark before or after the indentation. Output that a test printed
	// without a final newline comes before the mark.
	if strings.TrimSpace(before) != "" {
		l.keep(before)
	}
	own = strings.ReplaceAll(own, mark, "")
	if run := testRuns.FindStringSubmatch(own); run != nil {
		l.current = run[1]
		return
	}
	end := testEnds.FindStringSubmatch(own)
	if end == nil {
		l.keep(own)
		return
	}
	seconds, _ := strconv.ParseFloat(end[3], 64)
	r := testResult{Name: end[2], Outcome: end[1], Seconds: seconds}
	if r.Outcome == skip {
		r.Reason = skipReason(l.lines[r.Name])
	}
	if r.Outcome != fail {
		delete(l.lines, r.Name)
	}
	l.Results = append(l.Results, r)
	l.current = ""
}

func (l *testLog) keep(line string) {
	if l.current == "" {
		l.rest = append(l.rest, line)
		return
	}
	if l.lines == nil {
		l.lines = map[string][]string{}
	}
	l.lines[l.current] = append(l.lines[l.current], line)
}

var logLine = regexp.MustCompile(`^\s*\S+\.go:\d+: (.*)`)

// skipReason returns a test's last output before it was skipped.
func skipReason(lines []string) string {
	for i := len(lines) - 1; i >= 0; i-- {
		if said := logLine.FindStringSubmatch(lines[i]); said != nil {
			return said[1]
		}
	}
	return ""
}

// Failures returns what to show of a package that failed: the failed tests with their output, tests
// that never ended, and output of no test.
func (l *testLog) Failures() string {
	var b strings.Builder
	ended := map[string]bool{}
	for _, r := range l.Results {
		ended[r.Name] = true
		if r.Outcome != fail {
			continue
		}
		b.WriteString("--- FAIL: " + r.Name + " (" + time.Duration(r.Seconds*float64(time.Second)).String() + ")\n")
		for _, line := range l.lines[r.Name] {
			b.WriteString(line + "\n")
		}
	}
	for name, lines := range l.lines {
		if !ended[name] {
			b.WriteString("--- did not end: " + name + "\n" + strings.Join(lines, "\n") + "\n")
		}
	}
	for _, line := range l.rest {
		if line != "PASS" && line != "FAIL" && line != "" {
			b.WriteString(line + "\n")
		}
	}
	return b.String()
}

// count counts the tests with that outcome, subtests included.
func count(results []testResult, outcome string) int {
	n := 0
	for _, r := range results {
		if r.Outcome == outcome {
			n++
		}
	}
	return n
}
