package interop

import (
	"context"
	"errors"
	"io/fs"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/chains"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/target"
	"github.com/libdispatcher/dispatcher/libxdp"
)

// A handle refers to a member of a chain of libxdp, by the id of the member's program.
type handle struct {
	target.Base
	id uint32
}

// do runs fn with the device and the member's reference. It returns ErrDetached when
// the member is not on the device.
func (h *handle) do(fn func(d libxdp.Device, ref hook.Ref) error) error {
	return h.Locked(func() error {
		err := Cause(fn(deviceOf(h.Opened).libxdp(), hook.ProgramRef(h.id)))
		switch {
		case errors.Is(err, kernel.ErrNetNSGone):
			return err
		case errors.Is(err, libxdp.ErrNotDispatcher), errors.Is(err, chains.ErrStyle), errors.Is(err, fs.ErrNotExist):
			return target.ErrDetached
		}
		return err
	})
}

// Update replaces the program. As every change of such a chain does, it makes a new
// dispatcher.
func (h *handle) Update(ctx context.Context, src load.Source) error {
	return h.do(func(d libxdp.Device, ref hook.Ref) error {
		src, about, err := load.Describe(load.PinningIn(src, h.Opened.BPFFS))
		if err != nil {
			return err
		}
		c := &component{src: src, about: about, old: h.id, bpffs: h.Opened.BPFFS, begins: h.Opened.Begins}
		if err := d.Replace(ctx, ref, c); err != nil {
			c.Close()
			return err
		}
		h.id = c.id
		h.Swap(c.loaded)
		return nil
	})
}

// Set changes the priority and the continue set.
func (h *handle) Set(ctx context.Context, settings hook.Settings) error {
	if err := kernel.Join(settings.Check(), noSlots(settings)); err != nil {
		return hook.Because(hook.ErrUsage, "%w", err)
	}
	return h.do(func(d libxdp.Device, ref hook.Ref) error { return d.Set(ctx, ref, settings) })
}

// Move is refused: libxdp orders members by priority.
func (h *handle) Move(_ context.Context, to hook.Position) error {
	if to.IsZero() {
		return nil
	}
	return byPriorityOnly()
}

// Pin changes nothing: members of such a chain are always pinned, by libxdp's paths.
func (h *handle) Pin(ctx context.Context) (path string, err error) {
	_, err = h.Info(ctx)
	return "", err
}

// Unpin is refused: members of such a chain are always pinned.
func (h *handle) Unpin(context.Context) error {
	return hook.Because(hook.ErrUsage, "nobody owns a member of a chain of libxdp: it stays until it is detached")
}

// Detach takes the member out.
func (h *handle) Detach(ctx context.Context) error {
	err := h.do(func(d libxdp.Device, ref hook.Ref) error { return d.Detach(ctx, ref) })
	if target.Gone(err) {
		return nil
	}
	return err
}

// Info describes the member.
func (h *handle) Info(ctx context.Context) (*hook.Member, error) {
	c, err := h.Chain(ctx)
	if err != nil {
		return nil, err
	}
	for i := range c.Members {
		if c.Members[i].Program.ID == h.id {
			return &c.Members[i], nil
		}
	}
	return nil, target.ErrDetached
}

// Chain describes the chain on the device.
func (h *handle) Chain(ctx context.Context) (c *hook.Chain, err error) {
	err = h.do(func(libxdp.Device, hook.Ref) error {
		return kernel.Retry(ctx, func() error {
			c, err = Family{}.Read(h.Opened)
			if errors.Is(err, chains.ErrStyle) { // libxdp's dispatcher has gone
				c, err = chains.Family{}.Read(h.Opened)
			}
			return err
		})
	})
	return c, err
}
