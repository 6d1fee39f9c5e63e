package attach

import (
	"context"
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

// adopt gives an entry without a link one, at the same place.
func (linked) adopt(ctx context.Context, s *site, req AdoptRequest) (Handle, error) {
	var h *linkHandle
	err := kernel.Retry(ctx, func() error {
		return s.locked(ctx, func(l *state.Locked) (err error) {
			h, err = s.adoptBare(l, req)
			return err
		})
	})
	if err != nil {
		return nil, err
	}
	s.ns.Release()
	return h, nil
}

func (s *site) adoptBare(l *state.Locked, req AdoptRequest) (*linkHandle, error) {
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
	i, err := sp.adoptable(list, req.Entry)
	if err != nil {
		return nil, err
	}
	prog, err := real(list.entries[i].carried)
	if err != nil {
		return nil, err
	}
	defer prog.Close()
	carried, err := ebpf.NewProgramFromID(ebpf.ProgramID(list.entries[i].carried))
	if err != nil {
		return nil, kernel.Again(kernel.Errno("the program", err))
	}
	defer carried.Close()

	// Its priority is one that leaves it where it is.
	others := list.without(i)
	loaded, err := load.Program{Program: prog}.Load(load.Want{Hook: s.Hook})
	if err != nil {
		return nil, err
	}
	_, rec, err := others.place(s, loaded, req.Request)
	if err != nil {
		return nil, err
	}
	if rec.Priority, err = dispatch.Fit(others.ranks(), i, req.Priority); err != nil {
		return nil, err
	}
	rec.LastSeen = sp.home()
	at, err := sp.besides(list, i)
	if err != nil {
		return nil, err
	}
	var h *linkHandle
	keep := func(link rawLink) (err error) {
		if h, err = s.newLinkHandle(link, rec); err != nil {
			return err
		}
		h.made = true
		if err := names.reg.Put(h.id, rec); err != nil {
			return err
		}
		if req.Persistent {
			return h.pin(l, nil)
		}
		return nil
	}
	if sp.cgroup != nil && !sharesCgroup(list.flags) {
		return s.swapOnCgroup(sp, list, prog, req.NoGap, keep, func() *linkHandle { return h })
	}
	create := func(p *ebpf.Program) (rawLink, error) {
		now := *list
		if sp.cgroup == nil { // the stand-in that is there by now counts as a change
			listed, err := sp.list(names, nil)
			if err != nil {
				return nil, err
			}
			if !sameLinks(list, listed) {
				return nil, kernel.ErrAgain
			}
			if at, err = sp.besides(listed, i); err != nil {
				return nil, err
			}
			now = *listed
		}
		return sp.create(p, at, &now)
	}
	link, err := sp.takePlaceOf(l, carried, prog, create, keep)
	if err != nil {
		if link != nil && h != nil {
			err = kernel.Undo(err, h.Close())
		}
		return nil, err
	}
	return h, nil
}

// besides is the anchor for a link that takes the place of the entry at i, which
// is still there: just before it, or on a cgroup also just behind it.
func (sp *spot) besides(list *listing, i int) (kernel.Neighbor, error) {
	at, err := sp.anchor(list, i)
	if err != nil && sp.cgroup != nil {
		if behind, err := sp.anchor(list, i+1); err == nil {
			return behind, nil
		}
	}
	return at, err
}

// takePlaceOf is takePlace for an entry without a link, which may be a stand-in
// that an adoption left which did not come to its end.
func (sp *spot) takePlaceOf(l *state.Locked, carried, prog *ebpf.Program, create func(*ebpf.Program) (rawLink, error), keep func(rawLink) error) (rawLink, error) {
	old := bare{sp}
	if kernel.ProgramID(carried) != kernel.ProgramID(prog) {
		if err := old.exchange(prog, carried); err != nil {
			return nil, err
		}
	}
	return sp.takePlace(l, old, prog, true, create, keep)
}

// adoptable finds the entry to adopt: the one that is named, or the only one
// without a link.
func (sp *spot) adoptable(list *listing, ref hook.Ref) (int, error) {
	i := -1
	if ref != "" {
		var err error
		if i, err = list.find(ref); err != nil {
			return 0, err
		}
		if list.entries[i].link != 0 {
			e := list.entries[i]
			if e.name != "" {
				return 0, hook.Because(fs.ErrExist, "%q is a member already", e.name)
			}
			return 0, sp.foreignKept(e)
		}
		return i, nil
	}
	for j, e := range list.entries {
		if e.link != 0 {
			continue
		}
		if i >= 0 {
			return 0, hook.Because(hook.ErrUsage, "several programs have no link: choose one, id:%d or id:%d", list.entries[i].prog, e.prog)
		}
		i = j
	}
	switch {
	case i >= 0:
		return i, nil
	case len(list.entries) == 0:
		return 0, hook.Because(fs.ErrNotExist, "nothing is attached that could be adopted")
	}
	return 0, hook.Because(fs.ErrNotExist, "nothing is attached without a link")
}

// foreignKept is the refusal to adopt what a link of another tool attaches.
func (sp *spot) foreignKept(e entry) error {
	return hook.Busy(&hook.Occupant{Kind: hook.KindForeign, Program: programOf(e.prog), LinkID: e.link}).
		Hint("it has a link already, and \"%s\" makes it a member", sp.asked.commandByLink("adopt", e.link))
}

// real opens a program, or the one that it stands in for.
func real(id uint32) (*ebpf.Program, error) {
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
	if err != nil {
		return nil, kernel.Again(kernel.Errno("the program", err))
	}
	slotID, err := standInFor(prog)
	if err == nil && slotID == 0 {
		return prog, nil
	}
	defer prog.Close()
	if err != nil {
		return nil, err
	}
	var slots state.Slots
	defer slots.Close()
	slot, err := slots.Open(slotID, false)
	if err != nil {
		return nil, kernel.Again(err)
	}
	behind, err := state.Occupant(slot)
	if err != nil {
		return nil, err
	}
	if behind == 0 {
		return nil, hook.Because(hook.ErrIncompatible, "program %d stood in for one that is gone; detach it (--force)", id)
	}
	prog, err = ebpf.NewProgramFromID(ebpf.ProgramID(behind))
	return prog, kernel.Again(kernel.Errno("the program", err))
}

// sharesCgroup tells whether links may be beside the legacy programs of a cgroup.
func sharesCgroup(flags uint32) bool { return flags&unix.BPF_F_ALLOW_MULTI != 0 }

// swapOnCgroup takes an exclusive legacy program off a cgroup and attaches it
// with a link: the kernel does not let both be there. Between the two nothing is
// attached.
func (s *site) swapOnCgroup(sp *spot, list *listing, prog *ebpf.Program, noGap bool, keep func(rawLink) error, made func() *linkHandle) (*linkHandle, error) {
	if noGap {
		return nil, hook.Because(ebpf.ErrNotSupported, "the program is attached for itself alone (%s), and the kernel lets no link be beside it: %w", cgroupFlags(list.flags, list.entries[0]), ebpf.ErrNotSupported).
			Hint("adopt it with the gap, in which nothing is attached")
	}
	old := bare{sp}
	kernel.Step("adopt: before the gap")
	if err := old.remove(prog); err != nil {
		return nil, err
	}
	kernel.Step("adopt: in the gap")
	link, err := sp.create(prog, kernel.Neighbor{}, &listing{})
	if err == nil {
		if err = keep(link); err == nil {
			return made(), nil
		}
		link.Close()
	}
	back := sp.do(func(target int) error {
		return kernel.AttachProgram(prog, target, sp.kind.Attach, list.flags, nil)
	})
	if back != nil {
		back = fmt.Errorf("program %d could not be put back: %w", kernel.ProgramID(prog), back)
	}
	return nil, kernel.Undo(err, back)
}
