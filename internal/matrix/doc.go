package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/libdispatcher/dispatcher/internal/matrix/image"
)

// docFile is the generated page.
const docFile = "docs/kernels.md"

const docUsage = `usage: matrix doc [OPTION]...

Writes ` + docFile + ` from the results of "matrix test" on all kernels. Fails if that changes the page.

`

// docCommand runs "matrix doc".
func docCommand(_ context.Context, args []string) error {
	flags := flag.NewFlagSet("doc", flag.ContinueOnError)
	results := flags.String("results", "bin/kernels", "the `folder` with the results")
	file := flags.String("file", docFile, "the `page`")
	flags.Usage = func() {
		fmt.Fprint(flags.Output(), docUsage)
		flags.PrintDefaults()
	}
	if err := flags.Parse(args); err != nil {
		return exitStatus(2)
	}
	var all []kernelResult
	for _, series := range image.Kernels {
		content, err := os.ReadFile(filepath.Join(*results, series.Name+".json"))
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("no results of kernel %s in %s: run \"make test-kernels\"", series.Name, *results)
		}
		if err != nil {
			return err
		}
		var r kernelResult
		if err := json.Unmarshal(content, &r); err != nil {
			return fmt.Errorf("%s: %w", series.Name, err)
		}
		all = append(all, r)
	}
	page, err := kernelsPage(all)
	if err != nil {
		return err
	}
	old, err := os.ReadFile(*file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if sameButReleases(old, page) {
		return nil
	}
	if err := os.WriteFile(*file, page, 0o644); err != nil {
		return err
	}
	return fmt.Errorf("%s was out of date, and has been written again: look at it and commit it", *file)
}

// releasesBegin begins the line that changes with every update of Debian. A change in that line alone
// does not make the page out of date.
const releasesBegin = "Seen on "

func sameButReleases(a, b []byte) bool {
	strip := func(page []byte) string {
		var kept strings.Builder
		for line := range strings.Lines(string(page)) {
			if !strings.HasPrefix(line, releasesBegin) {
				kept.WriteString(line)
			}
		}
		return kept.String()
	}
	return strip(a) == strip(b)
}

// A kernelFeature is a feature in the JSON of "dispatcher features".
type kernelFeature struct {
	Name      string `json:"name"`
	Supported bool   `json:"supported"`
	Needs     string `json:"needs"`
	Unknown   bool   `json:"unknown"`
}

// kernelsPage returns the page that says what each kernel can do.
func kernelsPage(all []kernelResult) ([]byte, error) {
	var b bytes.Buffer
	var releases, names []string
	for _, r := range all {
		releases = append(releases, r.Release)
		names = append(names, r.Series)
	}
	b.WriteString(`# Kernels

This page is generated from runs of the tests on Debian's kernels ("make test-kernels"): do not edit it.

` + releasesBegin + strings.Join(releases, ", ") + `.

## What the kernel can do

"dispatcher features DEVICE" found this by trying, as root, on a veth device. Kernels of these versions can differ by
their configuration, and devices by their drivers: run the command on the system that matters.

`)
	if err := featureTable(&b, all, names); err != nil {
		return nil, err
	}
	b.WriteString(`
## What the tests found

*yes*: the tests of the package passed. *part*: the tests of features that the kernel has passed; the list below says
what the other tests need. *-*: the tests were left out on that kernel; ` + "[leftout.txt](../internal/matrix/leftout.txt)" + ` says why, and names single tests that are left out.

`)
	packageTable(&b, all, names)
	skipList(&b, all)
	return b.Bytes(), nil
}

func featureTable(b *bytes.Buffer, all []kernelResult, names []string) error {
	var order []string
	needs := map[string]string{}
	has := map[string]map[string]string{}
	for _, r := range all {
		var report struct {
			Features []kernelFeature `json:"features"`
		}
		if err := json.Unmarshal(r.Features, &report); err != nil {
			return fmt.Errorf("features of kernel %s: %w", r.Series, err)
		}
		for _, f := range report.Features {
			if !slices.Contains(order, f.Name) {
				order = append(order, f.Name)
				has[f.Name] = map[string]string{}
			}
			needs[f.Name] = f.Needs
			has[f.Name][r.Series] = f.answer()
		}
	}
	row(b, append([]string{"feature"}, append(names, "needs")...)...)
	row(b, slices.Repeat([]string{"---"}, len(names)+2)...)
	for _, name := range order {
		cells := []string{"`" + name + "`"}
		for _, series := range names {
			cells = append(cells, has[name][series])
		}
		row(b, append(cells, needs[name])...)
	}
	return nil
}

func packageTable(b *bytes.Buffer, all []kernelResult, names []string) {
	row(b, append([]string{"package"}, names...)...)
	row(b, slices.Repeat([]string{"---"}, len(names)+1)...)
	cells := map[string]map[string]string{}
	skips := kernelSkips(all)
	for _, r := range all {
		for _, p := range r.Packages {
			if cells[p.Package] == nil {
				cells[p.Package] = map[string]string{}
			}
			cell := "yes"
			for s, series := range skips {
				if s.pkg == p.Package && slices.Contains(series, r.Series) {
					cell = "part"
				}
			}
			if p.Status != 0 {
				cell = "fails"
			}
			cells[p.Package][r.Series] = cell
		}
	}
	for _, name := range slices.Sorted(maps.Keys(cells)) {
		line := []string{"`" + name + "`"}
		for _, series := range names {
			line = append(line, orDash(cells[name][series]))
		}
		row(b, line...)
	}
}

// A skipReasonOf is a reason for skipping tests of a package.
type skipReasonOf struct{ pkg, reason string }

// kernelSkips returns the skip reasons that concern the kernel, with their kernels. It leaves out a
// reason that a package's tests give on every kernel where they run.
func kernelSkips(all []kernelResult) map[skipReasonOf][]string {
	skips := map[skipReasonOf][]string{}
	ran := map[string]int{}
	for _, r := range all {
		for _, p := range r.Packages {
			ran[p.Package]++
			for _, t := range p.Tests {
				s := skipReasonOf{p.Package, t.Reason}
				if t.Outcome == skip && !slices.Contains(skips[s], r.Series) {
					skips[s] = append(skips[s], r.Series)
				}
			}
		}
	}
	maps.DeleteFunc(skips, func(s skipReasonOf, series []string) bool { return len(series) == ran[s.pkg] })
	return skips
}

func skipList(b *bytes.Buffer, all []kernelResult) {
	var lines []string
	for s, series := range kernelSkips(all) {
		lines = append(lines, fmt.Sprintf("- `%s`, %s: %s\n", s.pkg, strings.Join(series, ", "), s.reason))
	}
	if len(lines) == 0 {
		return
	}
	slices.Sort(lines)
	b.WriteString("\nSkipped tests, with their reasons:\n\n" + strings.Join(lines, ""))
}

func row(b *bytes.Buffer, cells ...string) {
	b.WriteString("| " + strings.Join(cells, " | ") + " |\n")
}

func (f kernelFeature) answer() string {
	switch {
	case f.Unknown:
		return "unknown"
	case f.Supported:
		return "yes"
	}
	return "no"
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
