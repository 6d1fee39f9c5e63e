package hook

import "fmt"

// A Cause is why something failed, in words, with what [Wrap] puts into the
// Error: a hint, which is the next step, and the occupant of the hook. The text
// of the Cause has neither.
type Cause struct {
	text     string
	errs     []error
	occupant *Occupant
	hint     string
}

// Because returns a Cause that is the sentinel for errors.Is and reads as the
// formatted text. Errors among the arguments are wrapped too.
func Because(sentinel error, format string, args ...any) *Cause {
	c := &Cause{text: fmt.Errorf(format, args...).Error(), errs: []error{sentinel}}
	for _, a := range args {
		if err, ok := a.(error); ok {
			c.errs = append(c.errs, err)
		}
	}
	return c
}

// Busy returns the Cause that the occupant holds the hook: [ErrBusy].
func Busy(o *Occupant) *Cause {
	return &Cause{text: ErrBusy.Error(), errs: []error{ErrBusy}, occupant: o}
}

// WithHint returns err as a Cause with a hint.
func WithHint(err error, format string, args ...any) *Cause {
	return (&Cause{text: err.Error(), errs: []error{err}}).Hint(format, args...)
}

// Hint sets the next step: words that can stand behind a semicolon. It returns c.
func (c *Cause) Hint(format string, args ...any) *Cause {
	c.hint = fmt.Sprintf(format, args...)
	return c
}

// HeldBy sets what is on the hook. It returns c.
func (c *Cause) HeldBy(o *Occupant) *Cause {
	c.occupant = o
	return c
}

func (c *Cause) Error() string   { return c.text }
func (c *Cause) Unwrap() []error { return c.errs }

// visit calls fn for the Causes in the tree of err: an outer one before those that
// it wraps, and of several wrapped errors the first one first.
func visit(err error, fn func(*Cause)) {
	if c, ok := err.(*Cause); ok {
		fn(c)
	}
	switch w := err.(type) {
	case interface{ Unwrap() error }:
		visit(w.Unwrap(), fn)
	case interface{ Unwrap() []error }:
		for _, err := range w.Unwrap() {
			visit(err, fn)
		}
	}
}
