package links

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// Family is the family of the hooks where each member has a link of its own and the
// kernel keeps the order: TCX and cgroups.
type Family struct{}

// Attach loads the program and attaches it with a link. The caller closes the handle.
// The error is ErrNotSupported where the kernel lacks the hook or the place, fs.ErrExist
// when a member has the name or TCX has the program, ErrChainFull, and ErrBusy for a
// cgroup with an exclusive legacy program, or below one whose program would be switched
// off.
func (Family) Attach(ctx context.Context, o *target.Opened, src load.Source, req target.Request) (target.Handle, error) {
	prog, err := loadFor(o, src)
	if err != nil {
		return nil, err
	}
	var h *handle
	patience := target.UntilLeft()
	err = o.Change(ctx, func(l *state.Locked) error {
		return patience(withOrder(o, func(op *opened, list *order) (err error) {
			h, err = op.join(l, list, prog, req)
			return err
		}))
	})
	if err != nil {
		prog.Discard()
		return nil, err
	}
	h.Loaded = prog
	return h, nil
}

// loadFor loads a program for the hook, after a check that the kernel has the hook and
// the target exists.
func loadFor(o *target.Opened, src load.Source) (*load.Loaded, error) {
	op, err := open(o, nil)
	if err != nil {
		return nil, err
	}
	defer op.close()
	if _, err := op.query(0); err != nil {
		return nil, err
	}
	begins := func() (hook.Begins, error) { return op.begins, nil }
	return load.PinningIn(src, o.BPFFS).Load(load.Want{Hook: o.Hook, Begins: begins})
}

// Plan loads the program, describes the order as Attach would leave it, and changes
// nothing.
func (Family) Plan(ctx context.Context, o *target.Opened, src load.Source, req target.Request) (c *hook.Chain, err error) {
	prog, err := loadFor(o, src)
	if err != nil {
		return nil, err
	}
	defer prog.Discard()
	err = kernel.Retry(ctx, func() error {
		return withOrder(o, func(op *opened, list *order) error {
			i, name, priority, err := list.Join(prog, req)
			if err != nil {
				return err
			}
			if _, err := op.neighbor(list, i); err != nil {
				return err
			}
			if err := op.checkAbove(list, req); err != nil {
				return err
			}
			c = op.view(list)
			m := hook.Member{
				Name: name, Settings: hook.Settings{Priority: priority}, Owner: req.Owner,
				Persistent: req.Persistent, Kind: hook.KindMember, State: hook.StateRunning,
			}
			m.Program, m.TailCalls = target.Describe(prog.Program)
			c.Members = slices.Insert(c.Members, i, m)
			return nil
		})
	})
	return c, err
}

// newRecord returns the record for a new member.
func (op *opened) newRecord(name, owner string, priority int) *state.Record {
	return &state.Record{Name: name, Owner: owner, Priority: priority, Attach: op.kind.Attach, Member: newMember(), LastSeen: op.seen()}
}

// join attaches the program with a link, names the link and, if persistent, pins it.
func (op *opened) join(l *state.Locked, list *order, prog *load.Loaded, req target.Request) (*handle, error) {
	i, name, priority, err := list.Join(prog, req)
	if err != nil {
		return nil, err
	}
	rec := op.newRecord(name, req.Owner, priority)
	at, err := op.neighbor(list, i)
	if err != nil {
		return nil, err
	}
	if err := op.checkAbove(list, req); err != nil {
		return nil, err
	}
	next := &successor{op: op, l: l, prog: prog.Program, rec: rec, persistent: req.Persistent, maps: prog.Maps}
	if err := next.bind(); err != nil {
		return nil, err
	}
	made, err := op.create(prog.Program, at, list)
	if err != nil {
		next.records.Close()
		return nil, err
	}
	kernel.Step("attach: attached")
	if err := next.keep(made); err != nil {
		return nil, kernel.Undo(err, made.Close()) // half attached is not attached
	}
	return next.handle, nil
}

// Open returns a handle to an entry with a link, a member or not; the caller closes it.
// The error is fs.ErrNotExist for an unknown ref, and ErrBusy for a program without a
// link.
func (Family) Open(o *target.Opened, ref hook.Ref) (h target.Handle, err error) {
	err = withOrder(o, func(op *opened, list *order) error {
		i, err := list.Find(ref)
		if err != nil {
			return err
		}
		e := list.Order[i]
		if e.Link == 0 {
			return op.legacy(e)
		}
		if e.rec == nil {
			e.rec = &state.Record{Name: e.Name, Attach: op.kind.Attach}
		}
		l, err := op.openLink(e)
		if err == nil {
			h, err = newHandle(o, l, e.rec)
		}
		return kernel.Again(err)
	})
	return h, err
}

// OpenPinned opens a member by its pin, and sets o.Hook to the member's hook. The caller
// closes the handle. The error is fs.ErrNotExist when there is no such pin.
func OpenPinned(o *target.Opened, folder, member string) (*handle, error) {
	link, err := kernel.LoadPinnedLink(o.Pins.HeldPath(folder, member))
	if err != nil {
		return nil, err
	}
	info, err := kernel.LinkInfoOf(link)
	if err == nil {
		if o.Hook = info.Hook(); o.Hook == "" {
			err = info.NoHook()
		}
	}
	if err != nil {
		link.Close()
		return nil, err
	}
	names := OpenNames(o)
	defer names.Close()
	rec, err := names.Record(info)
	if err != nil {
		link.Close()
		return nil, err
	}
	if rec == nil {
		rec = &state.Record{Name: member, Attach: info.Attach}
	}
	return newHandle(o, link, rec)
}

// legacy returns the refusal of an entry without a link: ErrBusy.
func (op *opened) legacy(e entry) error {
	return hook.Busy(&hook.Occupant{Kind: hook.KindLegacy, Program: target.ProgramOf(e.Program)}).
		Hint("make it a member with \"%s\", or detach it with --force",
			op.Command(nil, "adopt", string(op.Hook), op.target(), string(hook.ProgramRef(e.Program))))
}

// foreign returns the refusal of a link of another tool: ErrBusy.
func foreign(e entry) *hook.Cause {
	return hook.Busy(&hook.Occupant{Kind: hook.KindForeign, Program: target.ProgramOf(e.Program), LinkID: e.Link})
}

func (op *opened) target() string {
	if op.cgroup != nil {
		return op.cgroup.Path
	}
	return op.name
}

// Detach takes out the entry that ref names, or all members for an empty ref, and
// removes their pins. An entry that is no member must be named, and needs force. The
// error is fs.ErrNotExist when there is no such entry, and ErrBusy when there is only
// one that is no member.
func (Family) Detach(ctx context.Context, o *target.Opened, ref hook.Ref, force bool) error {
	return o.Locked(ctx, func(l *state.Locked) error {
		return withOrder(o, func(op *opened, list *order) error {
			return list.Detach(ref, force, op.refuse, func(e entry) error { return op.takeOut(l, e) })
		})
	})
}

// refuse returns the refusal of an entry that is no member: ErrBusy.
func (op *opened) refuse(e entry) error {
	if e.Link == 0 {
		return op.legacy(e)
	}
	return foreign(e).Hint("it is not a member; --force detaches it all the same, \"%s\" makes it one", op.CommandByLink("adopt", e.Link))
}

// openLink opens the link of an entry by its id, or else by its pin: the id needs CAP_SYS_ADMIN.
func (op *opened) openLink(e entry) (kernel.RawLink, error) {
	l, err := kernel.OpenLink(e.Link)
	if errors.Is(err, unix.EPERM) && e.pinned {
		return kernel.LoadPinnedLink(op.Pins.HeldPath(state.LinkFolder(op.Hook, e.Link), e.Name))
	}
	return l, err
}

// takeOut takes out one entry and removes its pins.
func (op *opened) takeOut(l *state.Locked, e entry) error {
	if e.Link == 0 {
		return op.removeLegacy(e.carried)
	}
	link, err := op.openLink(e)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // the link is gone meanwhile
	}
	if err != nil {
		return err
	}
	defer link.Close()
	return leave(l, op.names, op.Hook, e.Link, link)
}

// leave takes a member out: first its pins, then its link, then its record. With this
// order, if the process dies in between, the link is gone or its owner still holds it.
func leave(l *state.Locked, names *Names, h hook.Hook, id uint32, link kernel.RawLink) error {
	if l != nil {
		if err := l.DropChain(state.LinkFolder(h, id)); err != nil {
			return err
		}
	}
	kernel.Step("detach: unpinned")
	if err := link.Detach(); err != nil {
		return kernel.Errno("detach the link", err)
	}
	kernel.Step("detach: detached")
	info, err := kernel.LinkInfoOf(link)
	if err != nil {
		return err
	}
	return names.Forget(info)
}

// removeLegacy takes out a program without a link.
func (op *opened) removeLegacy(prog uint32) error {
	p, err := ebpf.NewProgramFromID(ebpf.ProgramID(prog))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // the program is gone meanwhile
	}
	if err != nil {
		return kernel.Errno(fmt.Sprintf("program id %d", prog), err)
	}
	defer p.Close()
	err = op.do(func(target int) error { return kernel.DetachProgram(p, target, op.kind.Attach) })
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return kernel.Errno("detach the program", err)
}

// Read describes what is on the hook.
func (Family) Read(o *target.Opened) (*hook.Chain, error) { return look(o, (*opened).read) }

// ReadOnDevice describes what is on the hook of a device in the thread's namespace.
func ReadOnDevice(o *target.Opened, d rtnl.Device, names *Names) (*hook.Chain, error) {
	op := &opened{Opened: o, names: names, kind: kernel.KindOf(o.Hook), name: d.Name, index: d.Index, begins: d.Begins(), here: true}
	return op.read()
}

// ReadOnCgroup describes what is on the hook of a cgroup.
func ReadOnCgroup(o *target.Opened, cg *kernel.Cgroup, names *Names) (*hook.Chain, error) {
	op := &opened{Opened: o, names: names, kind: kernel.KindOf(o.Hook), cgroup: cg}
	return op.read()
}

func (op *opened) read() (*hook.Chain, error) {
	list, err := op.look()
	if err != nil {
		return nil, err
	}
	return op.view(list), nil
}

// look is list for readers, who do not have the lock. Others may be in the middle of an
// attachment: the link is there, but its record is not yet, since only the kernel knows the
// link's id before. Where that is possible look lets them finish, and looks again.
func (op *opened) look() (list *order, err error) {
	list, err = op.list()
	if err == nil && slices.ContainsFunc(list.Order, func(e entry) bool { return e.unnamed }) {
		op.Pins.Undisturbed(func() {
			op.names.pinned = nil // read again
			list, err = op.list()
		})
	}
	return list, err
}

// view describes an order for users.
func (op *opened) view(list *order) *hook.Chain {
	c := &hook.Chain{
		Hook: op.Hook, Target: op.target(), Ifindex: op.index, Begins: op.begins, Revision: list.revision,
		Pins: []string{}, Members: []hook.Member{},
	}
	if op.cgroup != nil {
		c.CgroupID = op.cgroup.ID
	} else {
		c.NetNS = op.NS.ID()
	}
	for _, e := range list.Order {
		if e.Leaving {
			continue
		}
		m := viewEntry(e)
		if op.cgroup != nil {
			m.Detail = cgroupFlags(list.flags, e)
		}
		if e.pinned {
			c.Pins = append(c.Pins, op.Pins.List(state.LinkFolder(op.Hook, e.Link))...)
		}
		c.Members = append(c.Members, m)
	}
	return c
}

func viewEntry(e entry) hook.Member {
	m := hook.Member{
		Name: e.Name, LinkID: e.Link, Persistent: e.pinned,
		Kind: hook.KindMember, State: hook.StateRunning,
	}
	m.Program, m.TailCalls = target.ProgramAt(e.Program)
	switch {
	case e.rec != nil:
		m.Priority, m.Owner = e.rec.Priority, e.rec.Owner
	case e.Name != "": // a member that is pinned, but has no record
	case e.Link != 0:
		m.Kind = hook.KindForeign
	default:
		m.Kind = hook.KindLegacy
	}
	if m.Name == "" {
		m.Name = m.Program.Name
	}
	return m
}

// cgroupFlags says in words how legacy programs share a cgroup. Links always share it.
func cgroupFlags(flags uint32, e entry) string {
	switch {
	case e.Link != 0:
		return ""
	case flags&unix.BPF_F_ALLOW_MULTI != 0:
		return "allow-multi"
	case flags&unix.BPF_F_ALLOW_OVERRIDE != 0:
		return "allow-override"
	}
	return "exclusive"
}
