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

// A Handle owns a member: the member stays while one is open. The methods are
// those of dispatcher.Link.
type Handle interface {
	Update(ctx context.Context, src load.Source) error
	Set(ctx context.Context, settings hook.Settings) error
	Move(ctx context.Context, to hook.Position) error
	Pin(ctx context.Context) error
	Unpin(ctx context.Context) error
	Detach(ctx context.Context) error
	Close() error
	Info(ctx context.Context) (*hook.Member, error)
	Chain(ctx context.Context) (*hook.Chain, error)
	Program() (*ebpf.Program, error)
}

// A Base is what all handles have in common. It is the whole handle of a member that
// belongs to nobody, which stays when the handle is closed.
type Base struct {
	mu     sync.Mutex
	Opened *Opened
	Loaded *load.Loaded // nil when the handle was opened
	closed bool
}

// Close releases what was loaded for the member.
func (h *Base) Close() error { return h.Release(func() error { return nil }) }

// Release closes the handle with what release lets go of; once.
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

// Locked runs fn with the handle locked. os.ErrClosed after Close.
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

// Keep keeps what was loaded in place of what was loaded before. A handle that was
// closed meanwhile keeps nothing.
func (h *Base) Keep(prog *load.Loaded) {
	if h.Locked(func() error { h.Swap(prog); return nil }) != nil {
		prog.Close()
	}
}

// Swap is Keep for one who has the handle locked.
func (h *Base) Swap(prog *load.Loaded) {
	if h.Loaded != nil {
		h.Loaded.Close()
	}
	h.Loaded = prog
}

// Gone tells an error of an object that is not there any more. That of a race that
// was lost does not say so, though it may be about an object that has gone.
func Gone(err error) bool {
	return (errors.Is(err, hook.ErrDefunct) || errors.Is(err, fs.ErrNotExist)) && !errors.Is(err, kernel.ErrAgain)
}

// ErrGone: the target of a member is gone.
var ErrGone = hook.Because(hook.ErrDefunct, "the device is gone, or the chain was taken off it")

// ErrDetached: the member is gone, and its target is there.
var ErrDetached = hook.Because(fs.ErrNotExist, "the member is gone: it was detached")
