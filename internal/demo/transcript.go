package demo

import (
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
)

const (
	bold   = "\x1b[1m"
	red    = "\x1b[31m"
	green  = "\x1b[32m"
	yellow = "\x1b[33m"
	cyan   = "\x1b[36m"
	plain  = "\x1b[0m"
)

// A transcript is what the reader sees.
type transcript struct {
	out    io.Writer
	color  bool
	failed error // the first write's error
	// lacking counts what was missing on this machine.
	lacking int
}

func (t *transcript) line(color, text string) {
	if t.color && color != "" {
		text = color + text + plain
	}
	if _, err := io.WriteString(t.out, text+"\n"); err != nil && t.failed == nil {
		t.failed = err
	}
}

func (t *transcript) heading(number int, title string) {
	if number > 1 {
		t.line("", "")
	}
	t.line(bold, fmt.Sprintf("== %d. %s", number, title))
}

// say writes a sentence of the story.
func (t *transcript) say(format string, args ...any) { t.line("", fmt.Sprintf(format, args...)) }

// show shows a command.
func (t *transcript) show(command string) { t.line(cyan, "# "+command) }

// answer shows what a command printed.
func (t *transcript) answer(text string) {
	for line := range strings.Lines(text) {
		t.line("", strings.TrimSuffix(line, "\n"))
	}
}

// notHere says what this machine lacks.
func (t *transcript) notHere(what string) {
	t.lacking++
	t.line(yellow, "NOT HERE  "+what)
}

// check writes that an expectation came true, or ends the act.
func (t *transcript) check(ok bool, format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if !ok {
		t.line(red, "FAILED  "+text)
		must(errors.New(text))
	}
	t.line(green, "ok  "+text)
}

// equal is check for a value. The text describes got.
func (t *transcript) equal(got, want any, format string, args ...any) {
	ok := reflect.DeepEqual(got, want)
	if !ok {
		format, args = format+" (expected: %v)", append(args, want)
	}
	t.check(ok, format, args...)
}

// gone checks that nothing is left of what text says.
func (t *transcript) gone(left []string, text string) {
	if len(left) > 0 {
		text = "still there: " + strings.Join(left, ", ")
	}
	t.check(len(left) == 0, "%s", text)
}

// grouped writes a number as 1,234,567.
func grouped(n uint64) string {
	if n < 1000 {
		return fmt.Sprint(n)
	}
	return fmt.Sprintf("%s,%03d", grouped(n/1000), n%1000)
}
