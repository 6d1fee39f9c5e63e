package main

import (
	_ "embed"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/libdispatcher/dispatcher/internal/matrix/image"
)

// leftOutFile lists the tests that do not run in virtual machines, with
// reasons.
//
//go:embed leftout.txt
var leftOutFile string

// A leftOut is a line of leftout.txt.
type leftOut struct {
	Always  bool     // they cannot run in a machine; otherwise only -short leaves them out
	Kernels []string // empty: all
	Package string   // its folder
	Tests   string   // a pattern for "go test -skip"; empty: the whole package
	Reason  string
}

func parseLeftOut(text string) ([]leftOut, error) {
	var all []leftOut
	for i, line := range strings.Split(text, "\n") {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		fields := strings.Fields(line)
		if len(fields) < 5 {
			return nil, fmt.Errorf("leftout.txt:%d: want: WHEN KERNELS PACKAGE TESTS REASON", i+1)
		}
		l := leftOut{Always: fields[0] == "always", Package: fields[2], Tests: fields[3], Reason: strings.Join(fields[4:], " ")}
		if fields[0] != "always" && fields[0] != "short" {
			return nil, fmt.Errorf("leftout.txt:%d: %q is neither always nor short", i+1, fields[0])
		}
		if fields[1] != "*" {
			l.Kernels = strings.Split(fields[1], ",")
			for _, k := range l.Kernels {
				if _, err := image.FindSeries(k); err != nil {
					return nil, fmt.Errorf("leftout.txt:%d: %w", i+1, err)
				}
			}
		}
		if l.Tests == "*" {
			l.Tests = ""
		}
		if _, err := regexp.Compile(l.Tests); err != nil {
			return nil, fmt.Errorf("leftout.txt:%d: %w", i+1, err)
		}
		all = append(all, l)
	}
	return all, nil
}

// skipping returns what to leave out of a package on a kernel: the whole package, or the tests
// that match pattern.
func skipping(all []leftOut, kernel, pkg string, short bool) (whole bool, pattern string) {
	var patterns []string
	for _, l := range all {
		if !l.of(pkg) || !l.Always && !short || len(l.Kernels) > 0 && !slices.Contains(l.Kernels, kernel) {
			continue
		}
		if l.Tests == "" {
			return true, ""
		}
		patterns = append(patterns, l.Tests)
	}
	return false, strings.Join(patterns, "|")
}

// of says whether the line applies to the package: internal/x/... means internal/x and all
// below it.
func (l leftOut) of(pkg string) bool {
	if above, ok := strings.CutSuffix(l.Package, "/..."); ok {
		return pkg == above || strings.HasPrefix(pkg, above+"/")
	}
	return pkg == l.Package
}

func (l leftOut) String() string {
	where := "all kernels"
	if len(l.Kernels) > 0 {
		where = strings.Join(l.Kernels, ", ")
	}
	what := l.Package
	if l.Tests != "" {
		what += " " + l.Tests
	}
	return fmt.Sprintf("%s (%s): %s", what, where, l.Reason)
}
