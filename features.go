package dispatcher

import (
	"context"

	"github.com/libdispatcher/dispatcher/internal/attach"
)

// A Feature is something that a kernel, a machine or a device may lack.
type Feature struct {
	Name      string // short, stable
	Supported bool
	Needs     string // the kernel version or capability that brings it
	Detail    string // what was found, or why it is not supported
	// Unknown: the kernel does not tell, before Linux 6.3 what a driver can do.
	// Supported is false then.
	Unknown bool
}

// Features tells what works here, by trying it: nothing is attached to a
// device, except to a pair of virtual ones in a namespace of its own. With a
// device in t, what that device can do comes with it. The error is about t;
// a feature that is missing is no error.
func Features(ctx context.Context, t Target, o ReadOptions) ([]Feature, error) {
	found, err := attach.Probe(ctx, t.place(o.BPFFS))
	features := make([]Feature, len(found))
	for i, f := range found {
		features[i] = Feature(f)
	}
	return features, wrap("features", t, err)
}
