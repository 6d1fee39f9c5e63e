package dispatcher

import (
	"context"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/doctor"
)

// Doctor looks for what is wrong on the machine, in the pins and on all hooks, and for
// the command that mends it. The list has checks that found nothing too. Doctor looks at
// the state twice, so that it does not report what a process has only half done.
//
// Doctor changes nothing. It tries features as [Features] does. What it cannot look at is
// a finding; the only error is the end of ctx.
func Doctor(ctx context.Context, o ReadOptions) ([]hook.Finding, error) {
	found, err := doctor.Look(ctx, bpffsOf(o.BPFFS))
	return found, wrap("doctor", Target{}, err)
}
