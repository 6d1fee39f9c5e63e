package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"unicode/utf8"
)

// writeDoc writes docs/performance.md and its plots from a report.
func writeDoc(report *Report, folder string) error {
	var b bytes.Buffer
	fmt.Fprintf(&b, "# Performance\n\n")
	fmt.Fprintf(&b, "<!-- Written by \"make bench-doc\" from the last \"make bench\"; the text around the figures is in internal/bench. -->\n\n")
	b.WriteString(wrap(fmt.Sprintf("All figures are from one run of `make bench`, %s, on Linux %s, %d x %s, %s. They are medians; ± is half the distance "+
		"between the quartiles. `bin/bench.json` also has the quartiles, the minimum and the maximum. All contenders take turns in "+
		"the same run: trust the ratios, not the nanoseconds of this machine.",
		report.Date[:10], report.Machine.Kernel, report.Machine.CPUs, report.Machine.CPU, report.Machine.Go)))
	if report.Machine.Returns != "" {
		b.WriteString(wrap("What a function costs depends on what the kernel does at each return, which differs between processors. Here: " +
			report.Machine.Returns + " (/sys/devices/system/cpu/vulnerabilities). With Safe RET a return is expensive, so inlined and tail-called " +
			"code is further ahead than elsewhere."))
	}
	if len(report.Results) > 0 {
		fmt.Fprintf(&b, "## Goals\n\n| ratio | at most | measured | |\n|---|---:|---:|---|\n")
		for _, t := range report.Results {
			met := "met"
			if !t.Met() {
				met = fmt.Sprintf("missed by %.0f %%: %s", 100*(t.Got/t.Most-1), t.Why)
			}
			fmt.Fprintf(&b, "| %s | %.2f | %.2f | %s |\n", t.Name, t.Most, t.Got, met)
		}
		b.WriteString("\n")
	}
	img := filepath.Join(folder, "img")
	if err := os.MkdirAll(img, 0o755); err != nil {
		return err
	}
	for _, s := range report.Sections {
		fmt.Fprintf(&b, "## %s\n\n", s.Title)
		for _, p := range s.About {
			b.WriteString(wrap(p))
		}
		fmt.Fprintf(&b, "    %s\n\n", s.Command)
		if s.Name == "packet" {
			fmt.Fprintf(&b, "| row | what it is |\n|---|---|\n")
			for _, w := range ways {
				fmt.Fprintf(&b, "| %s | %s |\n", w.Name, w.about)
			}
			b.WriteString("\n")
		}
		for _, t := range s.Tables {
			fmt.Fprintf(&b, "%s:\n\n", t.title())
			for i, line := range t.cells() {
				fmt.Fprintf(&b, "| %s |\n", strings.Join(line, " | "))
				if i == 0 {
					fmt.Fprintf(&b, "|---|%s\n", strings.Repeat("---:|", len(line)-1))
				}
			}
			b.WriteString("\n")
			if t.Plot {
				name := strings.ReplaceAll(s.Name+"-"+t.Name+".svg", " ", "-")
				if err := os.WriteFile(filepath.Join(img, name), []byte(plot(t)), 0o644); err != nil {
					return err
				}
				fmt.Fprintf(&b, "![%s](img/%s)\n\n", t.title(), name)
			}
		}
		for _, n := range s.Notes {
			b.WriteString(wrap(n))
		}
		if s.Name == "instructions" {
			b.WriteString(tried)
		}
	}
	return os.WriteFile(filepath.Join(folder, "performance.md"), bytes.TrimSuffix(b.Bytes(), []byte("\n")), 0o644)
}

// readReport reads the report of an earlier run.
func readReport(path string) (*Report, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("%w: run make bench first", err)
	}
	r := new(Report)
	if err := json.Unmarshal(content, r); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return r, nil
}

// wrap wraps the text to a paragraph.
func wrap(text string) string {
	const width = 120
	var b strings.Builder
	column := 0
	for _, word := range strings.Fields(text) {
		if n := utf8.RuneCountInString(word); column > 0 && column+1+n > width {
			b.WriteString("\n" + word)
			column = n
		} else {
			if column > 0 {
				b.WriteString(" ")
				column++
			}
			b.WriteString(word)
			column += n
		}
	}
	return b.String() + "\n\n"
}
