// Command bench measures the project against the other ways, and reports the figures. It is the
// project's own tool: "make bench" calls it.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/term"

	"github.com/libdispatcher/dispatcher/internal/kernel"
)

const usage = `usage: bench [OPTION]...           measure and report
       bench check [OPTION]...     fail if a chain has become more costly than expected.json says
       bench doc [OPTION]...       write docs/performance.md from the last report

`

// sections are the measurements, in the order of the report.
var sections = []struct {
	name string
	run  func(*bench, *Section)
	when string // only if it is asked for
}{
	{"packet", packetSection, ""},
	{"wire", wireSection, ""},
	{"control", controlSection, ""},
	{"scale", scaleSection, ""},
	{"load", loadSection, ""},
	{"weight", weightSection, ""},
	{"instructions", instructionsSection, ""},
	{"counted", countedSection, "for a machine with a clock that counts instructions"},
}

// A bench is a run of the benchmarks.
type bench struct {
	*scope
	quick    bool // fewer rounds
	terminal bool
	section  string
	tool     string // the command dispatcher
	matrix   string // the tool for virtual machines
	shown    int    // characters of progress on the terminal
}

// rounds returns how many of n rounds to do.
func (b *bench) rounds(n int) int {
	if b.quick {
		return max(n/6, 3)
	}
	return n
}

// apart runs fn with a scope of its own.
func (b *bench) apart(fn func(b *bench)) {
	inner := *b
	err := within(b.ctx, func(t *scope) {
		inner.scope = t
		fn(&inner)
	})
	b.shown = inner.shown
	b.must(err)
}

// progress shows the current work in one line of a terminal.
func (b *bench) progress(format string, args ...any) {
	b.must(nil)
	if !b.terminal {
		return
	}
	text := b.section
	if format != "" {
		text += ": " + fmt.Sprintf(format, args...)
	}
	fmt.Fprintf(os.Stderr, "\r%-*s", b.shown, text)
	b.shown = len(text)
}

func (b *bench) clear() {
	if b.terminal {
		fmt.Fprintf(os.Stderr, "\r%*s\r", b.shown, "")
		b.shown = 0
	}
}

func main() {
	kernel.RaiseMemlock()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if err := run(ctx, os.Args[1:]); errors.Is(err, flag.ErrHelp) {
		os.Exit(1)
	} else if ctx.Err() != nil {
		os.Exit(130)
	} else if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	var names, usual []string
	for _, s := range sections {
		names = append(names, s.name)
		if s.when == "" {
			usual = append(usual, s.name)
		}
	}
	b := &bench{terminal: term.IsTerminal(int(os.Stderr.Fd()))}
	only := flags.String("only", "", "only these `sections`, comma-separated, of "+strings.Join(names, ", "))
	out := flags.String("json", "bin/bench.json", "write the report to this `file`; - for stdout, with no other output there")
	flags.BoolVar(&b.quick, "quick", false, "fewer rounds")
	flags.StringVar(&b.tool, "dispatcher", "bin/dispatcher", "the command dispatcher")
	flags.StringVar(&b.matrix, "matrix", "bin/matrix", "the tool for virtual machines")
	flags.Usage = func() {
		fmt.Fprint(flags.Output(), usage)
		flags.PrintDefaults()
	}
	update := flags.Bool("update", false, "check: write the measured instructions as the expected ones")
	docs := flags.String("docs", "docs", "doc: the `folder` of the documents")
	verb := ""
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		verb, args = args[0], args[1:]
	}
	if err := flags.Parse(args); err != nil {
		return flag.ErrHelp
	}
	switch {
	case flags.NArg() > 0:
		return fmt.Errorf("%q: no arguments are expected", flags.Arg(0))
	case verb == "check":
		var err error
		return errors.Join(within(ctx, func(t *scope) {
			b.scope = t
			err = b.check(*update)
		}), err)
	case verb == "doc":
		report, err := readReport(*out)
		if err != nil {
			return err
		}
		return writeDoc(report, *docs)
	case verb != "":
		flags.Usage()
		return flag.ErrHelp
	}
	chosen := usual
	if *only != "" {
		chosen = strings.Split(*only, ",")
		for _, name := range chosen {
			if !slices.Contains(names, name) {
				return fmt.Errorf("there is no section %q: there are %s", name, strings.Join(names, ", "))
			}
		}
	}

	report := &Report{Version: 1, Command: "bench " + strings.Join(args, " "), Date: time.Now().UTC().Format(time.RFC3339), Machine: thisMachine()}
	var failures []error
	for _, section := range sections {
		if !slices.Contains(chosen, section.name) {
			continue
		}
		s := &Section{Name: section.name, Command: "make bench ONLY=" + section.name}
		begin := time.Now()
		b.section = s.Name
		err := within(ctx, func(t *scope) {
			b.scope = t
			b.progress("")
			section.run(b, s)
		})
		b.clear()
		s.Seconds = time.Since(begin).Seconds()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			s.Failed = err.Error()
			failures = append(failures, fmt.Errorf("%s: %w", s.Name, err))
		}
		report.Sections = append(report.Sections, s)
		if *out != "-" {
			s.print(os.Stdout)
		}
	}
	report.judge()
	for _, t := range report.Results {
		if *out != "-" {
			fmt.Printf("\n  goal: %s: %.3f, at most %.2f\n", t.Name, t.Got, t.Most)
		}
	}
	content, err := json.MarshalIndent(report, "", " ")
	if err != nil {
		return err
	}
	content = append(content, '\n')
	if *out == "-" {
		os.Stdout.Write(content)
		return errors.Join(failures...)
	}
	if err := os.MkdirAll(filepath.Dir(*out), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(*out, content, 0o644); err != nil {
		return err
	}
	return errors.Join(failures...)
}
