package dispatcher

import (
	"context"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/doctor"
)

// Doctor looks for what is not as it should be: on the machine, in the pins and
// on all hooks; and for the command that mends it. Checks that found nothing are
// in the list, too. What others are in the middle of doing is not reported: the
// state is looked at again before.
//
// Nothing is changed. Features are tried as [Features] does. What cannot be looked
// at is a finding; the error is the end of ctx.
func Doctor(ctx context.Context, o ReadOptions) ([]hook.Finding, error) {
	found, err := doctor.Look(ctx, bpffsOf(o.BPFFS))
	return found, wrap("doctor", Target{}, err)
}
