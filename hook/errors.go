package hook

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode"
)

// Causes, for errors.Is. Other causes are fs.ErrNotExist (no such device, member,
// program or pin), fs.ErrExist (the name is taken) and ebpf.ErrNotSupported.
var (
	// ErrBusy: something that is not a chain of ours is on the hook.
	ErrBusy = errors.New("hook is busy")
	// ErrChanged: others changed the chain meanwhile, more often than it was
	// tried. Nothing was done; trying again is safe.
	ErrChanged = errors.New("changed meanwhile")
	// ErrChainFull: the chain has MaxMembers members.
	ErrChainFull = errors.New("chain is full")
	// ErrDefunct: the device or cgroup is gone, or the link was detached. A Link that returns ErrDefunct can
	// only be closed.
	ErrDefunct = errors.New("defunct")
	// ErrIncompatible: the program cannot be a member of this chain.
	ErrIncompatible = errors.New("incompatible program")
	// ErrPermission: a capability or a right to a file is missing, or the kernel's policy
	// forbids it.
	ErrPermission = errors.New("no permission")
	// ErrPins: the operation is in effect, but pins could not be changed: the bpffs may
	// be read-only, or full.
	ErrPins = errors.New("in effect, but not the pins")
	// ErrUsage: the request itself is wrong: a bad name, a value out of range.
	ErrUsage = errors.New("invalid request")
)

// An Error tells what failed, where, why, and what to do next. Only functions
// that users call make one, with [Wrap]: so it is the outermost error, and its
// text has all that the functions below added. Those return a [Cause].
type Error struct {
	Op     string `json:"op,omitempty"` // "attach", "replace", ...
	Hook   Hook   `json:"hook,omitempty"`
	Target string `json:"target,omitempty"`
	// Occupant is what is on the hook, when that is the cause; else nil.
	Occupant *Occupant `json:"occupant,omitempty"`
	// Err is the cause: everything that the functions below said.
	Err error `json:"-"`
	// Hint is the next step, in words; may be empty.
	Hint string `json:"hint,omitempty"`
}

// Wrap returns the Error of an operation that failed with err, with the
// occupant and the hints of the causes in err; nil if err is nil.
//
// Each hint is said once, from the outermost cause to the innermost. So a hint must
// still be right beside the hints of the causes that its cause wraps.
func Wrap(op string, h Hook, target string, err error) error {
	if err == nil {
		return nil
	}
	e := &Error{Op: op, Hook: h, Target: target, Err: err}
	var hints []string
	visit(err, func(c *Cause) {
		if e.Occupant == nil {
			e.Occupant = c.occupant
		}
		if c.hint != "" && !slices.Contains(hints, c.hint) {
			hints = append(hints, c.hint)
		}
	})
	e.Hint = strings.Join(hints, "; ")
	return e
}

// An Occupant is what holds a hook.
type Occupant struct {
	Kind    Kind    `json:"kind"`
	Program Program `json:"program"`
	LinkID  uint32  `json:"link_id,omitempty"` // 0 for KindLegacy, and when several links qualify
	Mode    Mode    `json:"mode"`
	// HeldBy are the holders of the link in words: processes and pins.
	HeldBy []string `json:"held_by,omitempty"`
}

// String describes the occupant in words.
func (o *Occupant) String() string {
	by := fmt.Sprintf("link %d", o.LinkID)
	switch {
	case o.Kind == KindLegacy:
		by = "a program without a link"
	case o.Kind == KindLibxdp:
		by = "a dispatcher of libxdp"
	case o.LinkID == 0:
		by = "a link"
	}
	name := cmp.Or(o.Program.Name, "without a name")
	mode := ""
	if o.Mode != ModeAuto { // only XDP has modes
		mode = fmt.Sprintf(", %s mode", o.Mode)
	}
	held := ""
	for _, h := range o.HeldBy {
		held += ", " + printable(h)
	}
	return fmt.Sprintf("%s (program %s, id %d, tag %s%s%s)", by, name, o.Program.ID, o.Program.Tag, mode, held)
}

// Error returns the whole error in one line, with the hint.
func (e *Error) Error() string {
	var parts []string
	for _, word := range []string{e.Op, string(e.Hook), printable(e.Target)} {
		if word != "" {
			parts = append(parts, word)
		}
	}
	if len(parts) > 0 {
		parts = []string{strings.Join(parts, " ")}
	}
	if e.Occupant != nil {
		parts = append(parts, fmt.Sprintf("held by %v", e.Occupant))
	}
	if why := e.Reason(); why != "" && (e.Occupant == nil || why != ErrBusy.Error()) {
		parts = append(parts, why)
	}
	text := strings.Join(parts, ": ")
	if e.Hint != "" {
		text += "; " + e.Hint
	}
	return text
}

// Reason returns the text of the cause in one line; empty without a cause.
func (e *Error) Reason() string {
	if e.Err == nil {
		return ""
	}
	return oneLine(e.Err.Error())
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// oneLine returns s in one line: texts of other libraries may have several.
func oneLine(s string) string {
	lines := strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == '\r' })
	return strings.Join(lines, " ")
}

// printable returns s, quoted and cut where it would spoil a line.
func printable(s string) string {
	const room = 200
	if len(s) <= room && strings.IndexFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) < 0 {
		return s
	}
	return fmt.Sprintf("%.*q", room, s)
}

// A VerifierRefusal is the error, for errors.As, of a program that the kernel's
// verifier refused. Its text is one line.
type VerifierRefusal struct {
	// Program is the function's name.
	Program string
	// Why is the cause, in one line.
	Why string
	// Log is the verifier's whole log, by lines.
	Log []string
	// Err is the *ebpf.VerifierError.
	Err error
}

// Error returns the cause in one line.
func (e *VerifierRefusal) Error() string {
	return fmt.Sprintf("the verifier refused program %q: %s", e.Program, e.Why)
}

// Unwrap returns the verifier's error.
func (e *VerifierRefusal) Unwrap() error { return e.Err }
