package attach

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/state"
)

// A spot is a hook of one device or cgroup whose programs the kernel orders
// itself: TCX, or a cgroup's.
type spot struct {
	hook   hook.Hook
	kind   kernel.Kind
	name   string         // of the device
	index  int            // of the device
	ns     *kernel.NetNS  // of the device
	cgroup *kernel.Cgroup // nil for a device
	owned  bool           // ns is to be closed with the spot
	here   bool           // the thread is in ns

	asked Place // for hints
}

// spot opens what the site is about.
func (s *site) spot() (*spot, error) {
	sp := &spot{hook: s.Hook, kind: kernel.KindOf(s.Hook), ns: s.ns, asked: s.Place}
	var err error
	if s.Hook.OnCgroup() {
		sp.cgroup, err = kernel.OpenCgroup(s.Target)
		return sp, err
	}
	err = s.ns.Do(func() error {
		d, err := device(s.Target)
		if err == nil {
			sp.name, sp.index = d.Name, d.Index
		}
		return err
	})
	return sp, err
}

// device finds a device in the namespace of the thread.
func device(name string) (*rtnl.Device, error) {
	conn, err := rtnl.Dial()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	return conn.Device(name)
}

func (sp *spot) close() {
	if sp.cgroup != nil {
		sp.cgroup.Close()
	}
	if sp.owned {
		sp.ns.Close()
	}
}

// home is where a member on the spot is.
func (sp *spot) home() state.LastSeen {
	if sp.cgroup != nil {
		return state.LastSeen{Target: sp.cgroup.Path}
	}
	return state.LastSeen{Target: sp.name, NetNS: sp.ns.ID()}
}

// do runs fn where the target is known by a number: an index or a descriptor.
func (sp *spot) do(fn func(target int) error) error {
	switch {
	case sp.cgroup != nil:
		return fn(sp.cgroup.FD())
	case sp.here:
		return fn(sp.index)
	}
	return sp.ns.Do(func() error { return fn(sp.index) })
}

// An entry is one program on the spot.
type entry struct {
	prog    uint32
	carried uint32 // the same, or the stand-in that runs it
	link    uint32 // 0 for one without
	name    string // of a member; empty for what is not ours
	rec     *state.Record
	pinned  bool
	// leaving: another entry has taken its place, and it is about to go.
	leaving bool
}

// A listing is what was on a spot at one moment, in run order.
type listing struct {
	entries  []entry
	revision uint64 // 0 where the kernel does not count
	flags    uint32 // BPF_F_ALLOW_* of a cgroup
}

// list reads what is on the spot, and whose it is. links are those of
// [AllLinks]; nil to look for them when they are needed.
func (sp *spot) list(names *names, links []LinkInfo) (*listing, error) {
	q, err := sp.query(0)
	if err != nil {
		return nil, err
	}
	list := &listing{revision: q.Revision, flags: q.Flags}
	if sp.cgroup != nil {
		if q.Links, err = sp.matchLinks(q.Programs, links); err != nil {
			return nil, err
		}
		now, err := sp.query(0)
		if err != nil {
			return nil, err
		}
		if now.Revision != q.Revision || !slices.Equal(now.Programs, q.Programs) {
			return nil, kernel.ErrAgain
		}
	}
	for i, prog := range q.Programs {
		e, err := names.entry(sp, prog, q.Links[i])
		if err != nil {
			return nil, err
		}
		list.entries = append(list.entries, e)
	}
	for i, e := range list.entries {
		if e.rec == nil {
			continue
		}
		if e.rec.MovedTo != 0 && list.withLink(e.rec.MovedTo) >= 0 {
			list.entries[i].leaving = true
		}
		// The new one's record is written first.
		if j := list.withLink(e.rec.MovedFrom); e.rec.MovedFrom != 0 && j >= 0 {
			list.entries[j].leaving = true
		}
	}
	return list, nil
}

func (sp *spot) query(flags uint32) (q *kernel.Query, err error) {
	err = sp.do(func(target int) error {
		q, err = kernel.QueryPrograms(target, sp.kind.Attach, flags)
		return err
	})
	switch {
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.E2BIG): // before there were links to ask for
		return nil, needs(sp.hook, err)
	case errors.Is(err, unix.ENODEV):
		return nil, hook.Because(fs.ErrNotExist, "device %q does not exist any more", sp.name)
	case err != nil:
		return nil, kernel.Errno("query "+string(sp.hook), err)
	}
	return q, nil
}

// matchLinks finds the links of the programs on a cgroup: the query does not
// tell. Which of several entries of one program have links cannot be told; it
// is the first ones then.
func (sp *spot) matchLinks(programs []uint32, links []LinkInfo) ([]uint32, error) {
	found := make([]uint32, len(programs))
	if len(programs) == 0 {
		return found, nil
	}
	if links == nil {
		var err error
		if links, err = AllLinks(); err != nil {
			return nil, err
		}
	}
	for _, l := range links {
		if l.Type != link.CgroupType || l.CgroupID != sp.cgroup.ID || l.Attach != sp.kind.Attach {
			continue
		}
		for i, prog := range programs {
			if prog == l.Program && found[i] == 0 {
				found[i] = l.ID
				break
			}
		}
	}
	return found, nil
}

// ranks is what counts of the entries when a place is looked for.
func (l *listing) ranks() []dispatch.Entry {
	ranks := make([]dispatch.Entry, len(l.entries))
	for i, e := range l.entries {
		if e.rec != nil && !e.leaving {
			ranks[i] = dispatch.Entry{Ranked: true, Priority: e.rec.Priority}
		}
	}
	return ranks
}

// named returns the index of the member of that name, or -1.
func (l *listing) named(name string) int {
	return slices.IndexFunc(l.entries, func(e entry) bool { return e.name == name && name != "" && !e.leaving })
}

// withLink returns the index of the entry of that link, or -1.
func (l *listing) withLink(id uint32) int {
	return slices.IndexFunc(l.entries, func(e entry) bool { return e.link == id })
}

// find returns the index of the entry that ref names.
func (l *listing) find(ref hook.Ref) (int, error) {
	i := -1
	switch {
	case ref.Link() != 0:
		i = l.withLink(ref.Link())
	case ref.Program() != 0:
		i = slices.IndexFunc(l.entries, func(e entry) bool { return e.prog == ref.Program() })
	default:
		i = l.named(string(ref))
	}
	if i >= 0 {
		return i, nil
	}
	if len(l.entries) == 0 {
		return -1, hook.Because(fs.ErrNotExist, "there is no %q: nothing is attached", ref)
	}
	there := ""
	for i, e := range l.entries {
		if i > 0 {
			there += ", "
		}
		there += e.String()
	}
	return -1, hook.Because(fs.ErrNotExist, "there is no %q (there are: %s)", ref, there)
}

// String is how a user can refer to the entry.
func (e entry) String() string {
	switch {
	case e.name != "":
		return e.name
	case e.link != 0:
		return string(hook.LinkRef(e.link))
	}
	return string(hook.ProgramRef(e.prog))
}

// without returns the listing less the entry at i.
func (l *listing) without(i int) *listing {
	less := *l
	less.entries = slices.Delete(slices.Clone(l.entries), i, i+1)
	return &less
}

// anchor returns how to tell the kernel that a link is to go to index i.
func (sp *spot) anchor(l *listing, i int) (kernel.Neighbor, error) {
	switch n := len(l.entries); {
	case i == n && (sp.cgroup == nil || l.revision == 0):
		return kernel.Neighbor{}, nil // the end: known to every kernel
	case sp.cgroup != nil && l.revision == 0:
		return kernel.Neighbor{}, hook.Because(ebpf.ErrNotSupported, "number %d of %d: a place among others on a cgroup needs Linux 6.17: %w", i+1, n+1, ebpf.ErrNotSupported).
			Hint("this kernel attaches behind all others: ask for that (--last), or for a priority of %d", max(l.highest(), hook.DefaultPriority))
	case i == 0:
		return kernel.Before(0, false), nil
	case i == n:
		return kernel.After(0, false), nil
	case l.entries[i].link != 0:
		return kernel.Before(l.entries[i].link, true), nil
	case l.entries[i-1].link != 0:
		return kernel.After(l.entries[i-1].link, true), nil
	case sp.cgroup != nil:
		return kernel.Neighbor{}, hook.Because(ebpf.ErrNotSupported, "number %d of %d is between programs %d and %d, which have no links, and the kernel puts a link on a cgroup next to links only: %w",
			i+1, n+1, l.entries[i-1].prog, l.entries[i].prog, ebpf.ErrNotSupported).
			Hint("adopt one of them first (id:%d), or choose another place", l.entries[i-1].prog)
	}
	return kernel.Before(l.entries[i].carried, false), nil
}

// highest is the highest priority of the members.
func (l *listing) highest() (highest int) {
	for _, e := range l.entries {
		if e.rec != nil {
			highest = max(highest, e.rec.Priority)
		}
	}
	return highest
}

// create attaches a program with a link of its own. kernel.ErrAgain when the spot is
// not as it was listed any more.
func (sp *spot) create(prog *ebpf.Program, at kernel.Neighbor, l *listing) (rawLink, error) {
	var made link.Link
	kernel.Step("create: before")
	err := sp.do(func(target int) (err error) {
		made, err = kernel.CreateLink(prog, target, sp.kind.Attach, at, l.revision)
		return err
	})
	kernel.Step("create: after")
	switch {
	case err == nil:
		return asRaw(made)
	case errors.Is(err, unix.ESTALE), errors.Is(err, unix.ENOENT) && at.ID != 0:
		return nil, fmt.Errorf("%w: %w", kernel.ErrAgain, err)
	case errors.Is(err, unix.EEXIST):
		return nil, sp.twice(prog)
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENOENT):
		return nil, hook.Because(fs.ErrNotExist, "%s does not exist any more", sp)
	case errors.Is(err, unix.ERANGE), errors.Is(err, unix.E2BIG):
		return nil, hook.Because(hook.ErrChainFull, "%s has %d programs, and the kernel takes no more", sp, len(l.entries))
	case errors.Is(err, unix.EPERM) && sp.cgroup != nil:
		if occupied := sp.closed(l); occupied != nil {
			return nil, occupied
		}
	case errors.Is(err, unix.EINVAL):
		return nil, hook.Because(hook.ErrIncompatible, "the kernel does not take the program on %s: it was loaded for another hook (expected attach type); load it from SEC(%q)", sp.hook, sp.hook)
	}
	return nil, kernel.Errno("create the link", err)
}

func (sp *spot) String() string {
	if sp.cgroup != nil {
		return "the cgroup " + sp.cgroup.Path
	}
	return fmt.Sprintf("device %q", sp.name)
}

// twice is the refusal of a program that is there already. TCX takes a program
// once (bpf_mprog_attach, kernel/bpf/mprog.c).
func (sp *spot) twice(prog *ebpf.Program) error {
	return hook.Because(fs.ErrExist, "program %d is on %s already, and the kernel takes a program there once", kernel.ProgramID(prog), sp.hook).
		Hint("load it again, from its file")
}

// closed finds the legacy program that keeps links off a cgroup: one attached
// for itself alone, here or above (hierarchy_allows_attach, kernel/bpf/cgroup.c).
func (sp *spot) closed(l *listing) error {
	at, where := l, sp.cgroup.Path
	if len(at.entries) == 0 || at.flags&unix.BPF_F_ALLOW_MULTI != 0 {
		above, err := sp.cgroup.Ancestors()
		if err != nil {
			return nil
		}
		defer kernel.CloseCgroups(above)
		at = nil
		for _, c := range above[1:] {
			q, err := kernel.QueryPrograms(c.FD(), sp.kind.Attach, 0)
			if err == nil && len(q.Programs) > 0 && q.Flags&(unix.BPF_F_ALLOW_MULTI|unix.BPF_F_ALLOW_OVERRIDE) == 0 {
				at, where = &listing{entries: []entry{{prog: q.Programs[0]}}}, c.Path
				break
			}
		}
		if at == nil {
			return nil
		}
	}
	return hook.Because(hook.ErrBusy, "it was attached to %s for itself alone (without BPF_F_ALLOW_MULTI)", where).
		HeldBy(&hook.Occupant{Kind: hook.KindLegacy, Program: programOf(at.entries[0].prog)}).
		Hint("make it a member with \"%s\", or detach it", sp.asked.command("adopt", string(sp.hook), where))
}

// programOf describes a program by its id, as far as it is still there.
func programOf(id uint32) hook.Program {
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
	if err != nil {
		return hook.Program{ID: id}
	}
	defer prog.Close()
	return kernel.Describe(prog)
}

// deviceName names a device in the namespace of the thread.
func deviceName(index int) (string, error) {
	conn, err := rtnl.Dial()
	if err != nil {
		return "", err
	}
	defer conn.Close()
	d, err := conn.DeviceByIndex(index)
	if err != nil {
		return "", err
	}
	return d.Name, nil
}
