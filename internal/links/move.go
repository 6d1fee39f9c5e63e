package links

import (
	"context"
	"errors"
	"io/fs"
	"slices"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// Set changes the priority, and moves the member where the priority requires it.
func (h *handle) Set(ctx context.Context, settings hook.Settings) error {
	return target.Mover(h.place).Set(ctx, h.Opened.Hook, settings)
}

// Move moves the member to another place in the order.
func (h *handle) Move(ctx context.Context, to hook.Position) error {
	return target.Mover(h.place).Move(ctx, to)
}

func (h *handle) place(ctx context.Context, to hook.Position, priority int) error {
	return h.change(ctx, func(l *state.Locked, g *current) error {
		if g.rec.Name == "" {
			return hook.Because(hook.ErrUsage, "link %d is not a member: it has no priority, and its holder decides about its place", h.id)
		}
		return h.withOrder(g, func(op *opened, list *order) error {
			i := list.WithLink(h.id)
			if i < 0 {
				return kernel.ErrAgain
			}
			j, priority, err := list.Move(i, to, priority)
			if err != nil {
				return err
			}
			rec := *g.rec
			rec.Attach, rec.MovedFrom, rec.LastSeen, rec.Priority = g.info.Attach, 0, op.seen(), priority
			if rec.Member == 0 { // its holder has put another program into the link
				rec.Member = newMember()
			}
			if j == i {
				return h.record(g, &rec)
			}
			if !h.made && !list.Order[i].pinned {
				return hook.Because(hook.ErrBusy, "the kernel cannot move a link, only its owner can put a new one in its place: member %q is not pinned, and this Link has not attached it", g.rec.Name).
					Hint("have its owner do it, or pin it first")
			}
			others := &order{list.Without(i), list.revision, list.flags}
			if _, err := op.neighbor(others, j); err != nil {
				return err
			}
			return h.relocate(l, g, op, list, i, j, &rec)
		})
	})
}

// record writes the member's record.
func (h *handle) record(g *current, rec *state.Record) error {
	if h.recordsOf != g.info.Program {
		if err := h.keepRecords(g); err != nil {
			return err
		}
	}
	if err := h.records.Put(h.id, rec); err != nil {
		return err
	}
	h.rec = *rec
	return nil
}

// keepRecords opens the records of the member's program, or makes them. A process that may
// not open the program by its id opens the records by their pin.
func (h *handle) keepRecords(g *current) error {
	prog, err := h.Program(g.info.Program, "the member's program")
	if errors.Is(err, hook.ErrPermission) && g.rec.Name != "" && h.Opened.Pins != nil {
		pinned, pinErr := h.Opened.Pins.Records(h.folder(), g.rec.Name, false)
		if len(pinned) == 0 || pinErr != nil {
			return kernel.Join(err, pinErr)
		}
		h.records.Close()
		h.records, h.recordsOf = pinned, g.info.Program
		return nil
	}
	if err != nil {
		return err
	}
	defer prog.Close()
	records, err := g.names.keep(prog.Program)
	if err == nil {
		h.hold(prog.Program, records)
	}
	return err
}

// relocate makes a new link at index j among the other entries, and takes out the
// present link.
func (h *handle) relocate(l *state.Locked, g *current, op *opened, list *order, i, j int, rec *state.Record) error {
	loaded, err := h.Program(g.info.Program, "the member's program")
	if err != nil {
		return err
	}
	defer loaded.Close()
	prog, oldID := loaded.Program, h.id
	create := func(p *ebpf.Program) (kernel.RawLink, error) {
		now, err := op.list()
		if err != nil {
			return nil, err
		}
		if !sameLinks(list, now) {
			return nil, kernel.ErrAgain
		}
		if j > i { // the old link is still there, before the new place
			j++
		}
		at, err := op.neighbor(now, j)
		if err != nil {
			return nil, err
		}
		return op.create(p, at, now)
	}
	keep := func(link kernel.RawLink) error {
		info, err := kernel.LinkInfoOf(link)
		if err != nil {
			return err
		}
		rec.MovedFrom = oldID
		records, err := g.names.put(prog, info.ID, rec)
		if err != nil {
			return err
		}
		records.Close()
		if list.Order[i].pinned {
			twin, err := kernel.Twin(link) // pin a twin: the handle's own link would move with its pin
			if err != nil {
				return err
			}
			defer twin.Close()
			to := state.LinkFolder(h.Opened.Hook, info.ID)
			if err := l.Succeed(h.folder(), to, rec.Name, twin); err != nil {
				return kernel.Undo(err, l.RemoveChain(to))
			}
		}
		return nil
	}
	// A process that still has the old link open finds the new one by the member's number.
	release := func() error {
		was, err := kernel.LinkInfoOf(h.link)
		if err == nil {
			err = g.names.Forget(was)
		}
		if l != nil {
			err = kernel.Join(err, l.DropChain(h.folder()))
		}
		return err
	}
	link, err := op.takePlace(l, oldLink{h.link, oldID}, prog, j < i, create, keep, release)
	if link == nil {
		return err
	}
	// From here on the new link is the member, even if err is not nil.
	info, infoErr := kernel.LinkInfoOf(link)
	if infoErr != nil {
		return kernel.Join(err, infoErr)
	}
	h.link.Close()
	h.link, h.id, h.rec, h.made = link, info.ID, *rec, true
	return err
}

// sameLinks reports whether two orders have the same entries at the same places.
func sameLinks(a, b *order) bool {
	return slices.EqualFunc(a.Order, b.Order, func(x, y entry) bool { return x.Link == y.Link })
}

// withOrder runs fn with the order on the hook where the link is now.
func (h *handle) withOrder(g *current, fn func(op *opened, list *order) error) error {
	op, err := h.open(g.info, g.names)
	if err != nil {
		return err
	}
	defer op.close()
	return op.withOrder(fn)
}

// open finds the device or opens the cgroup where the link is now. The caller closes
// the result.
func (h *handle) open(info *kernel.LinkInfo, names *Names) (*opened, error) {
	op := &opened{Opened: h.Opened, names: names, kind: kernel.KindOf(h.Opened.Hook), held: info}
	if op.Hook.OnCgroup() {
		var err error
		if op.cgroup, err = kernel.OpenCgroupID(info.CgroupID, h.Opened.Name); errors.Is(err, fs.ErrNotExist) {
			// The cgroup is gone; the link may take half a second to show that.
			err = hook.Because(hook.ErrDefunct, "%w", err)
		}
		return op, err
	}
	here := func(ns *kernel.NetNS) error {
		return rtnl.In(ns, func(conn *rtnl.Conn) error {
			if _, err := queryAround(info); err != nil {
				return err
			}
			d, err := conn.DeviceByIndex(info.Ifindex)
			if err == nil {
				op.name, op.begins = d.Name, d.Begins()
			}
			return err
		})
	}
	op.index = info.Ifindex
	err := here(h.Opened.NS)
	if err == nil || !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, kernel.ErrNetNSGone) {
		return op, err
	}
	ns, err := kernel.FindNetNS(here)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, hook.Because(fs.ErrNotExist, "the device of link %d is in a network namespace that cannot be found", h.id)
	}
	if err != nil {
		return nil, err
	}
	there := *h.Opened
	there.NS = ns
	op.Opened, op.moved = &there, true
	return op, nil
}

// queryAround queries the hook on which a link is. The error is fs.ErrNotExist when the
// link's device is not in the namespace of the thread.
func queryAround(info *kernel.LinkInfo) (*kernel.Query, error) {
	q, err := kernel.QueryPrograms(info.Ifindex, info.Attach, 0)
	if errors.Is(err, unix.ENODEV) || err == nil && !slices.Contains(q.Links, info.ID) {
		return nil, fs.ErrNotExist
	}
	return q, kernel.Errno("query the hook of the link", err)
}
