package links

import (
	"errors"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// An incumbent is what a new link replaces: a link, or a program without one.
type incumbent interface {
	// id returns the id of the link, or 0.
	id() uint32
	// carries returns the incumbent's program if it is not standIn; the caller closes
	// it. It returns nil if the kernel does not tell.
	carries(standIn *ebpf.Program) *ebpf.Program
	// replaceProgram puts next in the place of old, which the incumbent must have.
	replaceProgram(next, old *ebpf.Program) error
	// remove takes out the incumbent, which has the program prog.
	remove(prog *ebpf.Program) error
}

type oldLink struct {
	kernel.RawLink
	linkID uint32
}

func (o oldLink) id() uint32 { return o.linkID }

func (o oldLink) carries(standIn *ebpf.Program) *ebpf.Program {
	info, err := o.Info()
	if err != nil || uint32(info.Program) == kernel.ProgramID(standIn) {
		return nil
	}
	prog, err := ebpf.NewProgramFromID(info.Program)
	if err != nil {
		return nil
	}
	return prog
}

func (o oldLink) replaceProgram(next, old *ebpf.Program) error {
	return updateLink(o.RawLink, next, old)
}

func (o oldLink) remove(*ebpf.Program) error { return kernel.Errno("detach the link", o.Detach()) }

// updateLink puts next into a link that has the program old. The error is
// kernel.ErrAgain when the link has another program.
func updateLink(l kernel.RawLink, next, old *ebpf.Program) error {
	err := l.UpdateArgs(link.RawLinkUpdateOptions{New: next, Old: old, Flags: unix.BPF_F_REPLACE})
	switch {
	case errors.Is(err, unix.EPERM): // bpf_mprog_attach, cgroup_bpf_replace
		return kernel.ErrAgain
	case errors.Is(err, unix.ENOLINK):
		return target.ErrGone
	}
	return kernel.Errno("update the link", err)
}

// bare is a program on the opened target without a link.
type bare struct{ *opened }

func (bare) id() uint32 { return 0 }

func (bare) carries(*ebpf.Program) *ebpf.Program { return nil }

func (b bare) replaceProgram(next, old *ebpf.Program) error {
	err := b.do(func(target int) error { return kernel.AttachProgram(next, target, b.kind.Attach, 0, old) })
	if errors.Is(err, unix.ENOENT) {
		return kernel.ErrAgain
	}
	return kernel.Errno("exchange the program", err)
}

func (b bare) remove(prog *ebpf.Program) error {
	return kernel.Errno("detach the program", b.do(func(target int) error { return kernel.DetachProgram(prog, target, b.kind.Attach) }))
}

// A standIn is a set of stand-ins: with them a TC program is attached at two places, and
// each packet meets it once.
type standIn struct {
	slot, mark *ebpf.Map
	records    state.Records            // of the program's members
	progs      map[string]*ebpf.Program // by the stand-ins' names in package dispatch
	pin        string
}

// newStandIn makes stand-ins for the program; old is the link that moves, 0 for a
// program without one. Where there is a bpffs the stand-ins go on if this process is
// killed, until another process finishes the move. The stand-ins have the records, which
// newStandIn takes over: so the members keep their names.
func newStandIn(l *state.Locked, prog *ebpf.Program, old uint32, records state.Records) (*standIn, error) {
	s := &standIn{records: records}
	err := s.make(prog)
	if err == nil && l != nil {
		s.pin, err = l.PinMove(s.slot, old)
	}
	if err != nil {
		s.close(l)
		return nil, err
	}
	return s, nil
}

// TryStandIn makes stand-ins for the program and removes them. It returns nil if the
// program can be moved, else the reason.
func TryStandIn(prog *ebpf.Program) error {
	s, err := newStandIn(nil, prog, 0, nil)
	if err != nil {
		return err
	}
	s.close(nil)
	return nil
}

func (s *standIn) make(prog *ebpf.Program) (err error) {
	if s.slot, err = state.NewSlot("move"); err != nil {
		return err
	}
	if s.mark, err = ebpf.NewMap(&ebpf.MapSpec{Name: "ld_mark", Type: ebpf.PerCPUArray, KeySize: 4, ValueSize: 8, MaxEntries: 1}); err != nil {
		return kernel.Errno("stand-in", err)
	}
	if err := state.Fill(s.slot, prog); err != nil {
		return cannotMove(err)
	}
	return s.loadAll()
}

// loadAll loads the stand-ins for the program in the slot.
func (s *standIn) loadAll() (err error) {
	// A stand-in needs the program's attach type, which the kernel does not tell.
	for _, t := range []ebpf.AttachType{ebpf.AttachNone, ebpf.AttachTCXIngress, ebpf.AttachTCXEgress, ebpf.AttachNetkitPrimary, ebpf.AttachNetkitPeer} {
		s.progs = map[string]*ebpf.Program{}
		if err = s.load(t); err == nil || !errors.Is(err, unix.EINVAL) {
			return err
		}
	}
	return cannotMove(err)
}

func (s *standIn) load(t ebpf.AttachType) error {
	for _, name := range []string{dispatch.StandInFirst, dispatch.StandInSecond, dispatch.StandInAway} {
		insns := dispatch.StandIn(name)
		for ref, m := range map[string]*ebpf.Map{dispatch.StandInSlot: s.slot, dispatch.StandInMark: s.mark} {
			if err := insns.AssociateMap(ref, m); err != nil {
				return err
			}
		}
		p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: name, Type: ebpf.SchedCLS, AttachType: t, Instructions: insns, License: "Dual BSD/GPL"})
		if err != nil {
			return kernel.Errno("load stand-in", err)
		}
		s.progs[name] = p
		if err := s.records.Bind(p); err != nil {
			return err
		}
	}
	return nil
}

func cannotMove(err error) error {
	return hook.Because(hook.ErrIncompatible, "the program cannot be moved without missing packets, because the kernel does not let another one call it: %w", err).
		Hint("detach it, and attach it at the place where it shall be")
}

// close closes the stand-ins and removes their pin. They must not be attached any more.
func (s *standIn) close(l *state.Locked) {
	for _, p := range s.progs {
		p.Close()
	}
	if s.pin != "" {
		l.RemoveMove(s.pin)
	}
	s.slot.Close()
	s.mark.Close()
	s.records.Close()
}

// settledWait is how long a program may run. It is the wait on kernels that do not tell
// when all running programs have returned.
const settledWait = 100 * time.Millisecond

func settled() {
	if kernel.Settled() != nil {
		time.Sleep(settledWait)
	}
}

// takePlace makes a new link with the incumbent's program, and takes the incumbent out.
// The program sees every packet once, at the old place or at the new one. up says that
// packets come to the new place first. create attaches a program at the new place; keep
// names the link and, if persistent, pins it. takePlace may return a link together with
// an error: then the link is attached, but a later step failed.
//
// On a cgroup the program is in both places for a moment.
func (op *opened) takePlace(l *state.Locked, old incumbent, prog *ebpf.Program, up bool, create func(*ebpf.Program) (kernel.RawLink, error), keep func(kernel.RawLink) error, release func() error) (kernel.RawLink, error) {
	if op.cgroup != nil {
		return op.besidesOld(l, old, prog, create, keep, release)
	}
	records, err := state.KeepRecords(prog)
	if err != nil {
		return nil, err
	}
	s, err := newStandIn(l, prog, old.id(), records)
	if err != nil {
		return nil, err
	}
	defer s.close(l)
	first, second, away := s.progs[dispatch.StandInFirst], s.progs[dispatch.StandInSecond], s.progs[dispatch.StandInAway]
	// No mark must stay behind that nothing clears. So the new link's stand-in never
	// sets the mark: until keep pins the new link, it may vanish with this process.
	before, after := first, second
	if up {
		before, after = second, away
	}
	kernel.Step("move: before")
	if err := old.replaceProgram(before, prog); err != nil {
		return nil, err
	}
	kernel.Step("move: stand-in")
	link, err := create(after)
	if err == nil {
		if err = keep(link); err != nil {
			_ = link.Detach()
			link.Close()
		}
	}
	if err != nil {
		return nil, kernel.Undo(err, old.replaceProgram(prog, before))
	}
	kernel.Step("move: at both places")
	return link, kernel.Join(s.finish(old, before, link, prog, up), release())
}

// besidesOld is takePlace on a cgroup, where the program is at both places for a moment. The
// pinned records say that the move is not finished, see finishLeaving.
func (op *opened) besidesOld(l *state.Locked, old incumbent, prog *ebpf.Program, create func(*ebpf.Program) (kernel.RawLink, error), keep func(kernel.RawLink) error, release func() error) (kernel.RawLink, error) {
	records, err := state.KeepRecords(prog)
	if err != nil {
		return nil, err
	}
	defer records.Close()
	done := func() {}
	if l != nil && old.id() != 0 {
		mark, err := l.PinMove(records[0], old.id())
		if err != nil {
			return nil, err
		}
		done = func() { l.RemoveMove(mark) }
	}
	link, err := create(prog)
	if err == nil {
		if err = keep(link); err != nil {
			_ = link.Detach()
			link.Close()
		}
	}
	if err != nil {
		done()
		return nil, err
	}
	kernel.Step("move: at both places")
	if err := old.remove(prog); err != nil {
		return link, err // another process finishes the move
	}
	// A process that does not wait for the lock may have updated the old link; the
	// kernel still tells its program.
	if now := old.carries(prog); now != nil {
		defer now.Close()
		err = kernel.Join(carry(records, link, now), updateLink(link, now, prog))
	}
	err = kernel.Join(err, release())
	done()
	return link, err
}

// carry gives a program, which a link is about to run, the link's record.
func carry(records state.Records, l kernel.RawLink, prog *ebpf.Program) error {
	info, err := kernel.LinkInfoOf(l)
	if err != nil {
		return err
	}
	rec, err := records.Get(info.ID)
	if err != nil || rec == nil {
		return err
	}
	to, err := state.KeepRecords(prog)
	if err != nil {
		return err
	}
	defer to.Close()
	return to.Put(info.ID, rec)
}

// finish ends a move while both places have stand-ins: the old place has the stand-in
// there; the new place has its counterpart, or the stand-in of a later step.
//
// A process that does not wait for the lock may have updated the member meanwhile. Then
// finish keeps the updated program.
func (s *standIn) finish(old incumbent, there *ebpf.Program, link kernel.RawLink, prog *ebpf.Program, up bool) error {
	first, away := s.progs[dispatch.StandInFirst], s.progs[dispatch.StandInAway]
	if up {
		err := s.swap(link, first, dispatch.StandInAway)
		kernel.Step("move: seen at the new place")
		err = kernel.Join(err, old.remove(there))
		kernel.Step("move: at the new place")
		if now := old.carries(there); now != nil {
			defer now.Close()
			prog = now
		}
		return kernel.Join(err, s.swap(link, prog, dispatch.StandInFirst))
	}
	// From now on a packet that comes to the old place is seen at the new one.
	err := old.replaceProgram(away, there)
	if errors.Is(err, kernel.ErrAgain) {
		if now := old.carries(there); now != nil {
			defer now.Close()
			prog = now
			err = old.replaceProgram(away, now)
		}
	}
	if errors.Is(err, target.ErrGone) {
		err = nil // another process died after this step
	}
	settled()
	kernel.Step("move: seen at the new place")
	err = kernel.Join(err, s.swap(link, prog, dispatch.StandInSecond))
	kernel.Step("move: at the new place")
	return kernel.Join(err, old.remove(away))
}

// swap puts next into a link that has the stand-in of the name. If the link has another
// program, another process has updated it meanwhile, and the program stays.
func (s *standIn) swap(l kernel.RawLink, next *ebpf.Program, standIn string) error {
	info, err := l.Info()
	if err != nil {
		return kernel.Errno("link", err)
	}
	now, err := ebpf.NewProgramFromID(info.Program)
	if err != nil {
		return kernel.Errno("stand-in", err)
	}
	defer now.Close()
	if kernel.Describe(now).Name != standIn {
		return nil
	}
	if err := carry(s.records, l, next); err != nil {
		return err
	}
	return updateLink(l, next, now)
}
