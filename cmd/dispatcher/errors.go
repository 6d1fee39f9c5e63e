package main

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
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
)

// statuses tells what each exit status means, and which errors lead to it. The
// first match counts.
var statuses = []struct {
	status  int
	meaning string
	causes  []error
}{
	{statusDone, "done", nil},
	{statusUsage, "the command line, or what it asks for, is wrong", []error{dispatcher.ErrUsage}},
	{statusFailed, "the kernel refused, or something failed", nil},
	{statusBusy, "busy: another program holds the hook, the name is taken, the chain is full or kept changing",
		[]error{dispatcher.ErrBusy, dispatcher.ErrChainFull, dispatcher.ErrChanged, fs.ErrExist}},
	{statusNotFound, "no such device, cgroup, member, program or file, or it is gone",
		[]error{dispatcher.ErrDefunct, fs.ErrNotExist}},
	{statusUnsupported, "not supported by this kernel, driver or chain",
		[]error{dispatcher.ErrIncompatible, ebpf.ErrNotSupported}},
	{statusDrift, "doctor found something to mend, or explain found another verdict than expected", []error{errDrift, errUnexpected}},
}

func exitStatus(err error) int {
	if err == nil {
		return statusDone
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

func describeStatuses(indent string) string {
	var b strings.Builder
	for _, s := range statuses {
		fmt.Fprintf(&b, "%s%d  %s\n", indent, s.status, s.meaning)
	}
	return b.String()
}

// A usageError is an error in the command line, found before the library is
// called.
type usageError struct{ cause, hint string }

// usage returns a usageError. The hint, the next step, may be empty.
func usage(hint, format string, args ...any) error {
	return &usageError{fmt.Sprintf(format, args...), hint}
}

func (e *usageError) Error() string {
	if e.hint == "" {
		return e.cause
	}
	return e.cause + "; " + e.hint
}

func (e *usageError) Is(target error) bool { return target == dispatcher.ErrUsage }

// jsonError is an error as JSON.
type jsonError struct {
	Op       string        `json:"op,omitempty"`
	Hook     string        `json:"hook,omitempty"`
	Target   string        `json:"target,omitempty"`
	Cause    string        `json:"cause"`
	Hint     string        `json:"hint,omitempty"`
	Occupant *jsonOccupant `json:"occupant,omitempty"`
	Verifier []string      `json:"verifier,omitempty"`
	Exit     int           `json:"exit"`
}

type jsonOccupant struct {
	Kind    string       `json:"kind"`
	LinkID  uint32       `json:"link_id,omitempty"`
	Mode    string       `json:"mode,omitempty"` // of XDP
	Program *jsonProgram `json:"program"`
	HeldBy  []string     `json:"held_by,omitempty"`
}

// fail prints the error and returns the exit status.
func (a *app) fail(err error) int {
	status := exitStatus(err)
	var refused *hook.VerifierRefusal
	isRefused := errors.As(err, &refused)
	if a.format == formatJSON {
		e := describeError(err)
		e.Exit = status
		if isRefused && a.verbose {
			e.Verifier = refused.Log
		}
		_ = encodeLine(a.stderr, struct {
			Version int       `json:"version"`
			Error   jsonError `json:"error"`
		}{schema, e})
		return status
	}

	fmt.Fprintf(a.stderr, "%s %s\n", a.paint(a.stderr, "dispatcher:", red), oneLine(err.Error()))
	if isRefused {
		if a.verbose {
			fmt.Fprintf(a.stderr, "%+v\n", refused.Err)
		} else {
			a.note("-v prints the verifier's whole log")
		}
	}
	return status
}

func describeError(err error) jsonError {
	var e *dispatcher.Error
	if errors.As(err, &e) {
		j := jsonError{Op: e.Op, Hook: string(e.Hook), Target: e.Target, Hint: e.Hint}
		if e.Err != nil {
			j.Cause = e.Err.Error()
		}
		if o := e.Occupant; o != nil {
			j.Occupant = &jsonOccupant{Kind: string(o.Kind), LinkID: o.LinkID, Program: describeProgram(o.Program), HeldBy: o.HeldBy}
			if e.Hook == hook.XDP {
				j.Occupant.Mode = o.Mode.String()
			}
		}
		return j
	}
	if u, ok := err.(*usageError); ok {
		return jsonError{Cause: u.cause, Hint: u.hint}
	}
	return jsonError{Cause: err.Error()}
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
