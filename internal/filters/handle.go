package filters

import (
	"context"
	"errors"
	"io/fs"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// A handle refers to a member on a clsact hook, by its device and name.
type handle struct {
	target.Base
	name  string
	index int // of the device; the device's name may have changed
}

// byIndex finds the device of the member.
func (h *handle) byIndex(conn *rtnl.Conn) (*rtnl.Device, error) {
	d, err := conn.DeviceByIndex(h.index)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, hook.Because(hook.ErrDefunct, "the device is gone, or in another network namespace: %w", err)
	}
	return d, err
}

// with runs fn with the side as it is now, and the index of the member. on is onSide, or
// changeSide for a change.
func (h *handle) with(ctx context.Context, on func(context.Context, *target.Opened, finder, func(*rtnl.Conn, *side) error) error, fn func(conn *rtnl.Conn, sd *side, i int) error) error {
	return h.Locked(func() error {
		return on(ctx, h.Opened, h.byIndex, func(conn *rtnl.Conn, sd *side) error {
			i, err := sd.list.Find(hook.Ref(h.name))
			if err != nil {
				return target.ErrDetached
			}
			return fn(conn, sd, i)
		})
	})
}

// Update replaces the program, atomically for packets.
func (h *handle) Update(ctx context.Context, src load.Source) error {
	return h.Replace(ctx, h, src, nil, func(prog *load.Loaded) (used bool, err error) {
		err = h.with(ctx, changeSide, func(conn *rtnl.Conn, sd *side, i int) error {
			kernel.Step("replace: before")
			err := conn.ReplaceFilter(sd.dev.Index, sd.list[i].Filter.Filter, prog.Program.FD(), sd.list[i].Filter.Name)
			kernel.Step("replace: after")
			return kernel.Again(err)
		})
		return err == nil, err
	})
}

// Set changes the priority, and moves the member where the priority requires it.
func (h *handle) Set(ctx context.Context, settings hook.Settings) error {
	return target.Mover(h.place).Set(ctx, h.Opened.Hook, settings)
}

// Move moves the member to another place in the order.
func (h *handle) Move(ctx context.Context, to hook.Position) error {
	return target.Mover(h.place).Move(ctx, to)
}

// place moves the member. A filter with another preference is another filter, so for
// a moment the program is in both places, and packets meet it twice.
func (h *handle) place(ctx context.Context, to hook.Position, priority int) error {
	return h.with(ctx, changeSide, func(conn *rtnl.Conn, sd *side, i int) error {
		e := sd.list[i]
		loaded, err := h.Program(e.Entry.Program, "the member's program")
		if err != nil {
			return err
		}
		defer loaded.Close()
		prog := loaded.Program
		j, priority, err := sd.list.Move(i, to, priority)
		if err != nil {
			return err
		}
		lb := label{e.Entry.Name, e.owner, priority}
		if j == i {
			return kernel.Again(conn.ReplaceFilter(sd.dev.Index, e.Filter.Filter, prog.FD(), lb.String()))
		}
		kernel.Step("move: before")
		if err := sd.without(i).put(conn, j, prog, lb); err != nil {
			return err
		}
		kernel.Step("move: at both places")
		return sd.delete(conn, e)
	})
}

// Pin checks that the member is there, and changes nothing: a filter stays anyway, and
// has no pin.
func (h *handle) Pin(ctx context.Context) (path string, err error) {
	return "", h.with(ctx, onSide, func(*rtnl.Conn, *side, int) error { return nil })
}

// Unpin returns ErrUsage: a filter stays until it is detached.
func (h *handle) Unpin(context.Context) error {
	return hook.Because(hook.ErrUsage, "a filter of tc belongs to nobody: it stays until it is detached")
}

// Detach removes the filter. A member that is gone already is no error.
func (h *handle) Detach(ctx context.Context) error {
	err := h.with(ctx, changeSide, func(conn *rtnl.Conn, sd *side, i int) error {
		return conn.DeleteFilter(sd.dev.Index, sd.list[i].Filter.Filter)
	})
	if target.Gone(err) {
		return nil
	}
	return err
}

// Info describes the member.
func (h *handle) Info(ctx context.Context) (m *hook.Member, err error) {
	err = h.with(ctx, onSide, func(_ *rtnl.Conn, sd *side, i int) error {
		m = new(sd.list[i].view())
		return nil
	})
	return m, err
}

// Chain describes what is on the hook.
func (h *handle) Chain(ctx context.Context) (c *hook.Chain, err error) {
	err = h.with(ctx, onSide, func(_ *rtnl.Conn, sd *side, _ int) error {
		c = sd.view()
		return nil
	})
	return c, err
}
