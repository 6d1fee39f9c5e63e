package attach

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/state"
)

// filters is the family of the clsact hooks: each member is a direct-action
// filter. Nobody owns a filter, so that a member stays until somebody removes
// it. What is known about it is in the filter's name.
type filters struct{}

// label is the name of a member's filter.
type label struct {
	Name, Owner string
	Priority    int
}

// labelFormat is how a label reads: a name has no spaces, and comes last. An
// owner that is not known is a dash, with which no name starts.
const labelFormat = "libdispatcher priority=%d owner=%s name=%s"

func (l label) String() string {
	owner := l.Owner
	if owner == "" {
		owner = "-"
	}
	return fmt.Sprintf(labelFormat, l.Priority, owner, l.Name)
}

// parseLabel reads the name of a filter; false when it is not a member's.
func parseLabel(s string) (l label, ok bool) {
	if n, err := fmt.Sscanf(s, labelFormat, &l.Priority, &l.Owner, &l.Name); n != 3 || err != nil {
		return label{}, false
	}
	if l.Owner == "-" {
		l.Owner = ""
	}
	ok = l.String() == s && hook.CheckName(l.Name) == nil && (l.Owner == "" || hook.CheckName(l.Owner) == nil) &&
		l.Priority >= hook.MinPriority && l.Priority <= hook.MaxPriority
	return l, ok
}

// A lane is one side of the clsact qdisc of a device.
type lane struct {
	site *site
	dev  *rtnl.Device
	list []laneEntry
	all  []laneEntry // with those that list leaves out
}

type laneEntry struct {
	rtnl.Filter
	label
	ours bool
}

// byName finds the device of the site.
func (s *site) byName(conn *rtnl.Conn) (*rtnl.Device, error) { return conn.Device(s.Target) }

// onLane runs fn with what is on the hook, in the namespace of the site, until
// it succeeds.
func (s *site) onLane(ctx context.Context, find func(*rtnl.Conn) (*rtnl.Device, error), fn func(conn *rtnl.Conn, ln *lane) error) error {
	return kernel.Retry(ctx, func() error { return s.lane(find, fn) })
}

// changeLane is onLane under the lock, with what a process that died in a move
// has left removed: one of two filters of the same member.
func (s *site) changeLane(ctx context.Context, find func(*rtnl.Conn) (*rtnl.Device, error), fn func(conn *rtnl.Conn, ln *lane) error) error {
	return kernel.Retry(ctx, func() error {
		return s.locked(ctx, func(l *state.Locked) error {
			return s.lane(find, func(conn *rtnl.Conn, ln *lane) error {
				if l != nil && l.Alone {
					if err := ln.dropTwins(conn); err != nil {
						return err
					}
				}
				return fn(conn, ln)
			})
		})
	})
}

// dropTwins removes all filters of a member but the first.
func (ln *lane) dropTwins(conn *rtnl.Conn) error {
	seen := map[string]bool{}
	var left []laneEntry
	for _, e := range ln.list {
		if e.ours && seen[e.label.Name] {
			if err := conn.DeleteFilter(ln.dev.Index, e.Filter.Filter); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			continue
		}
		seen[e.label.Name] = e.ours || seen[e.label.Name]
		left = append(left, e)
	}
	ln.list = left
	return nil
}

func (s *site) lane(find func(*rtnl.Conn) (*rtnl.Device, error), fn func(conn *rtnl.Conn, ln *lane) error) error {
	return rtnl.In(s.ns, func(conn *rtnl.Conn) error {
		dev, err := find(conn)
		if err != nil {
			return err
		}
		all, err := conn.Filters(dev.Index)
		if err != nil {
			return err
		}
		return fn(conn, newLane(s, s.Hook, dev, all))
	})
}

func newLane(s *site, h hook.Hook, dev *rtnl.Device, all []rtnl.Filter) *lane {
	ln := &lane{site: s, dev: dev}
	for _, f := range all {
		if f.Hook() != h {
			continue
		}
		e := laneEntry{Filter: f}
		e.label, e.ours = parseLabel(f.Name)
		e.ours = e.ours && f.DirectAction
		ln.list = append(ln.list, e)
	}
	ln.all = ln.list
	return ln
}

func (ln *lane) ranks() []dispatch.Entry {
	ranks := make([]dispatch.Entry, len(ln.list))
	for i, e := range ln.list {
		ranks[i] = dispatch.Entry{Ranked: e.ours, Priority: e.Priority}
	}
	return ranks
}

func (ln *lane) find(ref hook.Ref) (int, error) {
	i := slices.IndexFunc(ln.list, func(e laneEntry) bool {
		if ref.Program() != 0 {
			return e.Program == ref.Program()
		}
		return e.ours && e.label.Name == string(ref)
	})
	if i >= 0 {
		return i, nil
	}
	var there []string
	for _, e := range ln.list {
		there = append(there, e.String())
	}
	if len(there) == 0 {
		return -1, hook.Because(fs.ErrNotExist, "there is no %q: nothing is attached", ref)
	}
	return -1, hook.Because(fs.ErrNotExist, "there is no %q (there are: %s)", ref, strings.Join(there, ", "))
}

// String is how a user can refer to the filter.
func (e laneEntry) String() string {
	if e.ours {
		return e.label.Name
	}
	return string(hook.ProgramRef(e.Program))
}

// without returns the lane less the filter at i.
func (ln *lane) without(i int) *lane {
	less := *ln
	less.list = slices.Delete(slices.Clone(ln.list), i, i+1)
	return &less
}

// put adds a member as number i: at a preference between those of its
// neighbours, at the one that is the priority if it can be. Where none is left it
// shares that of the members after it, since of equals the newest runs first;
// those of equal preference that are to run before it are added once more then,
// and meet packets twice for a moment.
func (ln *lane) put(conn *rtnl.Conn, i int, prog *ebpf.Program, lb label) error {
	f, before, err := ln.free(i, lb.Priority)
	if err != nil {
		return err
	}
	if err := addFilter(conn, ln.dev.Index, f, prog, lb); err != nil {
		return err
	}
	for _, e := range slices.Backward(before) {
		f.Handle++
		again, err := ebpf.NewProgramFromID(ebpf.ProgramID(e.Program))
		if err != nil {
			return kernel.Errno("the program of "+e.label.Name, err)
		}
		err = addFilter(conn, ln.dev.Index, f, again, e.label)
		again.Close()
		if err == nil {
			err = conn.DeleteFilter(ln.dev.Index, e.Filter.Filter)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// free returns where a filter goes that is to be number i, and the members of
// the same preference that are then to be added again.
func (ln *lane) free(i, priority int) (f hook.Filter, before []laneEntry, err error) {
	f = hook.Filter{Parent: rtnl.ClsactIngress, Protocol: unix.ETH_P_ALL, Handle: 1, DirectAction: true}
	if ln.site.Hook == hook.TCEgress {
		f.Parent = rtnl.ClsactEgress
	}
	above, below := 0, hook.MaxPriority+1
	if i > 0 {
		above = int(ln.list[i-1].Pref)
	}
	if i < len(ln.list) {
		below = int(ln.list[i].Pref)
	}
	if pref := min(max(priority, above+1), below-1); pref > above {
		f.Pref = uint16(pref)
		return f, nil, nil
	}
	// Not that of a filter of others, who may delete all of a preference.
	if !ln.allOurs(below) {
		return f, nil, hook.Because(hook.ErrBusy, "there is no preference (pref) left between %d and %d, the filters that are to run before and after it", above, below).
			Hint("choose another priority")
	}
	f.Pref = uint16(below)
	for _, e := range ln.all {
		if e.Pref == f.Pref {
			f.Handle = max(f.Handle, e.Handle+1)
		}
	}
	for _, e := range ln.list[:i] {
		if e.Pref == f.Pref {
			before = append(before, e)
		}
	}
	return f, before, nil
}

// allOurs tells whether there are filters with that preference, all of members.
func (ln *lane) allOurs(pref int) bool {
	found := false
	for _, e := range ln.all {
		if int(e.Pref) == pref {
			if !e.ours || e.Chain != 0 || e.Protocol != unix.ETH_P_ALL {
				return false
			}
			found = true
		}
	}
	return found
}

// settle returns where a new member goes, and its label.
func (ln *lane) settle(prog *load.Loaded, req Request) (int, label, error) {
	lb := label{Name: req.Name, Owner: req.Owner}
	if lb.Name == "" {
		lb.Name = prog.Name
		if err := hook.CheckName(lb.Name); err != nil {
			return 0, lb, hook.Because(hook.ErrUsage, "the program's name will not do for the member: %w; choose one", err)
		}
	}
	if _, err := ln.find(hook.Ref(lb.Name)); err == nil {
		return 0, lb, hook.Because(fs.ErrExist, "there is a member %q already", lb.Name).
			Hint("choose another name, or replace its program")
	}
	byDefault := req.Settings.Or(prog.Defaults).WithDefaults().Priority
	i, priority, err := dispatch.Settle(ln.ranks(), req.Position, ln.find, req.Priority, byDefault)
	if err != nil {
		return 0, lb, err
	}
	lb.Priority = priority
	return i, lb, nil
}

func (filters) attach(ctx context.Context, s *site, src load.Source, req Request) (Handle, error) {
	if !req.Persistent {
		return nil, hook.Because(hook.ErrUsage, "a filter of tc belongs to nobody: it stays when its process ends, and so it can only be persistent").
			Hint("ask for that (Persistent; without --hold), or use %s, where a link owns a member (Linux 6.6)", s.owned())
	}
	prog, err := load.PinningIn(src, s.BPFFS).Load(load.Want{Hook: s.Hook})
	if err != nil {
		return nil, err
	}
	h := &filterHandle{unowned: unowned{site: s, loaded: prog}}
	err = s.changeLane(ctx, s.byName, func(conn *rtnl.Conn, ln *lane) error {
		i, lb, err := ln.settle(prog, req)
		if err != nil {
			return err
		}
		h.name, h.index = lb.Name, ln.dev.Index
		if err := conn.EnsureClsact(ln.dev.Index); err != nil {
			return err
		}
		kernel.Step("attach: qdisc")
		err = ln.put(conn, i, prog.Program, lb)
		kernel.Step("attach: attached")
		return err
	})
	if err != nil {
		prog.Discard()
		return nil, err
	}
	s.ns.Release()
	return h, nil
}

// addFilter adds a member; kernel.ErrAgain when somebody else has taken the place.
func addFilter(conn *rtnl.Conn, index int, f hook.Filter, prog *ebpf.Program, lb label) error {
	err := conn.AddFilter(index, f, prog.FD(), lb.String())
	if errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("%w: %w", kernel.ErrAgain, err)
	}
	return err
}

// owned is the hook at the same side whose members have links.
func (s *site) owned() hook.Hook {
	if s.Hook == hook.TCEgress {
		return hook.TCXEgress
	}
	return hook.TCXIngress
}

func (filters) plan(ctx context.Context, s *site, src load.Source, req Request) (c *hook.Chain, err error) {
	prog, err := load.PinningIn(src, s.BPFFS).Load(load.Want{Hook: s.Hook})
	if err != nil {
		return nil, err
	}
	defer prog.Discard()
	err = s.onLane(ctx, s.byName, func(_ *rtnl.Conn, ln *lane) error {
		i, lb, err := ln.settle(prog, req)
		if err != nil {
			return err
		}
		f, _, err := ln.free(i, lb.Priority)
		if err != nil {
			return err
		}
		e := laneEntry{Filter: rtnl.Filter{Filter: f, Name: lb.String(), Program: kernel.ProgramID(prog.Program)}, label: lb, ours: true}
		ln.list = slices.Insert(ln.list, i, e)
		c = ln.view()
		return nil
	})
	return c, err
}

func (filters) open(ctx context.Context, s *site, ref hook.Ref) (Handle, error) {
	h := &filterHandle{unowned: unowned{site: s}}
	err := s.onLane(ctx, s.byName, func(_ *rtnl.Conn, ln *lane) error {
		i, err := ln.find(ref)
		if err != nil {
			return err
		}
		if !ln.list[i].ours {
			return ln.legacy(ln.list[i])
		}
		h.name, h.index = ln.list[i].label.Name, ln.dev.Index
		return nil
	})
	if err != nil {
		return nil, err
	}
	s.ns.Release()
	return h, nil
}

// legacy is the refusal of a filter that is not ours.
func (ln *lane) legacy(e laneEntry) error {
	hint := "it is not a member; --force detaches it all the same"
	if e.DirectAction {
		hint = fmt.Sprintf("make it a member with \"%s\", or detach it with --force",
			ln.site.command("adopt", string(ln.site.Hook), ln.dev.Name, string(hook.ProgramRef(e.Program))))
	}
	return hook.Busy(&hook.Occupant{Kind: hook.KindLegacy, Program: programOf(e.Program)}).
		Hint("%s", hint)
}

func (filters) detach(ctx context.Context, s *site, ref hook.Ref, force bool) error {
	return s.changeLane(ctx, s.byName, func(conn *rtnl.Conn, ln *lane) error {
		leaving := ln.list
		if ref != "" {
			i, err := ln.find(ref)
			if err != nil {
				return err
			}
			leaving = leaving[i : i+1]
		} else if len(leaving) == 0 {
			return hook.Because(fs.ErrNotExist, "nothing is attached")
		}
		ours := 0
		for _, e := range leaving {
			if !e.ours && (ref == "" || !force) {
				continue
			}
			ours++
			if err := conn.DeleteFilter(ln.dev.Index, e.Filter.Filter); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			kernel.Step("detach: detached")
		}
		if ours == 0 {
			return ln.legacy(leaving[0])
		}
		return nil
	})
}

func (filters) read(ctx context.Context, s *site) (c *hook.Chain, err error) {
	err = s.onLane(ctx, s.byName, func(_ *rtnl.Conn, ln *lane) error {
		c = ln.view()
		return nil
	})
	return c, err
}

// view describes the lane for users.
func (ln *lane) view() *hook.Chain {
	c := &hook.Chain{
		Hook: ln.site.Hook, Target: ln.dev.Name, Ifindex: ln.dev.Index, NetNS: ln.site.ns.ID(),
		Pins: []string{}, Members: []hook.Member{},
	}
	for _, e := range ln.list {
		c.Members = append(c.Members, e.view())
	}
	return c
}

func (e laneEntry) view() hook.Member {
	m := viewEntry(entry{prog: e.Program, name: e.label.Name})
	m.Kind = hook.KindLegacy
	if e.ours {
		m.Kind, m.Priority, m.Owner, m.Persistent = hook.KindMember, e.Priority, e.Owner, true
	}
	if !e.ours && e.Filter.Name != "" {
		m.Name = e.Filter.Name
	}
	f := e.Filter.Filter
	m.Filter = &f
	m.Detail = fmt.Sprintf("pref %d handle %#x", f.Pref, f.Handle)
	if !f.DirectAction {
		m.Detail += ", no direct action"
	}
	return m
}
