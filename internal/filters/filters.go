package filters

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// Family is the family of the clsact hooks: each member is a direct-action filter.
// A filter has no owner, so a member stays until it is detached. The filter's label
// is all that is known about the member.
type Family struct{}

// label is the name of a member's filter.
type label struct {
	Name, Owner string
	Priority    int
}

// labelFormat is the format of a label. A name has no spaces, and comes last. A dash
// stands for an unknown owner; no name starts with a dash.
const labelFormat = "libdispatcher priority=%d owner=%s name=%s"

func (l label) String() string {
	owner := l.Owner
	if owner == "" {
		owner = "-"
	}
	return fmt.Sprintf(labelFormat, l.Priority, owner, l.Name)
}

// parseLabel parses the name of a filter. ok is false when the name is no label.
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

// A side is the ingress or the egress of a device's clsact qdisc, with its filters.
type side struct {
	opened *target.Opened
	dev    *rtnl.Device
	list   target.Order[entry]
	all    target.Order[entry] // list, and the filters that list leaves out
	others []rtnl.Filter       // filters of other kinds than bpf
}

type entry struct {
	target.Entry
	rtnl.Filter
	owner string
}

// ours reports whether the filter is a member.
func (e entry) ours() bool { return e.Entry.Name != "" }

// label returns the name of the member's filter.
func (e entry) label() string { return label{e.Entry.Name, e.owner, e.Priority}.String() }

// A finder finds the device that the side is on.
type finder func(*rtnl.Conn) (*rtnl.Device, error)

// byName finds the device of the opened target.
func byName(o *target.Opened) finder {
	return func(conn *rtnl.Conn) (*rtnl.Device, error) { return conn.Device(o.Name) }
}

// onSide runs fn with what is on the hook, in the namespace of the opened target. It
// tries again while fn returns ErrAgain.
func onSide(ctx context.Context, o *target.Opened, find finder, fn func(conn *rtnl.Conn, sd *side) error) error {
	return kernel.Retry(ctx, func() error { return withSide(o, find, fn) })
}

// changeSide is onSide with the lock held. It first removes what a process left that
// died in a move: the second of two filters of the same member.
func changeSide(ctx context.Context, o *target.Opened, find finder, fn func(conn *rtnl.Conn, sd *side) error) error {
	return o.Change(ctx, func(l *state.Locked) error {
		return withSide(o, find, func(conn *rtnl.Conn, sd *side) error {
			if l != nil && l.Alone {
				if err := sd.dropTwins(conn); err != nil {
					return err
				}
			}
			return fn(conn, sd)
		})
	})
}

// dropTwins removes all filters of each member except the first.
func (sd *side) dropTwins(conn *rtnl.Conn) error {
	seen := map[string]bool{}
	var left target.Order[entry]
	for _, e := range sd.list {
		if e.ours() && seen[e.Entry.Name] {
			if err := sd.delete(conn, e); err != nil {
				return err
			}
			continue
		}
		seen[e.Entry.Name] = e.ours() || seen[e.Entry.Name]
		left = append(left, e)
	}
	sd.list = left
	return nil
}

// delete removes the filter. A filter that is gone already is no error.
func (sd *side) delete(conn *rtnl.Conn, e entry) error {
	err := conn.DeleteFilter(sd.dev.Index, e.Filter.Filter)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func withSide(o *target.Opened, find finder, fn func(conn *rtnl.Conn, sd *side) error) error {
	return rtnl.In(o.NS, func(conn *rtnl.Conn) error {
		dev, err := find(conn)
		if err != nil {
			return err
		}
		all, err := conn.Filters(dev.Index)
		if err != nil {
			return err
		}
		return fn(conn, newSide(o, o.Hook, dev, all))
	})
}

// ViewFilters describes the members and the other filters of a hook, for users.
func ViewFilters(o *target.Opened, dev *rtnl.Device, all []rtnl.Filter) *hook.Chain {
	return newSide(o, o.Hook, dev, all).view()
}

func newSide(o *target.Opened, h hook.Hook, dev *rtnl.Device, all []rtnl.Filter) *side {
	sd := &side{opened: o, dev: dev}
	for _, f := range all {
		if f.Hook() != h {
			continue
		}
		if f.Kind != "bpf" {
			sd.others = append(sd.others, f)
			continue
		}
		e := entry{Entry: target.Entry{Program: f.Program, Stays: true}, Filter: f}
		if l, ok := parseLabel(f.Name); ok && f.DirectAction {
			e.Entry.Name, e.owner, e.Priority = l.Name, l.Owner, l.Priority
		}
		sd.list = append(sd.list, e)
	}
	sd.all = sd.list
	return sd
}

// without returns a copy of the side without the filter at i.
func (sd *side) without(i int) *side {
	less := *sd
	less.list = sd.list.Without(i)
	return &less
}

// put adds a member at index i. Its preference lies between the preferences of its
// neighbours, and equals its priority if possible. If no preference is left between
// them, the member shares the preference of the member after it: of filters with
// equal preference the newest runs first. The members of that preference that must
// run before the new one are then added again, and meet packets twice for a moment.
func (sd *side) put(conn *rtnl.Conn, i int, prog *ebpf.Program, lb label) error {
	f, before, err := sd.free(i, lb.Priority)
	if err != nil {
		return err
	}
	if err := addFilter(conn, sd.dev.Index, f, prog, lb.String()); err != nil {
		return err
	}
	for _, e := range slices.Backward(before) {
		f.Handle++
		again, err := ebpf.NewProgramFromID(ebpf.ProgramID(e.Entry.Program))
		if err != nil {
			return kernel.Errno("the program of "+e.Entry.Name, err)
		}
		err = addFilter(conn, sd.dev.Index, f, again, e.label())
		again.Close()
		if err == nil {
			err = sd.delete(conn, e)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// parent is where the filters of the side are.
func (sd *side) parent() uint32 {
	if sd.opened.Hook == hook.TCEgress {
		return rtnl.ClsactEgress
	}
	return rtnl.ClsactIngress
}

// otherKinds returns the preferences in chain 0 that have filters of another kind than bpf,
// and that kind: a preference has one kind of filters (tcf_chain_tp_find, net/sched/cls_api.c).
func (sd *side) otherKinds() map[int]string {
	kinds := map[int]string{}
	for _, f := range sd.others {
		if f.Chain == 0 {
			kinds[int(f.Pref)] = f.Kind
		}
	}
	return kinds
}

// shared returns the refusal to add a filter to a block of several devices: ErrNotSupported.
// The kernel refuses it on a device, and in the block it would be for the other devices too.
func (sd *side) shared(conn *rtnl.Conn) error {
	block, err := conn.SharedBlock(sd.dev.Index, sd.parent())
	if err != nil || block == 0 {
		return err
	}
	return hook.Because(ebpf.ErrNotSupported, "the filters are in block %d, which its devices share (%s of tc): a member cannot be of one device", block,
		map[hook.Hook]string{hook.TCIngress: "ingress_block", hook.TCEgress: "egress_block"}[sd.opened.Hook]).
		Hint("use %s, where each device has programs of its own (Linux 6.6)", withLinks(sd.opened.Hook))
}

// free returns the place of a new filter at index i, and the members of the same
// preference that must be added again after it. The error is ErrBusy when the only preference left has filters of other tools.
func (sd *side) free(i, priority int) (f hook.Filter, before target.Order[entry], err error) {
	others := sd.otherKinds()
	f = hook.Filter{Parent: sd.parent(), Protocol: unix.ETH_P_ALL, Handle: 1, DirectAction: true}
	above, below := 0, hook.MaxPriority+1
	if i > 0 {
		above = int(sd.list[i-1].Pref)
	}
	if i < len(sd.list) {
		below = int(sd.list[i].Pref)
	}
	wanted := min(max(priority, above+1), below-1)
	for away := 0; wanted-away > above || wanted+away < below; away++ { // the nearest, and rather behind
		for _, pref := range []int{wanted + away, wanted - away} {
			if pref > above && pref < below && others[pref] == "" {
				f.Pref = uint16(pref)
				return f, nil, nil
			}
		}
	}
	// Other tools may delete all filters of a preference: share none with them.
	if !sd.allOurs(below) {
		return f, nil, hook.Because(hook.ErrBusy, "there is no preference (pref) left between %d and %d, the filters that are to run before and after it%s", above, below, between(others, above, below)).
			Hint("choose another priority")
	}
	f.Pref = uint16(below)
	for _, e := range sd.all {
		if e.Pref == f.Pref {
			f.Handle = max(f.Handle, e.Handle+1)
		}
	}
	for _, e := range sd.list[:i] {
		if e.Pref == f.Pref {
			before = append(before, e)
		}
	}
	return f, before, nil
}

// between says which filters have the preferences between two others.
func between(others map[int]string, above, below int) string {
	var list []string
	for _, pref := range slices.Sorted(maps.Keys(others)) {
		if pref > above && pref < below {
			list = append(list, fmt.Sprintf("%s at %d", others[pref], pref))
		}
	}
	if len(list) == 0 {
		return ""
	}
	return ", with filters of other kinds between them: " + strings.Join(list, ", ")
}

// allOurs reports whether there are filters with the preference, and all are members.
func (sd *side) allOurs(pref int) bool {
	found := false
	for _, e := range sd.all {
		if int(e.Pref) == pref {
			if !e.ours() || e.Chain != 0 || e.Protocol != unix.ETH_P_ALL {
				return false
			}
			found = true
		}
	}
	return found
}

// settle returns the index of a new member, and its label.
func (sd *side) settle(prog *load.Loaded, req target.Request) (int, label, error) {
	i, name, priority, err := sd.list.Join(prog, req)
	return i, label{name, req.Owner, priority}, err
}

// Attach loads the program and adds it as a member. The caller closes the handle; the
// member stays. The error is ErrUsage unless the member is persistent.
func (Family) Attach(ctx context.Context, o *target.Opened, src load.Source, req target.Request) (target.Handle, error) {
	if !req.Persistent {
		return nil, hook.Because(hook.ErrUsage, "a filter of tc belongs to nobody: it stays when its process ends, and so it can only be persistent").
			Hint("ask for that (Persistent; without --hold), or use %s, where a link owns a member (Linux 6.6)", withLinks(o.Hook))
	}
	prog, err := load.PinningIn(src, o.BPFFS).Load(load.Want{Hook: o.Hook, Begins: o.Begins})
	if err != nil {
		return nil, err
	}
	h := &handle{Base: target.Base{Opened: o, Loaded: prog}}
	err = changeSide(ctx, o, byName(o), func(conn *rtnl.Conn, sd *side) error {
		i, lb, err := sd.settle(prog, req)
		if err != nil {
			return err
		}
		h.name, h.index = lb.Name, sd.dev.Index
		if err := conn.EnsureClsact(sd.dev.Index); err != nil {
			return err
		}
		if err := sd.shared(conn); err != nil {
			return err
		}
		kernel.Step("attach: qdisc")
		err = sd.put(conn, i, prog.Program, lb)
		kernel.Step("attach: attached")
		return err
	})
	if err != nil {
		prog.Discard()
		return nil, err
	}
	return h, nil
}

// addFilter adds a member's filter. The error is kernel.ErrAgain when another process
// has taken the place meanwhile.
func addFilter(conn *rtnl.Conn, index int, f hook.Filter, prog *ebpf.Program, name string) error {
	err := conn.AddFilter(index, f, prog.FD(), name)
	if errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("%w: %w", kernel.ErrAgain, err)
	}
	return err
}

// withLinks returns the TCX hook at the same side: its members have links.
func withLinks(h hook.Hook) hook.Hook {
	if h == hook.TCEgress {
		return hook.TCXEgress
	}
	return hook.TCXIngress
}

// Plan loads the program, describes the hook as Attach would leave it, and changes
// nothing.
func (Family) Plan(ctx context.Context, o *target.Opened, src load.Source, req target.Request) (c *hook.Chain, err error) {
	prog, err := load.PinningIn(src, o.BPFFS).Load(load.Want{Hook: o.Hook, Begins: o.Begins})
	if err != nil {
		return nil, err
	}
	defer prog.Discard()
	err = onSide(ctx, o, byName(o), func(conn *rtnl.Conn, sd *side) error {
		i, lb, err := sd.settle(prog, req)
		if err != nil {
			return err
		}
		if err := sd.shared(conn); err != nil {
			return err
		}
		f, _, err := sd.free(i, lb.Priority)
		if err != nil {
			return err
		}
		e := entry{Filter: rtnl.Filter{Filter: f, Name: lb.String()}, Entry: target.Entry{Program: kernel.ProgramID(prog.Program), Name: lb.Name, Priority: lb.Priority}, owner: lb.Owner}
		sd.list = slices.Insert(sd.list, i, e)
		c = sd.view()
		return nil
	})
	return c, err
}

// Open returns a handle to a member; the caller closes it. The error is
// fs.ErrNotExist for an unknown ref, and ErrBusy for a filter that is no member.
func (Family) Open(o *target.Opened, ref hook.Ref) (h target.Handle, err error) {
	err = withSide(o, byName(o), func(_ *rtnl.Conn, sd *side) error {
		i, err := sd.list.Find(ref)
		if err != nil {
			return err
		}
		if !sd.list[i].ours() {
			return sd.legacy(sd.list[i])
		}
		h = sd.handle(sd.list[i].Entry.Name)
		return nil
	})
	return h, err
}

// handle returns a handle to the member of the name.
func (sd *side) handle(name string) *handle {
	return &handle{Base: target.Base{Opened: sd.opened}, name: name, index: sd.dev.Index}
}

// legacy returns the refusal of a filter that is no member: ErrBusy.
func (sd *side) legacy(e entry) error {
	hint := "it is not a member; --force detaches it all the same"
	if e.DirectAction {
		hint = fmt.Sprintf("make it a member with \"%s\", or detach it with --force",
			sd.opened.Command(nil, "adopt", string(sd.opened.Hook), sd.dev.Name, string(hook.ProgramRef(e.Entry.Program))))
	}
	return hook.Busy(&hook.Occupant{Kind: hook.KindLegacy, Program: target.ProgramOf(e.Entry.Program)}).
		Hint("%s", hint)
}

// Detach removes the filter that ref names, or all members for an empty ref. A filter
// of another tool must be named, and needs force. The error is fs.ErrNotExist when
// there is no such filter, and ErrBusy when there is only one of another tool.
func (Family) Detach(ctx context.Context, o *target.Opened, ref hook.Ref, force bool) error {
	return changeSide(ctx, o, byName(o), func(conn *rtnl.Conn, sd *side) error {
		return sd.list.Detach(ref, force, sd.legacy, func(e entry) error {
			err := sd.delete(conn, e)
			kernel.Step("detach: detached")
			return err
		})
	})
}

// Read describes what is on the hook.
func (Family) Read(o *target.Opened) (c *hook.Chain, err error) {
	err = withSide(o, byName(o), func(_ *rtnl.Conn, sd *side) error {
		c = sd.view()
		return nil
	})
	return c, err
}
