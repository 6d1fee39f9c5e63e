package dispatcher

import (
	"context"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/features"
)

// Features tells what works here, by trying it: nothing is attached to a
// device, except to a pair of virtual ones in a namespace of its own. With a
// device in t, what that device can do comes with it. The error is about t;
// a feature that is missing is no error.
func Features(ctx context.Context, t Target, o ReadOptions) ([]hook.Feature, error) {
	found, err := features.Probe(ctx, t.place(o.BPFFS))
	return found, wrap("features", t, err)
}
