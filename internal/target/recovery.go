package target

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/state"
)

// A Recovery is one run of recover: on the pins of one bpffs, with their lock held.
type Recovery struct {
	*state.Locked
	Ctx      context.Context
	DryRun   bool
	Reattach bool
	Override bool // as of Request
	Found    []hook.Leftover
}

// Report adds f to what was found.
func (r *Recovery) Report(f hook.Leftover) { r.Found = append(r.Found, f) }

// Settle attaches f again with the given function, if that is asked for, else it removes
// the pins of f; and reports f. done says that f needs no more work; it is false in a dry
// run. reattach is run again for a while as long as it returns ErrTaken: another recover
// may have attached a member and died before it pinned the member; the kernel releases a
// link some time after the link's last descriptor is closed.
func (r *Recovery) Settle(f hook.Leftover, folder string, reattach func() error) (done bool) {
	switch {
	case r.Reattach:
		patience := UntilLeft()
		f.Err = kernel.Retry(r.Ctx, func() error { return patience(reattach()) })
		f.Reattached = f.Err == nil
	case !r.DryRun:
		f.Err = r.Locked.RemoveChain(folder)
	}
	r.Report(f)
	return !r.DryRun && f.Err == nil
}

// Lost says what is known of a link that is on nothing any more: the kernel shows the same
// of a link that was detached and of one whose device or cgroup is gone. kind is "device" or
// "cgroup".
func Lost(what, kind string, seen state.LastSeen) string {
	what = fmt.Sprintf("%s that is on no %s any more", what, kind)
	if seen.Target == "" {
		return what
	}
	err := isThere(kind, seen)
	switch {
	case err == nil:
		return fmt.Sprintf("%s (its link was detached, or %s was made again, for it is there)", what, seen.Target)
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Sprintf("%s (there is no %s)", what, seen.Target)
	}
	return what
}

func isThere(kind string, seen state.LastSeen) error {
	if kind == "cgroup" {
		c, err := kernel.OpenCgroup(seen.Target)
		if err == nil {
			c.Close()
		}
		return err
	}
	ns, err := FindNetNS(seen)
	if err != nil {
		return err
	}
	defer ns.Close()
	return rtnl.In(ns, func(conn *rtnl.Conn) error {
		_, err := conn.Device(seen.Target)
		return err
	})
}

// Nowhere returns the error for a target that does not exist any more:
// fs.ErrNotExist.
func Nowhere(what string) error {
	return hook.Because(fs.ErrNotExist, "there is no %s to attach it to", what).
		Hint("make it and recover again, or recover without --reattach to let it go")
}

// FindNetNS finds the network namespace in which seen was attached, by its cookie,
// or by its inode where the kernel gives no cookies. The caller closes it. The error
// is fs.ErrNotExist, by way of Nowhere, when the namespace is gone.
func FindNetNS(seen state.LastSeen) (*kernel.NetNS, error) {
	ns, err := kernel.FindNetNS(func(ns *kernel.NetNS) error {
		id := ns.ID()
		if id.Cookie != seen.NetNS.Cookie || id.Cookie == 0 && id.Inode != seen.NetNS.Inode {
			return fs.ErrNotExist
		}
		return nil
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil, Nowhere(fmt.Sprintf("network namespace (cookie %d), which was its own,", seen.NetNS.Cookie))
	}
	return ns, err
}
