package attach

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
)

// unowned is the handle of a member that belongs to nobody: it stays when the
// handle is closed.
type unowned struct {
	mu     sync.Mutex
	site   *site
	loaded *load.Loaded // nil when the handle was opened
	closed bool
}

// Close releases what was loaded for the member.
func (h *unowned) Close() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return nil
	}
	h.closed = true
	if h.loaded != nil {
		h.loaded.Close()
	}
	h.site.close()
	return nil
}

// locked runs fn with the handle locked.
func (h *unowned) locked(fn func() error) error {
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
