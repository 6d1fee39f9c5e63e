package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/apply"
)

// Exit statuses, for scripts. They are a contract.
const (
	statusDone = iota
	statusUsage
	statusFailed
	statusBusy
	statusNotFound
	statusUnsupported
	statusDrift
	statusNoDevice
	statusSignal = 128 // and the number of the signal, as shells have it
)

// statuses tells what each exit status means, and which errors lead to it. The
// first match counts.
var statuses = []struct {
	status  int
	meaning string
	causes  []error
}{
	{statusDone, "done, or done but for pins that could not be changed, with a warning", []error{dispatcher.ErrPins}},
	{statusUsage, "the command line, or what it asks for, is wrong", []error{dispatcher.ErrUsage}},
	{statusFailed, "the kernel refused, or something failed", nil},
	{statusBusy, "busy: another program holds the hook, the name is taken, the chain is full or kept changing",
		[]error{dispatcher.ErrBusy, dispatcher.ErrChainFull, dispatcher.ErrChanged, fs.ErrExist}},
	{statusNotFound, "no such device, cgroup, member, program or file, or it is gone",
		[]error{dispatcher.ErrDefunct, fs.ErrNotExist}},
	{statusUnsupported, "not supported by this kernel, driver or chain",
		[]error{dispatcher.ErrIncompatible, ebpf.ErrNotSupported}},
	{statusDrift, "doctor found something to mend, diff a difference, or explain another verdict than expected", []error{errDrift, errUnexpected, errDiffers}},
	{statusNoDevice, "apply, diff: all else is as declared, and something that is declared has no device or cgroup", []error{apply.ErrNoDevice}},
}

func exitStatus(err error) int {
	if err == nil {
		return statusDone
	}
	var signal interruption
	if errors.As(err, &signal) {
		return statusSignal + int(signal.Signal)
	}
	for _, s := range statuses {
		for _, cause := range s.causes {
			if errors.Is(err, cause) {
				return s.status
			}
		}
	}
	return statusFailed
}

// because puts the signal that ended ctx into an error that tells only of the end.
func because(ctx context.Context, err error) error {
	var signal interruption
	if !errors.Is(err, context.Canceled) || !errors.As(context.Cause(ctx), &signal) {
		return err
	}
	e := shown(err)
	return &dispatcher.Error{Op: e.Op, Hook: e.Hook, Target: e.Target, Err: signal}
}

func describeStatuses(indent string) string {
	var b strings.Builder
	for _, s := range statuses {
		fmt.Fprintf(&b, "%s%d  %s\n", indent, s.status, s.meaning)
	}
	fmt.Fprintf(&b, "%s%d and the signal's number: ended by it before it was done; with Ctrl-C 130\n", indent, statusSignal)
	return b.String()
}

// usage returns an error in the command line, found before the library is called.
// The hint, the next step, may be empty.
func usage(hint, format string, args ...any) error {
	return hook.Because(dispatcher.ErrUsage, format, args...).Hint("%s", hint)
}

// several are errors of one run. Each is printed; the first gives the exit status.
type several []error

func (s several) Error() string   { return errors.Join(s...).Error() }
func (s several) Unwrap() []error { return s }

// join returns the errors among errs as one; nil when there is none.
func join(errs ...error) error {
	var all several
	for _, err := range errs {
		if more, ok := err.(several); ok {
			all = append(all, more...)
		} else if err != nil {
			all = append(all, err)
		}
	}
	if len(all) == 0 {
		return nil
	}
	return all
}

// jsonError is an error as JSON.
type jsonError struct {
	dispatcher.Error
	Cause    string        `json:"cause"`
	Hint     string        `json:"hint,omitempty"`
	Occupant *jsonOccupant `json:"occupant,omitempty"`
	Verifier []string      `json:"verifier,omitempty"`
	Exit     int           `json:"exit"`
}

type jsonOccupant struct {
	*hook.Occupant
	Mode string `json:"mode,omitempty"` // of XDP
}

// fail prints the error, or each of several, and returns the exit status.
func (a *app) fail(err error) int {
	all, ok := err.(several)
	if !ok {
		all = several{err}
	}
	status := exitStatus(all[0])
	for _, err := range all {
		a.printError(err, status)
	}
	return status
}

func (a *app) printError(err error, status int) {
	e := shown(err)
	if status == statusDone {
		a.warn("%v", e)
		return
	}
	var refused *hook.VerifierRefusal
	isRefused := errors.As(err, &refused)
	if a.format == formatJSON {
		j := describeError(e)
		j.Exit = status
		if isRefused && a.verbose {
			j.Verifier = refused.Log
		}
		_ = encodeLine(a.stderr, struct {
			Version int       `json:"version"`
			Error   jsonError `json:"error"`
		}{schema, j})
		return
	}

	fmt.Fprintf(a.stderr, "%s %v\n", a.paint(a.stderr, "dispatcher:", red), e)
	if isRefused {
		if a.verbose {
			fmt.Fprintf(a.stderr, "%+v\n", refused.Err)
		} else {
			a.note("-v prints the verifier's whole log")
		}
	}
}

// shown is the error that text and JSON are made from: one of the library's as it is,
// one of the command itself without an operation.
func shown(err error) *dispatcher.Error {
	e, ok := err.(*dispatcher.Error)
	if !ok {
		errors.As(hook.Wrap("", "", "", err), &e)
	}
	return e
}

// why is the text of an error that stands beside what it is about: the cause and
// the hint.
func why(err error) string {
	e := shown(err)
	return (&dispatcher.Error{Err: e.Err, Hint: e.Hint}).Error()
}

func describeError(e *dispatcher.Error) jsonError {
	j := jsonError{Error: *e, Cause: e.Reason(), Hint: e.Hint}
	if o := e.Occupant; o != nil {
		j.Occupant = &jsonOccupant{Occupant: o}
		if o.Mode != hook.ModeAuto {
			j.Occupant.Mode = o.Mode.String()
		}
	}
	return j
}

// oneLine makes a message one line, as scripts and logs expect.
func oneLine(s string) string {
	return strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == '\r' }), " ")
}

// didYouMean returns a hint with the known word that is nearest to a wrong one,
// or otherwise if none is near.
func didYouMean(wrong string, known []string, prefix, otherwise string) string {
	best, least := "", min(3, 1+len(wrong)/2)
	for _, word := range known {
		d := distance(wrong, word)
		if len(wrong) > 1 && strings.HasPrefix(word, wrong) {
			d = 1
		}
		if d < least {
			best, least = word, d
		}
	}
	if best == "" {
		return otherwise
	}
	return fmt.Sprintf("did you mean %q?", prefix+best)
}

// distance returns how many letters must be added, removed or changed to turn
// one word into the other (Levenshtein).
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			change := diagonal
			if a[i] != b[j] {
				change++
			}
			diagonal = row[j+1]
			row[j+1] = min(change, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
