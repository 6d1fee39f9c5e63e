package hook

import (
	"errors"
	"fmt"
	"strings"
	"unicode"
)

// Causes, for errors.Is. Beside them, fs.ErrNotExist (no such device, member,
// program or pin), fs.ErrExist (a member of that name is there already) and
// ebpf.ErrNotSupported are used as they are.
var (
	// ErrBusy: something that is not a chain of ours is on the hook.
	ErrBusy = errors.New("hook is busy")
	// ErrChanged: others changed the chain meanwhile, more often than it was
	// tried. Nothing was done; trying again is safe.
	ErrChanged = errors.New("changed meanwhile")
	// ErrChainFull: the chain has MaxMembers members.
	ErrChainFull = errors.New("chain is full")
	// ErrDefunct: the device, and with it the chain, is gone. A link that
	// says so can only be closed.
	ErrDefunct = errors.New("defunct")
	// ErrIncompatible: the program cannot be a member of this chain.
	ErrIncompatible = errors.New("incompatible program")
	// ErrPermission: a capability is missing, or the kernel's policy forbids it.
	ErrPermission = errors.New("no permission")
	// ErrUsage: the request itself is wrong: a bad name, a value out of range.
	ErrUsage = errors.New("invalid request")
)

// An Error tells what failed, where, why, and what to do next.
type Error struct {
	Op     string // "attach", "replace", ...
	Hook   Hook
	Target string
	// Occupant is what is on the hook, when that is the reason.
	Occupant *Occupant
	// Err is the cause.
	Err error
	// Hint is the next step, in words; may be empty.
	Hint string
}

// An Occupant is what holds a hook.
type Occupant struct {
	Kind    Kind
	Program Program
	LinkID  uint32 // 0 for KindLegacy, and when several links qualify
	Mode    Mode
	// HeldBy is who keeps the link: processes and pins, in words.
	HeldBy []string
}

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
	name := o.Program.Name
	if name == "" {
		name = "without a name"
	}
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

func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.Op)
	if e.Hook != "" {
		fmt.Fprintf(&b, " %s", e.Hook)
	}
	if e.Target != "" {
		fmt.Fprintf(&b, " %s", printable(e.Target))
	}
	if e.Occupant != nil {
		fmt.Fprintf(&b, ": held by %v", e.Occupant)
	}
	if e.Err != nil && (e.Occupant == nil || e.Err != ErrBusy) {
		fmt.Fprintf(&b, ": %v", e.Err)
	}
	if e.Hint != "" {
		fmt.Fprintf(&b, "; %s", e.Hint)
	}
	return b.String()
}

func (e *Error) Unwrap() error { return e.Err }

// printable returns s, quoted and cut where it would spoil a line.
func printable(s string) string {
	const room = 200
	if len(s) <= room && strings.IndexFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) < 0 {
		return s
	}
	return fmt.Sprintf("%.*q", room, s)
}

// caused is a sentinel with a text of its own.
type caused struct {
	text   string
	causes []error
}

func (c *caused) Error() string   { return c.text }
func (c *caused) Unwrap() []error { return c.causes }

// Because returns an error that is the sentinel for errors.Is and reads as
// the formatted text. Errors among the arguments are wrapped too.
func Because(sentinel error, format string, args ...any) error {
	c := &caused{text: fmt.Errorf(format, args...).Error(), causes: []error{sentinel}}
	for _, a := range args {
		if err, ok := a.(error); ok {
			c.causes = append(c.causes, err)
		}
	}
	return c
}
