package dispatcher

import (
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// Error is what every function here returns on failure, not wrapped in anything:
// what failed, on which hook and target, what is there instead, why, and the next
// step. An error in a result, as in [hook.Chain] or [hook.Sample], is only the
// cause, because the result says what it is about. [hook.Wrap] makes an Error of it.
type Error = hook.Error

// Causes, for errors.Is; see package hook for what each means.
var (
	ErrBusy         = hook.ErrBusy
	ErrChanged      = hook.ErrChanged
	ErrChainFull    = hook.ErrChainFull
	ErrDefunct      = hook.ErrDefunct
	ErrIncompatible = hook.ErrIncompatible
	ErrPermission   = hook.ErrPermission
	ErrPins         = hook.ErrPins
	ErrUsage        = hook.ErrUsage
)

// wrap returns the [Error] for an operation that failed on a target.
func wrap(op string, t Target, err error) error {
	err = kernel.Wrap(op, t.Hook, t.Name(), err)
	if e, ok := err.(*Error); ok && e.Occupant != nil {
		nameHolders(e.Occupant)
	}
	return err
}
