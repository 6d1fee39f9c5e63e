package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher"
)

// Values of --output.
const (
	formatTable = "table"
	formatWide  = "wide"
	formatJSON  = "json"
)

// schema is the version of all JSON output.
const schema = 1

// An app is one run of the command, with its outputs and the global flags.
type app struct {
	stdout, stderr io.Writer

	format  string
	color   string
	netns   string
	bpffs   string
	verbose bool
	quiet   bool

	args []string // the command line
	pins bool     // the verb makes pins
}

// run runs the command line args and returns the exit status.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	a := &app{stdout: newEscaper(stdout), stderr: newEscaper(stderr), args: args}
	err := a.rootCommand(args).ExecuteContext(ctx)
	var code exit
	switch {
	case errors.As(err, &code):
		return int(code)
	case err != nil:
		return a.fail(because(ctx, err))
	case a.pins:
		a.warnPrivate()
	}
	return statusDone
}

// target names a hook on a device, in the network namespace of --netns, or on a
// cgroup.
func (a *app) target(hookName, name string) (dispatcher.Target, error) {
	h, err := parseHook(hookName)
	return dispatcher.On(h, name).In(a.netns), err
}

// withTarget is the RunE of a verb whose first words are a hook and a target. fn gets
// the words after them.
func (a *app) withTarget(fn func(cmd *cobra.Command, t dispatcher.Target, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		args = withoutDev(args, 1)
		t, err := a.target(args[0], args[1])
		if err != nil {
			return err
		}
		return fn(cmd, t, args[2:])
	}
}

func (a *app) readOptions() dispatcher.ReadOptions {
	return dispatcher.ReadOptions{BPFFS: a.bpffs}
}

// note writes to stderr what the user may want to know.
func (a *app) note(format string, args ...any) {
	text := oneLine(fmt.Sprintf(format, args...))
	a.say("note: "+text, jsonWords{Version: schema, Note: text})
}

// warn writes to stderr what the user should check.
func (a *app) warn(format string, args ...any) {
	text := oneLine(fmt.Sprintf(format, args...))
	a.say(a.paint(a.stderr, "warning: ", yellow)+text, jsonWords{Version: schema, Warning: text})
}

// jsonWords is a note or a warning as JSON.
type jsonWords struct {
	Version int    `json:"version"`
	Note    string `json:"note,omitempty"`
	Warning string `json:"warning,omitempty"`
}

func (a *app) say(text string, asJSON jsonWords) {
	switch {
	case a.quiet:
	case a.format == formatJSON:
		_ = encodeLine(a.stderr, asJSON)
	default:
		fmt.Fprintf(a.stderr, "dispatcher: %s\n", text)
	}
}

// print writes a result to stdout. A failed write is an error, because a full
// disk would otherwise look like an empty list.
func (a *app) print(text string) error {
	_, err := io.WriteString(a.stdout, text)
	return err
}

// printJSON writes a result to stdout as indented JSON.
func (a *app) printJSON(v any) error { return encode(a.stdout, "  ", v) }

// encodeLine writes v as JSON on one line.
func encodeLine(w io.Writer, v any) error { return encode(w, "", v) }

func encode(w io.Writer, indent string, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	e.SetIndent("", indent)
	return e.Encode(v)
}

const (
	red    = "\x1b[31m"
	green  = "\x1b[32m"
	yellow = "\x1b[33m"
	plain  = "\x1b[0m"
)

// paint colours text if w takes colour; an empty color changes nothing.
func (a *app) paint(w io.Writer, text, color string) string {
	if color == "" || !a.colored(w) {
		return text
	}
	return control(w, color) + text + control(w, plain)
}

// colored tells whether w takes colour. See https://no-color.org for NO_COLOR.
func (a *app) colored(w io.Writer) bool {
	switch a.color {
	case "always":
		return true
	case "never":
		return false
	}
	return os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb" && terminal(w) != nil
}
