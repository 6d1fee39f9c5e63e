package links

import (
	"context"
	"errors"
	"io/fs"
	"maps"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// A handle owns a member by its link.
type handle struct {
	target.Base
	link kernel.RawLink
	id   uint32
	rec  state.Record // the last known record
	made bool         // the handle made its present link, and did not open it
	// records are of the program with the id recordsOf; nil for a handle that was opened.
	// To open them by id takes more rights.
	records   state.Records
	recordsOf uint32
}

// hold takes over the records of the member's program.
func (h *handle) hold(prog *ebpf.Program, records state.Records) {
	h.records.Close()
	h.records, h.recordsOf = records, kernel.ProgramID(prog)
}

// newHandle makes a handle to the link, and takes over the link, on an error too.
func newHandle(o *target.Opened, link kernel.RawLink, rec *state.Record) (*handle, error) {
	info, err := kernel.LinkInfoOf(link)
	if err != nil {
		link.Close()
		return nil, err
	}
	return &handle{Base: target.Base{Opened: o}, link: link, id: info.ID, rec: *rec}, nil
}

func (h *handle) folder() string { return state.LinkFolder(h.Opened.Hook, h.id) }

// Close gives up ownership of the member.
func (h *handle) Close() error {
	return h.Release(func() error {
		h.records.Close()
		return h.link.Close()
	})
}

// current is the member as the kernel knows it now.
type current struct {
	names *Names
	info  *kernel.LinkInfo
	rec   *state.Record // never nil: where there is none it is the last known record
}

// do runs fn with the member as it is now.
func (h *handle) do(fn func(g *current) error) error {
	if h.Left {
		return target.ErrDetached
	}
	names := OpenNames(h.Opened)
	defer names.Close()
	info, err := kernel.LinkInfoOf(h.link)
	if err != nil {
		return err
	}
	if info.Gone() {
		if info, err = h.follow(names); err != nil {
			return err
		}
	}
	rec, err := names.Record(info)
	if err != nil {
		return err
	}
	if info.Program, err = names.resolve(info.Program); err != nil {
		return err
	}
	if rec != nil {
		h.rec = *rec
	}
	return fn(&current{names, info, &h.rec})
}

// follow replaces the handle's link, which is gone, by the link to which the member was
// moved. The error is target.ErrGone when there is none: the target is gone, or the
// member was detached.
func (h *handle) follow(names *Names) (*kernel.LinkInfo, error) {
	if h.rec.Member == 0 {
		return nil, target.ErrGone
	}
	links, err := kernel.AllLinks()
	if err != nil {
		return nil, err
	}
	for _, li := range links {
		if li.Attach != kernel.KindOf(h.Opened.Hook).Attach || li.Gone() {
			continue
		}
		rec, err := names.Record(&li)
		if errors.Is(err, kernel.ErrAgain) {
			continue // gone meanwhile
		}
		if err != nil {
			return nil, err
		}
		if rec == nil || rec.Member != h.rec.Member {
			continue
		}
		next, err := kernel.OpenLink(li.ID)
		if err != nil {
			return nil, kernel.Again(err)
		}
		h.link.Close()
		h.link, h.id = next, li.ID
		return &li, nil
	}
	return nil, target.ErrGone
}

// change is Change with the member as it is now.
func (h *handle) change(ctx context.Context, fn func(l *state.Locked, g *current) error) error {
	return h.Change(ctx, func(l *state.Locked) error {
		return h.do(func(g *current) error { return fn(l, g) })
	})
}

// withCurrent is change without the lock of the pins.
func (h *handle) withCurrent(ctx context.Context, fn func(g *current) error) error {
	return h.Look(ctx, func() error { return h.do(fn) })
}

// Update replaces the program.
func (h *handle) Update(ctx context.Context, src load.Source) error {
	return h.Replace(ctx, h, src, nil, func(prog *load.Loaded) (used bool, err error) {
		err = h.change(ctx, func(l *state.Locked, g *current) error {
			replaced, err := h.Program(g.info.Program, "the program to be replaced")
			if err != nil {
				return err
			}
			defer replaced.Close()
			old := replaced.Program
			records, err := g.names.put(prog.Program, h.id, g.rec)
			if err != nil {
				return err
			}
			kernel.Step("replace: before")
			if err := updateLink(h.link, prog.Program, old); err != nil {
				records.Close()
				if errors.Is(err, fs.ErrExist) {
					return (&opened{Opened: h.Opened}).twice(prog.Program)
				}
				return err
			}
			used = true
			h.hold(prog.Program, records)
			kernel.Step("replace: after")
			if kernel.ProgramID(prog.Program) != g.info.Program {
				if err := g.names.Forget(g.info); err != nil {
					return err
				}
			}
			return l.SetMaps(h.folder(), g.rec.Name, withRecords(prog.Maps, records))
		})
		return used, err
	})
}

// Pin makes the member persistent, and returns the path of its pin.
func (h *handle) Pin(ctx context.Context) (path string, err error) {
	err = h.change(ctx, func(l *state.Locked, g *current) error {
		switch {
		case l == nil:
			return h.Opened.NoBPFFS()
		case g.rec.Name == "":
			return hook.Because(hook.ErrUsage, "link %d has no name that it could be pinned under", h.id).
				Hint("\"%s\" gives it one, and pins it", h.Opened.CommandByLink("adopt", h.id))
		}
		path = l.HeldPath(h.folder(), g.rec.Name)
		if l.Has(h.folder(), g.rec.Name) {
			return nil
		}
		var loaded map[string]*ebpf.Map
		if h.Loaded != nil {
			loaded = h.Loaded.Maps
		}
		return h.pin(l, loaded)
	})
	return path, err
}

func (h *handle) pin(l *state.Locked, loaded map[string]*ebpf.Map) error {
	twin, err := kernel.Twin(h.link)
	if err != nil {
		return err
	}
	defer twin.Close()
	records, err := h.openRecords()
	if err != nil && !errors.Is(err, hook.ErrPermission) {
		return err
	}
	defer records.Close()
	return l.Add(h.folder(), nil, state.MemberPins{Name: h.rec.Name, Link: twin, Maps: withRecords(loaded, records)})
}

// openRecords opens the records of the program that the link runs.
func (h *handle) openRecords() (state.Records, error) {
	info, err := kernel.LinkInfoOf(h.link)
	if err != nil {
		return nil, err
	}
	if h.recordsOf == info.Program {
		return h.records.Clone()
	}
	prog, err := h.Program(info.Program, "the member's program")
	if err != nil {
		return nil, err
	}
	defer prog.Close()
	return state.RecordsOf(prog.Program)
}

// withRecords adds the records to the maps that are pinned with a member. By the pin they are
// found without the right to open objects by id, and when the link's holder puts another
// program into the link.
func withRecords(pinned map[string]*ebpf.Map, records state.Records) map[string]*ebpf.Map {
	all := map[string]*ebpf.Map{}
	maps.Copy(all, pinned)
	if len(records) > 0 {
		all[state.RecordsName] = records[0]
	}
	return all
}

// Unpin removes the member's pins.
func (h *handle) Unpin(ctx context.Context) error {
	return h.change(ctx, func(l *state.Locked, g *current) error {
		if l == nil {
			return nil
		}
		return l.RemoveChain(h.folder())
	})
}

// Detach takes the member out and removes its pins. A member that is gone already is
// no error; its pins are removed all the same.
func (h *handle) Detach(ctx context.Context) error {
	err := h.change(ctx, func(l *state.Locked, g *current) error {
		return leave(l, g.names, h.Opened.Hook, h.id, h.link)
	})
	if err != nil && !target.Gone(err) {
		return err
	}
	return h.Leave(func() error {
		if err == nil {
			return nil
		}
		return h.Opened.Locked(ctx, func(l *state.Locked) error {
			names := OpenNames(h.Opened)
			defer names.Close()
			return leave(l, names, h.Opened.Hook, h.id, h.link)
		})
	})
}

// Info describes the member.
func (h *handle) Info(ctx context.Context) (m *hook.Member, err error) {
	err = h.withCurrent(ctx, func(g *current) error {
		_, pinned, err := g.names.pin(h.Opened.Hook, h.id)
		if err != nil {
			return err
		}
		m = new(viewEntry(entry{Entry: target.Entry{Program: g.info.Program, Link: h.id, Name: g.rec.Name}, rec: g.rec, pinned: pinned}))
		return nil
	})
	return m, err
}

// Chain describes what is on the member's hook, also where the device has moved.
func (h *handle) Chain(ctx context.Context) (c *hook.Chain, err error) {
	err = h.withCurrent(ctx, func(g *current) error {
		op, err := h.open(g.info, g.names)
		if err != nil {
			return err
		}
		defer op.close()
		c, err = op.read()
		return err
	})
	return c, err
}
