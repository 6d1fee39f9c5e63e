package target

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
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
	Program(ctx context.Context) (*ebpf.Program, error)
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

// Keep stores prog as the handle's loaded program and closes the old one. If the
// handle was closed meanwhile, Keep closes prog instead.
func (h *Base) Keep(prog *load.Loaded) {
	if h.Locked(func() error { h.Swap(prog); return nil }) != nil {
		prog.Close()
	}
}

// Swap is Keep for a caller that has the handle locked.
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
