package target

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"time"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/state"
)

// A Handle owns a member: the member stays while a handle to it is open.
// dispatcher.Link has the same methods and documents them.
type Handle interface {
	Update(ctx context.Context, src load.Source) error
	Set(ctx context.Context, settings hook.Settings) error
	Move(ctx context.Context, to hook.Position) error
	Pin(ctx context.Context) (path string, err error)
	Unpin(ctx context.Context) error
	Detach(ctx context.Context) error
	Close() error
	Info(ctx context.Context) (*hook.Member, error)
	Chain(ctx context.Context) (*hook.Chain, error)
	// Changes listens for changes by others; nil where none can be heard.
	Changes() *state.Changes
	// ReleaseNetNS lets the target's network namespace go away while the handle is open.
	ReleaseNetNS()
	// OpenProgram opens a program by its id, see [Base.OpenProgram].
	OpenProgram(id uint32, what string) (*load.Loaded, error)
}

// lookAgain is how often a member is looked at that nothing is heard of. The kernel says
// nothing when a link is detached, so this finds what tools detach that give no sign.
const lookAgain = time.Second

// Wait waits until the member is gone, and returns why: fs.ErrNotExist, ErrDefunct, or
// os.ErrClosed when the handle was closed. It returns the error of ctx when that ends.
func Wait(ctx context.Context, h Handle) error {
	changes := h.Changes() // before the first look
	defer changes.Close()
	for {
		if _, err := h.Info(ctx); Gone(err) || errors.Is(err, os.ErrClosed) {
			return err
		}
		if err := changes.Wait(ctx, lookAgain); err != nil {
			return err
		}
	}
}

// Program opens the member's program; the caller closes it.
func Program(ctx context.Context, h Handle) (prog *load.Loaded, err error) {
	err = kernel.Retry(ctx, func() error {
		m, err := h.Info(ctx)
		if err != nil {
			return err
		}
		if m.Program.ID == 0 {
			return hook.Because(fs.ErrNotExist, "the member has no program: its slot is empty")
		}
		prog, err = h.OpenProgram(m.Program.ID, "the member's program")
		return err
	})
	return prog, err
}

// Replace implements Update for the handle self, which embeds h: it loads the program that
// replaces the member's, in the given shape if shape is not nil, and runs put with it. put
// says whether the program is in its place, which it may be in spite of an error.
func (h *Base) Replace(ctx context.Context, self Handle, src load.Source, shape *dispatch.Shape, put func(*load.Loaded) (used bool, err error)) error {
	old, err := Program(ctx, self)
	if err != nil {
		return err
	}
	defer old.Close()
	prog, err := load.Successor(load.PinningIn(src, h.Opened.BPFFS), old, load.Want{Hook: h.Opened.Hook, Shape: shape, Begins: func() (hook.Begins, error) {
		// The target's name may be another device's by now.
		c, err := self.Chain(ctx)
		if err != nil {
			return "", err
		}
		if c.Target == "" {
			return "", hook.Because(hook.ErrDefunct, "the member's device cannot be found, so what its packets begin with is not known")
		}
		return c.Begins, nil
	}})
	if err != nil {
		return err
	}
	used, err := put(prog)
	if !used {
		prog.Discard()
		return err
	}
	kernel.Step("replace: to be kept")
	h.keep(prog)
	return err
}

// A Base is what all handles have in common. It alone is the handle of a member
// that has no owner: such a member stays when the handle is closed.
type Base struct {
	mu     sync.Mutex
	Opened *Opened
	Loaded *load.Loaded // nil when the handle was opened
	Left   bool         // the member was detached
	closed bool
}

// OpenProgram opens a program by its id; the caller closes it. The program that the handle
// has loaded it opens without the right to open objects by their ids.
func (h *Base) OpenProgram(id uint32, what string) (prog *load.Loaded, err error) {
	err = h.Locked(func() error {
		prog, err = h.Program(id, what)
		return err
	})
	return prog, err
}

// Program is OpenProgram for a caller that has the handle locked.
func (h *Base) Program(id uint32, what string) (*load.Loaded, error) {
	if h.Loaded != nil && kernel.ProgramID(h.Loaded.Program) == id {
		twin, err := h.Loaded.Twin()
		return twin, kernel.Errno(what, err)
	}
	prog, err := kernel.OpenProgram(id, what)
	if err != nil {
		return nil, err
	}
	return load.Own(prog), nil
}

// Close releases what was loaded for the member.
func (h *Base) Close() error { return h.Release(func() error { return nil }) }

// Release closes the handle: it calls release, then closes the loaded program and
// the opened target. A second call does nothing.
func (h *Base) Release(release func() error) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return nil
	}
	h.closed = true
	err := release()
	if h.Loaded != nil {
		h.Loaded.Close()
	}
	h.Opened.Close()
	return err
}

// Locked runs fn with the handle locked. The error is os.ErrClosed after Close, and
// ErrDefunct when the member's network namespace is gone.
func (h *Base) Locked(fn func() error) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return fmt.Errorf("the link: %w", os.ErrClosed)
	}
	err := fn()
	if errors.Is(err, kernel.ErrNetNSGone) {
		return hook.Because(hook.ErrDefunct, "%w", err)
	}
	return err
}

// Leave runs fn for a member that is off its hook, and notes that the member has left.
// It does nothing when that was noted before, or after Close.
func (h *Base) Leave(fn func() error) error {
	err := h.Locked(func() error {
		if h.Left {
			return nil
		}
		err := fn()
		h.Left = err == nil
		return err
	})
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}

// Changes listens for changes of the pins, which all changes end with.
func (h *Base) Changes() *state.Changes { return h.Opened.Pins.Changes() }

// ReleaseNetNS closes the network namespace; the handle opens it again to look at the hook.
func (h *Base) ReleaseNetNS() { h.Opened.NS.Release() }

// Look runs fn with the handle locked, again while fn returns kernel.ErrAgain.
func (h *Base) Look(ctx context.Context, fn func() error) error {
	return h.Locked(func() error { return kernel.Retry(ctx, fn) })
}

// Change runs fn with the handle's lock and the lock of the pins held. It tries again
// while fn returns kernel.ErrAgain.
func (h *Base) Change(ctx context.Context, fn func(*state.Locked) error) error {
	return h.Locked(func() error { return h.Opened.Change(ctx, fn) })
}

// keep stores prog as the handle's loaded program and closes the old one. If the
// handle was closed meanwhile, keep closes prog instead.
func (h *Base) keep(prog *load.Loaded) {
	if h.Locked(func() error { h.Swap(prog); return nil }) != nil {
		prog.Close()
	}
}

// Swap is keep for a caller that has the handle locked.
func (h *Base) Swap(prog *load.Loaded) {
	if h.Loaded != nil {
		h.Loaded.Close()
	}
	h.Loaded = prog
}

// Gone reports whether err says that an object does not exist any more. The error
// of a lost race does not count, though it may be about an object that is gone.
func Gone(err error) bool {
	return (errors.Is(err, hook.ErrDefunct) || errors.Is(err, fs.ErrNotExist)) && !errors.Is(err, kernel.ErrAgain)
}

// ErrGone says that the target of a member is gone.
var ErrGone = hook.Because(hook.ErrDefunct, "the device is gone, or the chain was taken off it")

// ErrDetached says that the member is gone while its target still exists.
var ErrDetached = hook.Because(fs.ErrNotExist, "the member is gone: it was detached")
