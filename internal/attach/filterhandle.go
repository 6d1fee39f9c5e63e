package attach

import (
	"context"
	"errors"
	"io/fs"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
)

// A filterHandle refers to a member on a clsact hook, by its device and name.
type filterHandle struct {
	unowned
	name  string
	index int // of the device, which may have another name by now
}

// byIndex finds the device of the member.
func (h *filterHandle) byIndex(conn *rtnl.Conn) (*rtnl.Device, error) {
	d, err := conn.DeviceByIndex(h.index)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, hook.Because(hook.ErrDefunct, "the device is gone, or in another network namespace: %w", err)
	}
	return d, err
}

type onLane func(ctx context.Context, find func(*rtnl.Conn) (*rtnl.Device, error), fn func(conn *rtnl.Conn, ln *lane) error) error

// look runs fn with the lane as it is and the index of the member.
func (h *filterHandle) look(ctx context.Context, fn func(conn *rtnl.Conn, ln *lane, i int) error) error {
	return h.do(ctx, h.site.onLane, fn)
}

// change is look under the lock.
func (h *filterHandle) change(ctx context.Context, fn func(conn *rtnl.Conn, ln *lane, i int) error) error {
	return h.do(ctx, h.site.changeLane, fn)
}

func (h *filterHandle) do(ctx context.Context, on onLane, fn func(conn *rtnl.Conn, ln *lane, i int) error) error {
	return h.locked(func() error {
		return on(ctx, h.byIndex, func(conn *rtnl.Conn, ln *lane) error {
			i, err := ln.find(hook.Ref(h.name))
			if err != nil {
				return errDetached
			}
			return fn(conn, ln, i)
		})
	})
}

// Update exchanges the program, atomically for packets.
func (h *filterHandle) Update(ctx context.Context, src load.Source) error {
	src = load.PinningIn(src, h.site.BPFFS)
	var prog *load.Loaded
	err := h.look(ctx, func(_ *rtnl.Conn, ln *lane, i int) error {
		old, err := ebpf.NewProgramFromID(ebpf.ProgramID(ln.list[i].Program))
		if err != nil {
			return kernel.Again(kernel.Errno("the program to be replaced", err))
		}
		defer old.Close()
		from, release, err := load.Inherit(src, old)
		if err != nil {
			return err
		}
		defer release()
		prog, err = from.Load(load.Want{Hook: h.site.Hook})
		return err
	})
	if err != nil {
		return err
	}
	err = h.change(ctx, func(conn *rtnl.Conn, ln *lane, i int) error {
		kernel.Step("replace: before")
		err := conn.ReplaceFilter(ln.dev.Index, ln.list[i].Filter.Filter, prog.Program.FD(), ln.list[i].Filter.Name)
		kernel.Step("replace: after")
		return kernel.Again(err)
	})
	if err != nil {
		prog.Discard()
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.loaded != nil {
		h.loaded.Close()
	}
	h.loaded = prog
	return nil
}

// Set changes the priority, and the place with it where need be.
func (h *filterHandle) Set(ctx context.Context, settings hook.Settings) error {
	for _, err := range []error{settings.Check(), settings.CheckFor(h.site.Hook)} {
		if err != nil {
			return hook.Because(hook.ErrUsage, "%w", err)
		}
	}
	if settings.Priority == 0 {
		return nil
	}
	return h.place(ctx, hook.Position{}, settings.Priority)
}

// Move gives the member another place.
func (h *filterHandle) Move(ctx context.Context, to hook.Position) error {
	if err := to.Check(); err != nil {
		return hook.Because(hook.ErrUsage, "%w", err)
	}
	if to.IsZero() {
		return nil
	}
	return h.place(ctx, to, 0)
}

// place moves the member: a filter with another preference is another filter,
// so for a moment the program is in both places, and packets meet it twice.
func (h *filterHandle) place(ctx context.Context, to hook.Position, priority int) error {
	return h.change(ctx, func(conn *rtnl.Conn, ln *lane, i int) error {
		e := ln.list[i]
		prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(e.Program))
		if err != nil {
			return kernel.Again(kernel.Errno("the member's program", err))
		}
		defer prog.Close()
		lb := e.label
		if to.IsZero() && dispatch.Stays(ln.ranks(), i, priority) {
			lb.Priority = priority
			return kernel.Again(conn.ReplaceFilter(ln.dev.Index, e.Filter.Filter, prog.FD(), lb.String()))
		}
		others := ln.without(i)
		j, priority, err := dispatch.Settle(others.ranks(), to, others.find, priority, hook.DefaultPriority)
		if err != nil {
			return err
		}
		lb.Priority = priority
		if j == i {
			return kernel.Again(conn.ReplaceFilter(ln.dev.Index, e.Filter.Filter, prog.FD(), lb.String()))
		}
		kernel.Step("move: before")
		if err := others.put(conn, j, prog, lb); err != nil {
			return err
		}
		kernel.Step("move: at both places")
		if err := conn.DeleteFilter(ln.dev.Index, e.Filter.Filter); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	})
}

// Pin does nothing: a filter stays anyway.
func (h *filterHandle) Pin(ctx context.Context) error {
	return h.look(ctx, func(*rtnl.Conn, *lane, int) error { return nil })
}

// Unpin is refused.
func (h *filterHandle) Unpin(context.Context) error {
	return hook.Because(hook.ErrUsage, "a filter of tc belongs to nobody: it stays until it is detached")
}

// Detach removes the filter.
func (h *filterHandle) Detach(ctx context.Context) error {
	err := h.change(ctx, func(conn *rtnl.Conn, ln *lane, i int) error {
		return conn.DeleteFilter(ln.dev.Index, ln.list[i].Filter.Filter)
	})
	if gone(err) {
		return nil
	}
	return err
}

// Info describes the member.
func (h *filterHandle) Info(ctx context.Context) (*hook.Member, error) {
	var m hook.Member
	err := h.look(ctx, func(_ *rtnl.Conn, ln *lane, i int) error {
		m = ln.list[i].view()
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &m, nil
}

// Chain describes what is on the hook.
func (h *filterHandle) Chain(ctx context.Context) (c *hook.Chain, err error) {
	err = h.look(ctx, func(_ *rtnl.Conn, ln *lane, _ int) error {
		c = ln.view()
		return nil
	})
	return c, err
}

// Program opens the member's program.
func (h *filterHandle) Program() (prog *ebpf.Program, err error) {
	err = h.look(context.Background(), func(_ *rtnl.Conn, ln *lane, i int) error {
		prog, err = ebpf.NewProgramFromID(ebpf.ProgramID(ln.list[i].Program))
		return kernel.Again(kernel.Errno("the member's program", err))
	})
	return prog, err
}
