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

// A Place is where to attach: a hook of a device or a cgroup, and the bpffs to
// pin in.
type Target struct {
	Hook  hook.Hook
	Name  string
	NetNS string
	BPFFS string
}

// An Opened is a target that was opened.
type Opened struct {
	Target
	NS    *kernel.NetNS
	Pins  *state.Pins // nil where there is no bpffs
	Sweep func(*state.Locked)
	Links []kernel.LinkInfo // known from before; may be nil
}

// open opens a target. sweep removes what dead processes left behind in the pins.
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

// openPins opens the pins only. fs.ErrNotExist when there is no bpffs: without one
// the target is open all the same.
func OpenPins(t Target, sweep func(*state.Locked)) (*Opened, error) {
	pins, err := state.OpenPins(t.BPFFS)
	return &Opened{Target: t, Pins: pins, Sweep: sweep}, err
}

func (o *Opened) Close() { o.NS.Close() }

// Command is a line that runs the dispatcher command on the target, for hints.
func (t Target) Command(args ...string) string { return kernel.Command(t.NetNS, t.BPFFS, args...) }

// CommandByLink is Command for a verb about a link, which is in no namespace.
func (t Target) CommandByLink(verb string, id uint32, args ...string) string {
	words := []string{verb, "--link", strconv.FormatUint(uint64(id), 10)}
	return kernel.Command("", t.BPFFS, append(words, args...)...)
}

// noBPFFS is the refusal to pin where that is not possible.
func (o *Opened) NoBPFFS() error {
	return hook.Because(fs.ErrNotExist, "a persistent member is pinned, and there is no bpffs at %s", o.BPFFS).
		Hint("mount one with \"%s\"", kernel.MountCommand(o.BPFFS))
}

// locked runs fn with the lock of the pins, where there are any, and with what
// dead processes left behind removed. fn must not wait.
func (o *Opened) Locked(ctx context.Context, fn func(*state.Locked) error) error {
	if o.Pins == nil {
		return fn(nil)
	}
	l, err := o.Pins.Lock(ctx)
	if err != nil {
		return err
	}
	defer l.Unlock()
	if l.Alone && o.Sweep != nil {
		o.Sweep(l)
	}
	return fn(l)
}
