package target

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/state"
)

// A Recovery is one run of recover, on the pins of one bpffs, under their lock.
type Recovery struct {
	*state.Locked
	Ctx      context.Context
	DryRun   bool
	Reattach bool
	Found    []hook.Leftover
}

// Report notes what was found.
func (r *Recovery) Report(f hook.Leftover) { r.Found = append(r.Found, f) }

// settle collects what was not attached again, or says what kept it from that.
func (r *Recovery) Settle(f hook.Leftover, folder string, err error) (done bool) {
	switch {
	case r.Reattach && err != nil:
		f.Err = err
	case !f.Reattached && !r.DryRun:
		f.Err = r.Locked.RemoveChain(folder)
	}
	r.Report(f)
	return !r.DryRun && f.Err == nil
}

// nowhere is that nothing of the old name is there to be attached to.
func Nowhere(what string) error {
	return hook.Because(fs.ErrNotExist, "there is no %s to attach it to", what).
		Hint("make it and recover again, or recover without --reattach to let it go")
}

// seenNS finds the namespace of old, or the one that has its place: the one that
// it was in if that is still there, else the caller's.
func FindNetNS(seen state.LastSeen) (*kernel.NetNS, error) {
	ns, err := kernel.FindNetNS(func(ns *kernel.NetNS) bool {
		id := ns.ID()
		return id.Cookie == seen.NetNS.Cookie && (id.Cookie != 0 || id.Inode == seen.NetNS.Inode)
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil, Nowhere(fmt.Sprintf("network namespace (cookie %d), which was its own,", seen.NetNS.Cookie))
	}
	return ns, err
}

// patiently runs fn, again for a while as long as what another recover attached, which
// died before it was pinned, is not gone: the kernel releases a link some time after
// its last descriptor.
func (r *Recovery) Patiently(fn func() error) error {
	patience := UntilLeft()
	return kernel.Retry(r.Ctx, func() error { return patience(fn()) })
}
