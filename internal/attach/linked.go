package attach

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/state"
)

type attachType = ebpf.AttachType

func unsupported(err error) bool { return errors.Is(err, ebpf.ErrNotSupported) }

// linked is the family of the hooks where each member has a link of its own and
// the kernel keeps the order: TCX and cgroups.
type linked struct{}

func (linked) attach(ctx context.Context, s *site, src load.Source, req Request) (Handle, error) {
	prog, err := s.load(src)
	if err != nil {
		return nil, err
	}
	var h *linkHandle
	patience := untilLeft()
	err = kernel.Retry(ctx, func() error {
		return s.locked(ctx, func(l *state.Locked) (err error) {
			h, err = s.joinLinks(l, prog, req)
			return patience(err)
		})
	})
	if err != nil {
		prog.Discard()
		return nil, err
	}
	h.loaded = prog
	h.site.ns.Release()
	return h, nil
}

// load loads a program for the hook, if this kernel has that, and the target.
func (s *site) load(src load.Source) (*load.Loaded, error) {
	sp, err := s.spot()
	if err != nil {
		return nil, err
	}
	defer sp.close()
	if _, err := sp.query(0); err != nil {
		return nil, err
	}
	return load.PinningIn(src, s.BPFFS).Load(load.Want{Hook: s.Hook})
}

func (linked) plan(ctx context.Context, s *site, src load.Source, req Request) (*hook.Chain, error) {
	prog, err := s.load(src)
	if err != nil {
		return nil, err
	}
	defer prog.Discard()
	var c *hook.Chain
	err = kernel.Retry(ctx, func() error {
		names := s.names()
		defer names.close()
		sp, err := s.spot()
		if err != nil {
			return err
		}
		defer sp.close()
		list, err := sp.list(names, nil)
		if err != nil {
			return err
		}
		i, rec, err := list.place(s, prog, req)
		if err != nil {
			return err
		}
		if _, err := sp.anchor(list, i); err != nil {
			return err
		}
		c = sp.view(list, names)
		m := hook.Member{
			Name: rec.Name, Settings: hook.Settings{Priority: rec.Priority}, Owner: rec.Owner,
			Persistent: req.Persistent, Kind: hook.KindMember, State: hook.StateRunning,
		}
		m.Program, m.TailCalls = describe(prog.Program)
		c.Members = append(c.Members[:i:i], append([]hook.Member{m}, c.Members[i:]...)...)
		return nil
	})
	return c, err
}

// place returns where a new member goes, and its record.
func (l *listing) place(s *site, prog *load.Loaded, req Request) (int, *state.Record, error) {
	rec := &state.Record{Name: req.Name, Owner: req.Owner, Attach: kernel.KindOf(s.Hook).Attach}
	if rec.Name == "" {
		rec.Name = prog.Name
		if err := hook.CheckName(rec.Name); err != nil {
			return 0, nil, hook.Because(hook.ErrUsage, "the program's name will not do for the member: %w; choose one", err)
		}
	}
	if i := l.named(rec.Name); i >= 0 {
		err := hook.Because(fs.ErrExist, "there is a member %q already", rec.Name)
		if !l.entries[i].pinned {
			err = hook.Because(errTaken, "%w", err)
		}
		return 0, nil, err.Hint("choose another name, or replace its program")
	}
	byDefault := req.Settings.Or(prog.Defaults).WithDefaults().Priority
	i, priority, err := dispatch.Settle(l.ranks(), req.Position, l.find, req.Priority, byDefault)
	rec.Priority = priority
	return i, rec, err
}

// joinLinks attaches the program with a link at its place.
func (s *site) joinLinks(l *state.Locked, prog *load.Loaded, req Request) (*linkHandle, error) {
	names, err := s.namesToWrite(l)
	if err != nil {
		return nil, err
	}
	defer names.close()
	sp, err := s.spot()
	if err != nil {
		return nil, err
	}
	defer sp.close()
	list, err := sp.list(names, nil)
	if err != nil {
		return nil, err
	}
	i, rec, err := list.place(s, prog, req)
	if err != nil {
		return nil, err
	}
	rec.LastSeen = sp.home()
	at, err := sp.anchor(list, i)
	if err != nil {
		return nil, err
	}
	link, err := sp.create(prog.Program, at, list)
	if err != nil {
		return nil, err
	}
	kernel.Step("attach: attached")
	h, err := s.newLinkHandle(link, rec)
	if err != nil {
		return nil, err
	}
	h.made = true
	if err := names.reg.Put(h.id, rec); err != nil {
		return nil, kernel.Undo(err, h.Close())
	}
	kernel.Step("attach: named")
	if req.Persistent {
		if err := h.pin(l, prog.Maps); err != nil {
			// Half attached is not attached.
			return nil, kernel.Undo(err, names.reg.Delete(h.id), h.link.Close())
		}
	}
	return h, nil
}

func (linked) open(ctx context.Context, s *site, ref hook.Ref) (h Handle, err error) {
	err = kernel.Retry(ctx, func() error {
		names := s.names()
		defer names.close()
		sp, err := s.spot()
		if err != nil {
			return err
		}
		defer sp.close()
		list, err := sp.list(names, nil)
		if err != nil {
			return err
		}
		i, err := list.find(ref)
		if err != nil {
			return err
		}
		e := list.entries[i]
		if e.link == 0 {
			return sp.legacy(e)
		}
		h, err = s.openEntry(e)
		return kernel.Again(err)
	})
	if err != nil {
		return nil, err
	}
	s.ns.Release()
	return h, nil
}

// openEntry makes a handle of an entry with a link.
func (s *site) openEntry(e entry) (*linkHandle, error) {
	link, err := openLink(e.link)
	if err != nil {
		return nil, err
	}
	rec := e.rec
	if rec == nil {
		rec = &state.Record{Name: e.name, Attach: kernel.KindOf(s.Hook).Attach}
	}
	return s.newLinkHandle(link, rec)
}

// openPinnedLink opens a member by its pin, and makes the site that of its hook.
func (s *site) openPinnedLink(folder, member string) (*linkHandle, error) {
	l, err := loadPinnedLink(s.pins.HeldPath(folder, member))
	if err != nil {
		return nil, err
	}
	link, err := asRaw(l)
	if err != nil {
		return nil, err
	}
	info, err := describeLink(link)
	if err == nil {
		if s.Hook = info.Hook(); s.Hook == "" {
			err = info.noHook()
		}
	}
	if err != nil {
		link.Close()
		return nil, err
	}
	names := s.names()
	defer names.close()
	rec, err := names.record(info.Attach, info.ID)
	if err != nil {
		link.Close()
		return nil, err
	}
	if rec == nil {
		rec = &state.Record{Name: member, Attach: info.Attach}
	}
	h, err := s.newLinkHandle(link, rec)
	if err != nil {
		return nil, err
	}
	s.ns.Release()
	return h, nil
}

// legacy is the refusal of an entry that has no link.
func (sp *spot) legacy(e entry) error {
	return hook.Busy(&hook.Occupant{Kind: hook.KindLegacy, Program: programOf(e.prog)}).
		Hint("make it a member with \"%s\", or detach it with --force",
			sp.asked.command("adopt", string(sp.hook), sp.target(), string(hook.ProgramRef(e.prog))))
}

// foreign is the refusal to take out what a link of another tool attaches.
func (sp *spot) foreign(e entry) error {
	return hook.Busy(&hook.Occupant{Kind: hook.KindForeign, Program: programOf(e.prog), LinkID: e.link}).
		Hint("it is not a member; --force detaches it all the same, \"%s\" makes it one", sp.asked.commandByLink("adopt", e.link))
}

func (sp *spot) target() string {
	if sp.cgroup != nil {
		return sp.cgroup.Path
	}
	return sp.name
}

func (linked) detach(ctx context.Context, s *site, ref hook.Ref, force bool) error {
	return kernel.Retry(ctx, func() error {
		return s.locked(ctx, func(l *state.Locked) error {
			names := s.names()
			defer names.close()
			sp, err := s.spot()
			if err != nil {
				return err
			}
			defer sp.close()
			list, err := sp.list(names, nil)
			if err != nil {
				return err
			}
			leaving := list.entries
			if ref != "" {
				i, err := list.find(ref)
				if err != nil {
					return err
				}
				leaving = leaving[i : i+1]
			} else if len(leaving) == 0 {
				return hook.Because(fs.ErrNotExist, "nothing is attached")
			}
			ours := 0
			for _, e := range leaving {
				if e.name == "" && ref == "" {
					continue
				}
				ours++
				if err := sp.takeOut(l, names, e, force); err != nil {
					return err
				}
			}
			if ours == 0 {
				return sp.refuse(leaving[0])
			}
			return nil
		})
	})
}

func (sp *spot) refuse(e entry) error {
	if e.link == 0 {
		return sp.legacy(e)
	}
	return sp.foreign(e)
}

// takeOut removes one entry, and its pins after it.
func (sp *spot) takeOut(l *state.Locked, names *names, e entry, force bool) error {
	switch {
	case e.name == "" && !force:
		return sp.refuse(e)
	case e.link == 0:
		return sp.removeLegacy(e.carried)
	}
	link, err := openLink(e.link)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // it has just left by itself
	}
	if err != nil {
		return err
	}
	defer link.Close()
	return leave(l, names, sp.hook, e.link, link)
}

// leave takes a member out: its pins, its link, its record. In this order, so
// that when the process dies on the way the link is held by its owner or gone.
func leave(l *state.Locked, names *names, h hook.Hook, id uint32, link rawLink) error {
	if l != nil {
		if err := l.RemoveChain(state.LinkFolder(h, id)); err != nil {
			return err
		}
	}
	kernel.Step("detach: unpinned")
	if err := link.Detach(); err != nil {
		return kernel.Errno("detach the link", err)
	}
	kernel.Step("detach: detached")
	return names.reg.Delete(id)
}

// removeLegacy takes out a program that has no link.
func (sp *spot) removeLegacy(prog uint32) error {
	p, err := ebpf.NewProgramFromID(ebpf.ProgramID(prog))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // it left by itself
	}
	if err != nil {
		return kernel.Errno(fmt.Sprintf("program id %d", prog), err)
	}
	defer p.Close()
	err = sp.do(func(target int) error { return kernel.DetachProgram(p, target, sp.kind.Attach) })
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return kernel.Errno("detach the program", err)
}

func (linked) read(ctx context.Context, s *site) (c *hook.Chain, err error) {
	err = kernel.Retry(ctx, func() error {
		names := s.names()
		defer names.close()
		sp, err := s.spot()
		if err != nil {
			return err
		}
		defer sp.close()
		list, err := sp.list(names, nil)
		if err != nil {
			return err
		}
		c = sp.view(list, names)
		return nil
	})
	return c, err
}

// view describes a listing for users.
func (sp *spot) view(list *listing, names *names) *hook.Chain {
	c := &hook.Chain{
		Hook: sp.hook, Target: sp.target(), Ifindex: sp.index, Revision: list.revision,
		Pins: []string{}, Members: []hook.Member{},
	}
	if sp.cgroup != nil {
		c.CgroupID = sp.cgroup.ID
	} else {
		c.NetNS = sp.ns.ID()
	}
	for _, e := range list.entries {
		if e.leaving {
			continue
		}
		m := viewEntry(e)
		if sp.cgroup != nil {
			m.Detail = cgroupFlags(list.flags, e)
		}
		if e.pinned {
			c.Pins = append(c.Pins, names.pins.List(state.LinkFolder(sp.hook, e.link))...)
		}
		c.Members = append(c.Members, m)
	}
	return c
}

func viewEntry(e entry) hook.Member {
	m := hook.Member{
		Name: e.name, LinkID: e.link, Persistent: e.pinned,
		Kind: hook.KindMember, State: hook.StateRunning,
	}
	if prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(e.prog)); err == nil {
		m.Program, m.TailCalls = describe(prog)
		prog.Close()
	} else {
		m.Program.ID = e.prog
	}
	switch {
	case e.rec != nil:
		m.Priority, m.Owner = e.rec.Priority, e.rec.Owner
	case e.name != "": // pinned, and not in the registry
	case e.link != 0:
		m.Kind = hook.KindForeign
	default:
		m.Kind = hook.KindLegacy
	}
	if m.Name == "" {
		m.Name = m.Program.Name
	}
	return m
}

// cgroupFlags says in words how legacy programs share a cgroup. Links always
// share it with others.
func cgroupFlags(flags uint32, e entry) string {
	switch {
	case e.link != 0:
		return ""
	case flags&unix.BPF_F_ALLOW_MULTI != 0:
		return "allow-multi"
	case flags&unix.BPF_F_ALLOW_OVERRIDE != 0:
		return "allow-override"
	}
	return "exclusive"
}
