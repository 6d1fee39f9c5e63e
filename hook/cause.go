package hook

import "fmt"

// A Cause says in words why something failed. It also has what [Wrap] puts into the
// Error: a hint, which is the next step, and the occupant of the hook. The text of
// the Cause has neither.
type Cause struct {
	text     string
	errs     []error
	occupant *Occupant
	hint     string
}

// Because returns a Cause with the formatted text, which matches the sentinel in
// errors.Is. Errors among the arguments are wrapped too.
func Because(sentinel error, format string, args ...any) *Cause {
	c := &Cause{text: fmt.Errorf(format, args...).Error(), errs: []error{sentinel}}
	for _, a := range args {
		if err, ok := a.(error); ok {
			c.errs = append(c.errs, err)
		}
	}
	return c
}

// Busy returns the Cause for a hook that the occupant holds: [ErrBusy].
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

// Error returns the text, without the hint and the occupant.
func (c *Cause) Error() string { return c.text }

// Unwrap returns the sentinel and the wrapped errors.
func (c *Cause) Unwrap() []error { return c.errs }

// visit calls fn for each Cause in the tree of err: an outer Cause before the Causes
// that it wraps, and several wrapped errors in their order.
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
