package links

import (
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

// Adopt gives a link to a program without one, at the same place. The caller closes the
// handle. The error is fs.ErrNotExist when there is no such program, ErrUsage when the
// choice is open, fs.ErrExist for a member, and ErrBusy when the program has a link of
// another tool.
func (Family) Adopt(o *target.Opened, l *state.Locked, req target.AdoptRequest) (h target.Handle, err error) {
	err = withOrder(o, func(op *opened, list *order) error {
		h, err = op.adoptBare(l, list, req)
		return err
	})
	return h, err
}

// A successor makes a new link a member, perhaps in the place of another program.
type successor struct {
	op         *opened
	l          *state.Locked
	prog       *ebpf.Program // the member's
	rec        *state.Record
	persistent bool
	maps       map[string]*ebpf.Map // to be pinned with it
	records    state.Records        // of prog, see bind
	handle     *handle
}

// bind gives the program its records before the link is made: so a reader who sees the link
// knows that its name may be about to come (see look).
func (s *successor) bind() (err error) {
	s.records, err = s.op.names.keep(s.prog)
	return err
}

// keep makes a handle to the link, and gives the link its name and, if persistent, its
// pin.
func (s *successor) keep(made kernel.RawLink) (err error) {
	if s.handle, err = newHandle(s.op.Opened, made, s.rec); err != nil {
		return err
	}
	s.handle.made = true
	if s.records == nil {
		if err := s.bind(); err != nil {
			return err
		}
	}
	s.handle.hold(s.prog, s.records)
	err = s.records.Put(s.handle.id, s.rec)
	kernel.Step("attach: named")
	if err == nil && s.persistent {
		err = s.handle.pin(s.l, s.maps)
	}
	if err != nil {
		s.records.Close()
	}
	return err
}

// replace puts a new link, which create makes, in the place of an incumbent that has no
// link.
func (s *successor) replace(old incumbent, create func(*ebpf.Program) (kernel.RawLink, error)) (*handle, error) {
	made, err := s.op.takePlace(s.l, old, s.prog, true, create, s.keep, func() error { return nil })
	if err == nil {
		return s.handle, nil
	}
	if made != nil {
		err = kernel.Undo(err, made.Close())
	}
	return nil, err
}

func (op *opened) adoptBare(l *state.Locked, list *order, req target.AdoptRequest) (*handle, error) {
	i, err := op.adoptable(list, req.Entry)
	if err != nil {
		return nil, err
	}
	prog, err := OpenProgram(list.Order[i].carried)
	if err != nil {
		return nil, err
	}
	defer prog.Close()
	carried, err := kernel.OpenProgram(list.Order[i].carried, "the program")
	if err != nil {
		return nil, err
	}
	defer carried.Close()

	loaded, err := load.Program{Program: prog}.Load(load.Want{Hook: op.Hook})
	if err != nil {
		return nil, err
	}
	rec, err := op.recordAt(list, i, loaded, req.Request)
	if err != nil {
		return nil, err
	}
	at, err := op.besides(list, i)
	if err != nil {
		return nil, err
	}
	next := &successor{op: op, l: l, prog: prog, rec: rec, persistent: req.Persistent}
	if op.cgroup != nil && !sharesCgroup(list.flags) {
		return op.swapOnCgroup(list, req.NoGap, next)
	}
	create := func(p *ebpf.Program) (kernel.RawLink, error) {
		now := list
		if op.cgroup == nil { // the stand-in has changed the revision
			if now, err = op.list(); err != nil {
				return nil, err
			}
			if !sameLinks(list, now) {
				return nil, kernel.ErrAgain
			}
			if at, err = op.besides(now, i); err != nil {
				return nil, err
			}
		}
		return op.create(p, at, now)
	}
	old := bare{op}
	if kernel.ProgramID(carried) != kernel.ProgramID(prog) { // a stand-in that an interrupted adoption left
		if err := old.replaceProgram(prog, carried); err != nil {
			return nil, err
		}
	}
	return next.replace(old, create)
}

// recordAt returns the record for the entry at i as a member. Its priority leaves the
// entry where it is.
func (op *opened) recordAt(list *order, i int, prog *load.Loaded, req target.Request) (*state.Record, error) {
	others := list.Without(i)
	_, name, _, err := others.Join(prog, req)
	if err != nil {
		return nil, err
	}
	priority, err := others.Fit(i, req.Priority)
	if err != nil {
		return nil, err
	}
	return op.newRecord(name, req.Owner, priority), nil
}

// besides returns the neighbor for a link that replaces the entry at i while the entry
// is still there: just before the entry, or on a cgroup also just behind it.
func (op *opened) besides(list *order, i int) (kernel.Neighbor, error) {
	at, err := op.neighbor(list, i)
	if err != nil && op.cgroup != nil {
		if behind, err := op.neighbor(list, i+1); err == nil {
			return behind, nil
		}
	}
	return at, err
}

// adoptable returns the index of the entry to adopt: the entry that ref names, or the
// only one without a link.
func (op *opened) adoptable(list *order, ref hook.Ref) (int, error) {
	i, err := list.Choose(ref, func(e entry) bool { return e.Link == 0 }, "several programs have no link")
	switch {
	case err != nil:
		return 0, err
	case len(list.Order) == 0:
		return 0, hook.Because(fs.ErrNotExist, "nothing is attached that could be adopted")
	case i < 0:
		return 0, hook.Because(fs.ErrNotExist, "nothing is attached without a link")
	}
	switch e := list.Order[i]; {
	case e.Link == 0:
		return i, nil
	case e.Name != "":
		return 0, hook.Because(fs.ErrExist, "%q is a member already", e.Name)
	default:
		return 0, foreign(e).Hint("it has a link already, and \"%s\" makes it a member", op.CommandByLink("adopt", e.Link))
	}
}

// OpenProgram opens a program; for a stand-in it opens the program that it runs. The
// caller closes the result. The error is kernel.ErrAgain when the program is gone, and
// ErrIncompatible for a stand-in with an empty slot.
func OpenProgram(id uint32) (*ebpf.Program, error) {
	prog, err := kernel.OpenProgram(id, "the program")
	if err != nil {
		return nil, err
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
	return kernel.OpenProgram(behind, "the program")
}

// sharesCgroup reports whether the legacy programs of a cgroup allow links beside them.
func sharesCgroup(flags uint32) bool { return flags&unix.BPF_F_ALLOW_MULTI != 0 }

// NeedsGap returns the refusal to adopt a program without a gap that shares its cgroup with
// no link: how it was attached, in words.
func NeedsGap(attached string) error {
	return hook.Because(ebpf.ErrNotSupported, "the program is attached for itself alone (%s), and the kernel lets no link be beside it: %w", attached, ebpf.ErrNotSupported).
		Hint("adopt it with the gap, in which nothing is attached")
}

// swapOnCgroup takes an exclusive legacy program off a cgroup, and then attaches it
// with a link: the kernel does not allow both at once. In between nothing is attached.
func (op *opened) swapOnCgroup(list *order, noGap bool, next *successor) (*handle, error) {
	prog := next.prog
	if noGap {
		return nil, NeedsGap(cgroupFlags(list.flags, list.Order[0]))
	}
	old := bare{op}
	if err := next.bind(); err != nil {
		return nil, err
	}
	kernel.Step("adopt: before the gap")
	if err := old.remove(prog); err != nil {
		return nil, err
	}
	kernel.Step("adopt: in the gap")
	made, err := op.create(prog, kernel.Neighbor{}, &order{})
	if err == nil {
		if err = next.keep(made); err == nil {
			return next.handle, nil
		}
		made.Close()
	} else {
		next.records.Close()
	}
	back := op.do(func(target int) error {
		return kernel.AttachProgram(prog, target, op.kind.Attach, list.flags, nil)
	})
	if back != nil {
		back = fmt.Errorf("program %d could not be put back: %w", kernel.ProgramID(prog), back)
	}
	return nil, kernel.Undo(err, back)
}
