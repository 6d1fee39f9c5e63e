package links

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// opened is an opened target on a hook where the kernel keeps the order: TCX, or a
// cgroup's hook.
type opened struct {
	*target.Opened
	names  *Names
	kind   kernel.Kind
	name   string           // of the device
	index  int              // of the device
	begins hook.Begins      // what packets on the device begin with
	cgroup *kernel.Cgroup   // nil for a device
	moved  bool             // the device has moved: close closes its namespace
	here   bool             // the thread is in the device's namespace
	held   *kernel.LinkInfo // the link of the handle that looks
}

// open finds the device or opens the cgroup of a target. The caller closes the result.
func open(o *target.Opened, names *Names) (*opened, error) {
	op := &opened{Opened: o, names: names, kind: kernel.KindOf(o.Hook)}
	var err error
	if o.Hook.OnCgroup() {
		op.cgroup, err = kernel.OpenCgroup(o.Name)
		return op, err
	}
	err = rtnl.In(o.NS, func(conn *rtnl.Conn) error {
		d, err := conn.Device(o.Name)
		if err == nil {
			op.name, op.index, op.begins = d.Name, d.Index, d.Begins()
		}
		return err
	})
	return op, err
}

// withOpened runs fn with the opened target and the members' names.
func withOpened(o *target.Opened, fn func(op *opened) error) error {
	names := OpenNames(o)
	defer names.Close()
	op, err := open(o, names)
	if err != nil {
		return err
	}
	defer op.close()
	return fn(op)
}

// look returns the answer of fn, which gets the opened target and the members' names.
func look[T any](o *target.Opened, fn func(op *opened) (T, error)) (answer T, err error) {
	err = withOpened(o, func(op *opened) error {
		answer, err = fn(op)
		return err
	})
	return answer, err
}

// withOrder is withOpened for an operation that needs the order of what is there.
func withOrder(o *target.Opened, fn func(op *opened, list *order) error) error {
	return withOpened(o, func(op *opened) error { return op.withOrder(fn) })
}

func (op *opened) withOrder(fn func(op *opened, list *order) error) error {
	list, err := op.list()
	if err != nil {
		return err
	}
	return fn(op, list)
}

func (op *opened) close() {
	if op.cgroup != nil {
		op.cgroup.Close()
	}
	if op.moved {
		op.NS.Close()
	}
}

// seen returns where a member on the opened target is, for its record.
func (op *opened) seen() state.LastSeen {
	if op.cgroup != nil {
		return state.LastSeen{Target: op.cgroup.Path}
	}
	return state.LastSeen{Target: op.name, NetNS: op.NS.ID()}
}

// do runs fn with the number of the target, in the namespace where it is valid: the
// device's index, or the cgroup's descriptor.
func (op *opened) do(fn func(target int) error) error {
	switch {
	case op.cgroup != nil:
		return fn(op.cgroup.FD())
	case op.here:
		return fn(op.index)
	}
	return op.NS.Do(func() error { return fn(op.index) })
}

// An entry is one program on the opened target.
type entry struct {
	target.Entry
	carried uint32 // what is attached: the program, or the stand-in that runs it
	rec     *state.Record
	pinned  bool
	unnamed bool // a link without a record, of a program that has records
}

// An order is what was on an opened target at one moment, in run order.
type order struct {
	target.Order[entry]
	revision uint64 // 0 where the kernel does not count
	flags    uint32 // BPF_F_ALLOW_* of a cgroup
}

// list reads the order. The error is kernel.ErrAgain when it changed meanwhile.
func (op *opened) list() (*order, error) {
	q, err := op.query(0)
	if err != nil {
		return nil, err
	}
	list := &order{revision: q.Revision, flags: q.Flags}
	if op.cgroup != nil {
		if q.Links, err = op.matchLinks(q.Programs); err != nil {
			return nil, err
		}
		now, err := op.query(0)
		if err != nil {
			return nil, err
		}
		if now.Revision != q.Revision || !slices.Equal(now.Programs, q.Programs) {
			return nil, kernel.ErrAgain
		}
	}
	for i, prog := range q.Programs {
		e, err := op.names.entry(op.Hook, op.kind.Attach, prog, q.Links[i])
		if err != nil {
			return nil, err
		}
		list.Order = append(list.Order, e)
	}
	for _, e := range list.Order {
		if e.rec == nil || e.rec.MovedFrom == 0 {
			continue
		}
		if j := list.WithLink(e.rec.MovedFrom); j >= 0 {
			list.Order[j].Leaving = true
		}
	}
	return list, nil
}

func (op *opened) query(flags uint32) (q *kernel.Query, err error) {
	err = op.do(func(target int) error {
		q, err = kernel.QueryPrograms(target, op.kind.Attach, flags)
		return err
	})
	switch {
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.E2BIG): // the kernel is too old to query
		return nil, kernel.Needs(op.Hook, err)
	case errors.Is(err, unix.ENODEV):
		return nil, hook.Because(fs.ErrNotExist, "device %q does not exist any more", op.name)
	case err != nil:
		return nil, kernel.Errno("query "+string(op.Hook), err)
	}
	return q, nil
}

// matchLinks finds the links of the programs on a cgroup, since the query does not
// return links. If one program has several entries, and only some have links, the
// kernel does not tell which: matchLinks takes the first ones. A process that may not
// list links finds those that are pinned; they must be all that is there.
func (op *opened) matchLinks(programs []uint32) ([]uint32, error) {
	found := make([]uint32, len(programs))
	if len(programs) == 0 {
		return found, nil
	}
	links := op.Links
	var refused error
	if links == nil {
		var err error
		if links, err = kernel.AllLinks(); errors.Is(err, hook.ErrPermission) {
			refused = err
			links, err = op.pinnedLinks()
		}
		if err != nil {
			return nil, err
		}
	}
	for _, l := range links {
		if l.Type != link.CgroupType || l.CgroupID != op.cgroup.ID || l.Attach != op.kind.Attach {
			continue
		}
		for i, prog := range programs {
			if prog == l.Program && found[i] == 0 {
				found[i] = l.ID
				break
			}
		}
	}
	if i := slices.Index(found, 0); i >= 0 && refused != nil {
		return nil, fmt.Errorf("program %d is on %s, and no pin says by which link: %w", programs[i], op, refused)
	}
	return found, nil
}

// pinnedLinks returns the links that can be found without their ids: those that are pinned
// on the hook, and the link of the handle.
func (op *opened) pinnedLinks() ([]kernel.LinkInfo, error) {
	var links []kernel.LinkInfo
	add := func(info *kernel.LinkInfo) {
		if !slices.ContainsFunc(links, func(l kernel.LinkInfo) bool { return l.ID == info.ID }) {
			links = append(links, *info)
		}
	}
	if op.held != nil {
		add(op.held)
	}
	pinned, err := op.names.allPinned()
	if err != nil {
		return nil, err
	}
	for folder, member := range pinned {
		l, err := kernel.LoadPinnedLink(op.Pins.HeldPath(folder, member))
		if errors.Is(err, fs.ErrNotExist) {
			continue // unpinned meanwhile
		}
		if err != nil {
			return nil, err
		}
		info, err := kernel.LinkInfoOf(l)
		l.Close()
		if err != nil {
			return nil, err
		}
		add(info)
	}
	return links, nil
}

// neighbor returns the position that puts a new link at index i. The error is
// ErrNotSupported when the kernel cannot put a link there.
func (op *opened) neighbor(l *order, i int) (kernel.Neighbor, error) {
	switch n := len(l.Order); {
	case i == n && (op.cgroup == nil || l.revision == 0):
		return kernel.Neighbor{}, nil // the end: known to every kernel
	case op.cgroup != nil && l.revision == 0:
		return kernel.Neighbor{}, hook.Because(ebpf.ErrNotSupported, "number %d of %d: a place among others on a cgroup needs Linux 6.17: %w", i+1, n+1, ebpf.ErrNotSupported).
			Hint("this kernel attaches behind all others: ask for that (--last), or for a priority of %d", max(l.highest(), hook.DefaultPriority))
	case i == 0:
		return kernel.Before(0, false), nil
	case i == n:
		return kernel.After(0, false), nil
	case l.Order[i].Link != 0:
		return kernel.Before(l.Order[i].Link, true), nil
	case l.Order[i-1].Link != 0:
		return kernel.After(l.Order[i-1].Link, true), nil
	case op.cgroup != nil:
		return kernel.Neighbor{}, hook.Because(ebpf.ErrNotSupported, "number %d of %d is between programs %d and %d, which have no links, and the kernel puts a link on a cgroup next to links only: %w",
			i+1, n+1, l.Order[i-1].Program, l.Order[i].Program, ebpf.ErrNotSupported).
			Hint("adopt one of them first (id:%d), or choose another place", l.Order[i-1].Program)
	}
	return kernel.Before(l.Order[i].carried, false), nil
}

// highest returns the highest priority of the members, 0 without members.
func (l *order) highest() (highest int) {
	for _, e := range l.Order {
		if e.rec != nil {
			highest = max(highest, e.rec.Priority)
		}
	}
	return highest
}

// create attaches a program with a link of its own; the caller closes it. The error is
// kernel.ErrAgain when the order has changed since it was read.
func (op *opened) create(prog *ebpf.Program, at kernel.Neighbor, l *order) (kernel.RawLink, error) {
	var made link.Link
	kernel.Step("create: before")
	err := op.do(func(target int) (err error) {
		made, err = kernel.CreateLink(prog, target, op.kind.Attach, at, l.revision)
		return err
	})
	kernel.Step("create: after")
	switch {
	case err == nil:
		return kernel.AsRaw(made)
	case errors.Is(err, unix.ESTALE), errors.Is(err, unix.ENOENT) && at.ID != 0:
		return nil, fmt.Errorf("%w: %w", kernel.ErrAgain, err)
	case errors.Is(err, unix.EEXIST):
		return nil, op.twice(prog)
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENOENT):
		return nil, hook.Because(fs.ErrNotExist, "%s does not exist any more", op)
	case errors.Is(err, unix.ERANGE), errors.Is(err, unix.E2BIG):
		return nil, hook.Because(hook.ErrChainFull, "%s has %d programs, and the kernel takes no more", op, len(l.Order))
	case errors.Is(err, unix.EPERM) && op.cgroup != nil:
		if occupied := op.closed(l); occupied != nil {
			return nil, occupied
		}
	case errors.Is(err, unix.EINVAL):
		return nil, hook.Because(hook.ErrIncompatible, "the kernel does not take the program on %s: it was loaded for another hook (expected attach type); load it from SEC(%q)", op.Hook, op.Hook)
	}
	return nil, kernel.Errno("create the link", err)
}

func (op *opened) String() string {
	if op.cgroup != nil {
		return "the cgroup " + op.cgroup.Path
	}
	return fmt.Sprintf("device %q", op.name)
}

// twice returns the refusal of a program that is on the hook already: fs.ErrExist. TCX
// takes a program once (bpf_mprog_attach, kernel/bpf/mprog.c).
func (op *opened) twice(prog *ebpf.Program) error {
	return hook.Because(fs.ErrExist, "program %d is on %s already, and the kernel takes a program there once", kernel.ProgramID(prog), op.Hook).
		Hint("load it again, from its file")
}

// closed returns ErrBusy with the legacy program that keeps links off the cgroup: a
// program attached for itself alone, to this cgroup or above (hierarchy_allows_attach,
// kernel/bpf/cgroup.c). It returns nil if it finds no such program.
func (op *opened) closed(l *order) error {
	if len(l.Order) > 0 && !sharesCgroup(l.flags) {
		return op.alone(l.Order[0].Program, op.cgroup.Path)
	}
	q, where, err := nearestAbove(op.cgroup, op.Hook)
	if err == nil && q != nil && q.Flags&(unix.BPF_F_ALLOW_MULTI|unix.BPF_F_ALLOW_OVERRIDE) == 0 {
		return op.alone(q.Programs[0], where)
	}
	return nil
}

// alone returns ErrBusy for a program that is on a cgroup for itself alone.
func (op *opened) alone(prog uint32, where string) error {
	return hook.Because(hook.ErrBusy, "it was attached to %s for itself alone (without BPF_F_ALLOW_MULTI)", where).
		HeldBy(&hook.Occupant{Kind: hook.KindLegacy, Program: target.ProgramOf(prog)}).
		Hint("make it a member with \"%s\", or detach it", op.Command(nil, "adopt", string(op.Hook), where))
}
