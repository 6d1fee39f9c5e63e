package target

import (
	"context"
	"errors"
	"io/fs"
	"strconv"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/state"
)

// A Target is what the user names: a hook of a device or a cgroup, its network
// namespace, and the bpffs to pin in.
type Target struct {
	Hook  hook.Hook
	Name  string
	NetNS string
	BPFFS string
}

// An Opened is a target that was opened. Close releases it.
type Opened struct {
	Target
	NS    *kernel.NetNS
	Pins  *state.Pins         // nil where there is no bpffs
	Sweep func(*state.Locked) // may be nil
	Links []kernel.LinkInfo   // the links as the caller read them before; may be nil
}

// Open opens a target; the caller closes it. sweep removes what dead processes left
// behind in the pins. The error is ErrUsage for an unknown hook, or for a cgroup with
// a network namespace. A missing bpffs is no error: Pins is nil then.
func Open(t Target, sweep func(*state.Locked)) (*Opened, error) {
	if _, err := hook.Parse(string(t.Hook)); err != nil {
		return nil, hook.Because(hook.ErrUsage, "%w", err)
	}
	if t.Hook.OnCgroup() && t.NetNS != "" {
		return nil, hook.Because(hook.ErrUsage, "a cgroup is in no network namespace; leave %q out", t.NetNS)
	}
	ns, err := kernel.OpenNetNS(t.NetNS)
	if err != nil {
		return nil, err
	}
	o, err := OpenPins(t, sweep)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		ns.Close()
		return nil, err
	}
	o.NS = ns
	return o, nil
}

// OpenPins opens only the pins of a target. The error is fs.ErrNotExist when there
// is no bpffs; it comes with an opened target without pins, which can be used.
func OpenPins(t Target, sweep func(*state.Locked)) (*Opened, error) {
	pins, err := state.OpenPins(t.BPFFS)
	return &Opened{Target: t, Pins: pins, Sweep: sweep}, err
}

// Close closes the network namespace. The pins hold nothing open.
func (o *Opened) Close() { o.NS.Close() }

// Command returns a command line that runs dispatcher on the target, for hints.
func (t Target) Command(flags kernel.Flags, args ...string) string {
	return kernel.Command(t.NetNS, t.BPFFS, flags, args...)
}

// CommandByLink is Command for a verb that names a link. Links have ids of their
// own, so the command line names no namespace.
func (t Target) CommandByLink(verb string, id uint32, flags ...string) string {
	return kernel.Command("", t.BPFFS, append(kernel.Flags{"--link", strconv.FormatUint(uint64(id), 10)}, flags...), verb)
}

// NoBPFFS returns the refusal to pin where there is no bpffs: fs.ErrNotExist.
func (o *Opened) NoBPFFS() error {
	return hook.Because(fs.ErrNotExist, "a persistent member is pinned, and there is no bpffs at %s", o.BPFFS).
		Hint("%s", kernel.MountHint(o.BPFFS))
}

// Locked runs fn with the lock of the pins held, after it removed what dead
// processes left behind. Without pins fn gets nil. fn must not wait.
func (o *Opened) Locked(ctx context.Context, fn func(*state.Locked) error) error {
	return o.LockedAsking(ctx, nil, fn)
}

// LockedAsking is Locked for a change that who has the lock may make as well: while this
// process waits, others know what ask returns. Then fn finds that it is done; it gets nil if
// no pins are to be made or removed.
func (o *Opened) LockedAsking(ctx context.Context, ask func() *state.Ask, fn func(*state.Locked) error) error {
	if o.Pins == nil {
		return fn(nil)
	}
	l, err := o.Pins.Lock(ctx, ask)
	if err != nil {
		return err
	}
	if l == nil {
		return fn(nil)
	}
	defer l.Unlock()
	if l.Alone && o.Sweep != nil {
		o.Sweep(l)
	}
	return fn(l)
}

// Change is Locked, again while fn returns kernel.ErrAgain.
func (o *Opened) Change(ctx context.Context, fn func(*state.Locked) error) error {
	return kernel.Retry(ctx, func() error { return o.Locked(ctx, fn) })
}
