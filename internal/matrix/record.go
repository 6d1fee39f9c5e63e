package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"
	"time"

	"github.com/libdispatcher/dispatcher/internal/matrix/guest"
)

// A recorder records what the machine of one kernel reports.
type recorder struct {
	kernelResult
	tester *tester
	raw    io.Writer

	step     string
	log      *testLog // of the running tests
	features bytes.Buffer
	failed   []string
}

func (r *recorder) ready(release string, took time.Duration) {
	r.Release = release
	r.tester.say(r.Series, "Linux %s is up after %.0f s", release, took.Seconds())
}

func (r *recorder) begin(step string) {
	r.step = step
	fmt.Fprintf(r.raw, "\n# %s\n", step)
	if step != featuresStep {
		r.log = new(testLog)
	}
}

func (r *recorder) output(stderr bool, content []byte) {
	r.raw.Write(bytes.ReplaceAll(content, []byte(mark), nil))
	switch {
	case r.log != nil:
		r.log.Write(content)
		if r.tester.verbose {
			r.tester.say(r.Series, "%s", strings.ReplaceAll(string(content), mark, ""))
		}
	case !stderr:
		r.features.Write(content)
	}
}

func (r *recorder) end(result guest.Result) {
	if r.step == featuresStep {
		if json.Valid(r.features.Bytes()) {
			r.Features = r.features.Bytes()
		} else {
			r.failed = append(r.failed, "dispatcher features")
			r.tester.say(r.Series, "FAIL\tdispatcher features: status %d\n%s", result.Status, r.features.Bytes())
		}
		return
	}
	r.log.Close()
	p := packageResult{Package: r.step, Status: result.Status, Seconds: result.Duration.Seconds(), Tests: r.log.Results}
	r.Packages = append(r.Packages, p)
	counts := fmt.Sprintf("%d passed", count(p.Tests, pass))
	if n := count(p.Tests, skip); n > 0 {
		counts += fmt.Sprintf(", %d skipped", n)
	}
	name := strings.TrimSuffix(module+"/"+p.Package, "/.")
	if p.Status == 0 && result.Error == "" {
		r.tester.say(r.Series, "ok  \t%s\t%.1fs\t(%s)", name, p.Seconds, counts)
	} else {
		failures := r.log.Failures()
		r.failed = append(r.failed, strings.TrimSpace(p.Package+" "+result.Error)+"\n"+failures)
		r.tester.say(r.Series, "%sFAIL\t%s\t%.1fs\t(%d failed, %s) %s", failures, name, p.Seconds, count(p.Tests, fail), counts, result.Error)
	}
	r.log = nil
}

var complaint = regexp.MustCompile(`(?m)^.*(?:WARNING: |BUG: |INFO: task .* blocked|Oops).*$`)

// complaints returns the lines of a console that report a fault in the kernel.
func complaints(console string) []string {
	return complaint.FindAllString(strings.ReplaceAll(console, "\r", ""), -1)
}

// verdict returns an error if a test failed. It repeats what these tests said: by now it
// is far up on the screen, and a machine may keep only the end.
func (r *recorder) verdict() error {
	if len(r.failed) == 0 {
		return nil
	}
	return errors.New(strings.Join(r.failed, "\n"))
}

// sayLeftOut lists the tests that did not run, with reasons.
func (t *tester) sayLeftOut() {
	fmt.Fprintln(t.show, "left out:")
	for _, l := range t.leftOut {
		if l.Always || t.short {
			fmt.Fprintln(t.show, "  "+l.String())
		}
	}
}
