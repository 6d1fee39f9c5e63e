package dispatcher

import "github.com/libdispatcher/dispatcher/hook"

// Error is what every function here returns on failure: what failed, on which
// hook and target, who is there instead, why, and the next step.
type Error = hook.Error

// Causes, for errors.Is; see package hook for what each means.
var (
	ErrBusy         = hook.ErrBusy
	ErrChanged      = hook.ErrChanged
	ErrChainFull    = hook.ErrChainFull
	ErrDefunct      = hook.ErrDefunct
	ErrIncompatible = hook.ErrIncompatible
	ErrPermission   = hook.ErrPermission
	ErrUsage        = hook.ErrUsage
)
