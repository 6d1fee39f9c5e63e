package attach

import (
	"context"
	"errors"
	"io/fs"
	"slices"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/state"
)

// Set changes the priority, and the place with it where need be.
func (h *linkHandle) Set(ctx context.Context, settings hook.Settings) error {
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
func (h *linkHandle) Move(ctx context.Context, to hook.Position) error {
	if err := to.Check(); err != nil {
		return hook.Because(hook.ErrUsage, "%w", err)
	}
	if to.IsZero() {
		return nil
	}
	return h.place(ctx, to, 0)
}

func (h *linkHandle) place(ctx context.Context, to hook.Position, priority int) error {
	return h.change(ctx, func(l *state.Locked, g *grip) error {
		if g.rec.Name == "" {
			return hook.Because(hook.ErrUsage, "link %d is not a member: it has no priority, and its place is up to whoever holds it", h.id)
		}
		sp, err := h.spot(g.info)
		if err != nil {
			return err
		}
		defer sp.close()
		list, err := sp.list(g.names, nil)
		if err != nil {
			return err
		}
		i := list.withLink(h.id)
		if i < 0 {
			return kernel.ErrAgain
		}
		rec := *g.rec
		rec.Attach, rec.MovedTo, rec.MovedFrom, rec.LastSeen = g.info.Attach, 0, 0, sp.home()
		if to.IsZero() && dispatch.Stays(list.ranks(), i, priority) {
			rec.Priority = priority
			return h.record(g, &rec)
		}
		others := list.without(i)
		j, priority, err := dispatch.Settle(others.ranks(), to, others.find, priority, hook.DefaultPriority)
		if err != nil {
			return err
		}
		rec.Priority = priority
		if j == i {
			return h.record(g, &rec)
		}
		if !h.made && !list.entries[i].pinned {
			return hook.Because(hook.ErrBusy, "the kernel cannot move a link, only its owner can put a new one in its place: member %q is not pinned, and this Link has not attached it", g.rec.Name).
				Hint("have its owner do it, or pin it first")
		}
		if _, err := sp.anchor(others, j); err != nil {
			return err
		}
		return h.relocate(l, g, sp, list, i, j, &rec)
	})
}

// record writes what is known about the member.
func (h *linkHandle) record(g *grip, rec *state.Record) error {
	if err := g.names.reg.Put(h.id, rec); err != nil {
		return err
	}
	h.rec = *rec
	return nil
}

// relocate puts a new link at index j of the others and lets the present one go.
func (h *linkHandle) relocate(l *state.Locked, g *grip, sp *spot, list *listing, i, j int, rec *state.Record) error {
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(g.info.Program))
	if err != nil {
		return kernel.Again(kernel.Errno("the member's program", err))
	}
	defer prog.Close()
	oldID := h.id
	create := func(p *ebpf.Program) (rawLink, error) {
		now, err := sp.list(g.names, nil)
		if err != nil {
			return nil, err
		}
		if !sameLinks(list, now) {
			return nil, kernel.ErrAgain
		}
		if j > i { // the old one is still there, before the new place
			j++
		}
		at, err := sp.anchor(now, j)
		if err != nil {
			return nil, err
		}
		return sp.create(p, at, now)
	}
	keep := func(link rawLink) error {
		info, err := describeLink(link)
		if err != nil {
			return err
		}
		rec.MovedFrom = oldID
		if err := g.names.reg.Put(info.ID, rec); err != nil {
			return err
		}
		if list.entries[i].pinned {
			twin, err := openLink(info.ID) // what is pinned must not be the handle's own: it would be moved with its pin
			if err != nil {
				return err
			}
			defer twin.Close()
			if err := l.Succeed(h.folder(), state.LinkFolder(h.site.Hook, info.ID), rec.Name, twin); err != nil {
				return err
			}
		}
		left := *g.rec
		left.Attach, left.Priority = g.info.Attach, rec.Priority // it may have had no record
		return g.names.reg.Moved(oldID, info.ID, &left)
	}
	link, err := sp.takePlace(l, oldLink{h.link, oldID}, prog, j < i, create, keep)
	if link == nil {
		return err
	}
	// From here on the new link is the member, whatever else went wrong.
	info, infoErr := describeLink(link)
	if infoErr != nil {
		return kernel.Join(err, infoErr)
	}
	h.link.Close()
	h.link, h.id, h.rec, h.made = link, info.ID, *rec, true
	if l != nil {
		err = kernel.Join(err, l.RemoveChain(state.LinkFolder(h.site.Hook, oldID)))
	}
	return err
}

// sameLinks tells whether two listings have the same entries at the same places.
func sameLinks(a, b *listing) bool {
	if len(a.entries) != len(b.entries) {
		return false
	}
	for i := range a.entries {
		if a.entries[i].link != b.entries[i].link {
			return false
		}
	}
	return true
}

// spot opens the place where the link is by now.
func (h *linkHandle) spot(info *LinkInfo) (*spot, error) {
	sp := &spot{hook: h.site.Hook, kind: kernel.KindOf(h.site.Hook), asked: h.site.Place}
	if sp.hook.OnCgroup() {
		var err error
		if sp.cgroup, err = kernel.OpenCgroupID(info.CgroupID, h.site.Target); errors.Is(err, fs.ErrNotExist) {
			// The kernel takes up to half a second to say so of the link.
			err = hook.Because(hook.ErrDefunct, "%w", err)
		}
		return sp, err
	}
	here := func(ns *kernel.NetNS) error {
		return ns.Do(func() error {
			_, err := queryAround(info)
			if err == nil {
				sp.name, err = deviceName(info.Ifindex)
			}
			return err
		})
	}
	sp.index = info.Ifindex
	switch err := here(h.site.ns); {
	case err == nil:
		sp.ns = h.site.ns
		return sp, nil
	case !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, kernel.ErrNetNSGone):
		return nil, err
	}
	ns, err := kernel.FindNetNS(here)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, hook.Because(fs.ErrNotExist, "the device of link %d is in a network namespace that cannot be found", h.id)
	}
	if err != nil {
		return nil, err
	}
	sp.ns, sp.owned = ns, true
	return sp, nil
}

// queryAround queries the hook that a link is on, if its device is in the namespace
// of the thread: else fs.ErrNotExist.
func queryAround(info *LinkInfo) (*kernel.Query, error) {
	q, err := kernel.QueryPrograms(info.Ifindex, info.Attach, 0)
	if errors.Is(err, unix.ENODEV) || err == nil && !slices.Contains(q.Links, info.ID) {
		return nil, fs.ErrNotExist
	}
	return q, kernel.Errno("query the hook of the link", err)
}
