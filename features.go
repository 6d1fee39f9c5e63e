package dispatcher

import (
	"context"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/features"
)

// Features tries which features work on this machine. It attaches programs only in a
// network namespace of its own. If t names a device, the result also says what that
// device can do. The error is about t; a missing feature is not an error.
func Features(ctx context.Context, t Target, o ReadOptions) ([]hook.Feature, error) {
	found, err := features.Probe(ctx, t.place(o.BPFFS))
	return found, wrap("features", t, err)
}
