package links

import (
	"context"
	"fmt"
	"io/fs"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// adopt gives an entry without a link one, at the same place.
func (Family) Adopt(ctx context.Context, s *target.Opened, req target.AdoptRequest) (target.Handle, error) {
	var h *linkHandle
	err := kernel.Retry(ctx, func() error {
		return s.Locked(ctx, func(l *state.Locked) error {
			return withOrder(s, l, func(sp *spot, list *listing) (err error) {
				h, err = sp.adoptBare(l, list, req)
				return err
			})
		})
	})
	if err != nil {
		return nil, err
	}
	s.NS.Release()
	return h, nil
}

// A successor makes a link the member that takes the place of a program.
type successor struct {
	sp         *spot
	l          *state.Locked
	rec        *state.Record
	persistent bool
	handle     *linkHandle
}

// keep gives the link its name and its pin.
func (s *successor) keep(made kernel.RawLink) (err error) {
	if s.handle, err = newLinkHandle(s.sp.Opened, made, s.rec); err != nil {
		return err
	}
	s.handle.made = true
	if err := s.sp.names.reg.Put(s.handle.id, s.rec); err != nil {
		return err
	}
	if s.persistent {
		return s.handle.pin(s.l, nil)
	}
	return nil
}

func (sp *spot) adoptBare(l *state.Locked, list *listing, req target.AdoptRequest) (*linkHandle, error) {
	i, err := sp.adoptable(list, req.Entry)
	if err != nil {
		return nil, err
	}
	prog, err := Real(list.Order[i].carried)
	if err != nil {
		return nil, err
	}
	defer prog.Close()
	carried, err := ebpf.NewProgramFromID(ebpf.ProgramID(list.Order[i].carried))
	if err != nil {
		return nil, kernel.Again(kernel.Errno("the program", err))
	}
	defer carried.Close()

	loaded, err := load.Program{Program: prog}.Load(load.Want{Hook: sp.Hook})
	if err != nil {
		return nil, err
	}
	rec, err := sp.recordAt(list, i, loaded, req.Request)
	if err != nil {
		return nil, err
	}
	at, err := sp.besides(list, i)
	if err != nil {
		return nil, err
	}
	next := &successor{sp: sp, l: l, rec: rec, persistent: req.Persistent}
	if sp.cgroup != nil && !sharesCgroup(list.flags) {
		return sp.swapOnCgroup(list, prog, req.NoGap, next)
	}
	create := func(p *ebpf.Program) (kernel.RawLink, error) {
		now := list
		if sp.cgroup == nil { // the stand-in that is there by now counts as a change
			if now, err = sp.list(); err != nil {
				return nil, err
			}
			if !sameLinks(list, now) {
				return nil, kernel.ErrAgain
			}
			if at, err = sp.besides(now, i); err != nil {
				return nil, err
			}
		}
		return sp.create(p, at, now)
	}
	made, err := sp.takePlaceOf(l, carried, prog, create, next.keep)
	if err != nil {
		if made != nil && next.handle != nil {
			err = kernel.Undo(err, next.handle.Close())
		}
		return nil, err
	}
	return next.handle, nil
}

// recordAt is the record of the entry at i as a member: its priority is one that
// leaves it where it is.
func (sp *spot) recordAt(list *listing, i int, prog *load.Loaded, req target.Request) (*state.Record, error) {
	others := list.Without(i)
	_, name, _, err := others.Join(prog, req)
	if err != nil {
		return nil, err
	}
	priority, err := others.Fit(i, req.Priority)
	if err != nil {
		return nil, err
	}
	return sp.newRecord(name, req.Owner, priority), nil
}

// besides is the neighbor for a link that takes the place of the entry at i, which
// is still there: just before it, or on a cgroup also just behind it.
func (sp *spot) besides(list *listing, i int) (kernel.Neighbor, error) {
	at, err := sp.neighbor(list, i)
	if err != nil && sp.cgroup != nil {
		if behind, err := sp.neighbor(list, i+1); err == nil {
			return behind, nil
		}
	}
	return at, err
}

// takePlaceOf is takePlace for an entry without a link, which may be a stand-in
// that an adoption left which did not come to its end.
func (sp *spot) takePlaceOf(l *state.Locked, carried, prog *ebpf.Program, create func(*ebpf.Program) (kernel.RawLink, error), keep func(kernel.RawLink) error) (kernel.RawLink, error) {
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
		if i, err = list.Find(ref); err != nil {
			return 0, err
		}
		if list.Order[i].Link != 0 {
			e := list.Order[i]
			if e.Name != "" {
				return 0, hook.Because(fs.ErrExist, "%q is a member already", e.Name)
			}
			return 0, sp.foreignKept(e)
		}
		return i, nil
	}
	for j, e := range list.Order {
		if e.Link != 0 {
			continue
		}
		if i >= 0 {
			return 0, hook.Because(hook.ErrUsage, "several programs have no link: choose one, id:%d or id:%d", list.Order[i].Program, e.Program)
		}
		i = j
	}
	switch {
	case i >= 0:
		return i, nil
	case len(list.Order) == 0:
		return 0, hook.Because(fs.ErrNotExist, "nothing is attached that could be adopted")
	}
	return 0, hook.Because(fs.ErrNotExist, "nothing is attached without a link")
}

// foreignKept is the refusal to adopt what a link of another tool attaches.
func (sp *spot) foreignKept(e entry) error {
	return hook.Busy(&hook.Occupant{Kind: hook.KindForeign, Program: target.ProgramOf(e.Program), LinkID: e.Link}).
		Hint("it has a link already, and \"%s\" makes it a member", sp.CommandByLink("adopt", e.Link))
}

// real opens a program, or the one that it stands in for.
func Real(id uint32) (*ebpf.Program, error) {
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
func (sp *spot) swapOnCgroup(list *listing, prog *ebpf.Program, noGap bool, next *successor) (*linkHandle, error) {
	if noGap {
		return nil, hook.Because(ebpf.ErrNotSupported, "the program is attached for itself alone (%s), and the kernel lets no link be beside it: %w", cgroupFlags(list.flags, list.Order[0]), ebpf.ErrNotSupported).
			Hint("adopt it with the gap, in which nothing is attached")
	}
	old := bare{sp}
	kernel.Step("adopt: before the gap")
	if err := old.remove(prog); err != nil {
		return nil, err
	}
	kernel.Step("adopt: in the gap")
	made, err := sp.create(prog, kernel.Neighbor{}, &listing{})
	if err == nil {
		if err = next.keep(made); err == nil {
			return next.handle, nil
		}
		made.Close()
	}
	back := sp.do(func(target int) error {
		return kernel.AttachProgram(prog, target, sp.kind.Attach, list.flags, nil)
	})
	if back != nil {
		back = fmt.Errorf("program %d could not be put back: %w", kernel.ProgramID(prog), back)
	}
	return nil, kernel.Undo(err, back)
}
