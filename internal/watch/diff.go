package watch

import (
	"cmp"
	"slices"

	"github.com/libdispatcher/dispatcher/hook"
)

// Diff returns what changed between two looks, in this order: devices that moved; entries
// that left; entries that changed; entries that came, oldest first; members that were
// overtaken; functions that freplace has replaced. The second look must have gone
// through [Settle].
func Diff(before, after *Look) []hook.Event {
	d := &diff{before: entries(before.Chains), after: entries(after.Chains), look: after}
	match(d.before, d.after)
	d.unreadable(before, after)
	d.moved()
	d.gone()
	stayed := d.stayed()
	for i := range d.after {
		if d.after[i].is >= 0 {
			d.changed(&d.before[d.after[i].is], &d.after[i], stayed[i])
		}
	}
	d.came()
	d.overtaken(stayed)
	d.extended()
	return d.events
}

// Initial returns the events of the first look: what could not be read and, if present is
// set, what is there.
func Initial(now *Look, present bool) []hook.Event {
	d := &diff{after: entries(now.Chains), look: now}
	d.unreadable(&Look{}, now)
	for i := range d.after {
		if present {
			d.add(hook.EventPresent, nil, &d.after[i])
		}
	}
	if present {
		d.extended()
	}
	return d.events
}

type diff struct {
	before, after []entry
	look          *Look
	events        []hook.Event
}

// add reports an event of an entry: b is the entry before and a the entry after. One of
// them may be nil.
func (d *diff) add(kind hook.EventKind, b, a *entry) *hook.Event {
	now := a
	if now == nil {
		now = b
	}
	e := hook.Event{Kind: kind, EventTarget: now.c.At(), Entry: now.m.Kind, Name: now.m.Name, LinkID: now.link()}
	if b != nil {
		e.Before, e.PositionBefore = b.m, b.pos
	}
	if a != nil {
		e.After, e.PositionAfter, e.Entries = a.m, a.pos, len(a.c.Members)
	}
	d.events = append(d.events, e)
	return &d.events[len(d.events)-1]
}

// unreadable reports what could be read before and cannot now.
func (d *diff) unreadable(before, after *Look) {
	for _, u := range after.unread {
		same := func(v unread) bool { return v.EventTarget == u.EventTarget }
		if !slices.ContainsFunc(before.unread, same) {
			d.events = append(d.events, hook.Event{Kind: hook.EventUnreadable, EventTarget: u.EventTarget, Err: u.err})
		}
	}
}

// moved reports devices that have another name or namespace, once for each hook.
func (d *diff) moved() {
	done := map[*hook.Chain]bool{}
	for i := range d.after {
		a := &d.after[i]
		if a.is < 0 || done[a.c] {
			continue
		}
		from, to := d.before[a.is].c.At(), a.c.At()
		gone := idOf(to) == targetID{} // the target is gone, and what is left is defunct
		if gone || from.Hook != to.Hook || from.Target == to.Target && idOf(from) == idOf(to) {
			continue
		}
		done[a.c] = true
		d.events = append(d.events, hook.Event{Kind: hook.EventMoved, EventTarget: to, From: &from, Entries: len(a.c.Members)})
	}
	// Devices that left the one namespace that is watched.
	for i := range d.before {
		b := &d.before[i]
		if b.is >= 0 || done[b.c] || d.look.Links[b.link()] != LinkElsewhere {
			continue
		}
		done[b.c] = true
		from := b.c.At()
		d.events = append(d.events, hook.Event{Kind: hook.EventMoved, EventTarget: hook.EventTarget{Hook: b.c.Hook}, From: &from, Entries: len(b.c.Members)})
	}
}

func (d *diff) gone() {
	for i := range d.before {
		b := &d.before[i]
		// A link that attaches nothing may still exist. It is then shown as defunct.
		if b.m.State != hook.StateDefunct && (b.is < 0 || d.after[b.is].m.State == hook.StateDefunct) {
			d.left(b)
		}
	}
}

func (d *diff) left(b *entry) {
	switch d.look.Links[b.link()] {
	case LinkElsewhere:
	case LinkDefunct:
		d.add(hook.EventDefunct, b, nil)
	default:
		e := d.add(hook.EventLeft, b, nil)
		if c := d.look.chainAt(b.c.At()); c != nil {
			e.Entries = len(c.Members)
		}
	}
}

// stayed tells for each entry that is in both looks whether it kept its place among
// the other such entries.
func (d *diff) stayed() []bool {
	stay := make([]bool, len(d.after))
	for from := 0; from < len(d.after); {
		to := from
		var list, order []int
		for ; to < len(d.after) && d.after[to].c == d.after[from].c; to++ {
			a := &d.after[to]
			if a.is < 0 {
				continue
			}
			if b := &d.before[a.is]; b.c.Hook == a.c.Hook {
				list, order = append(list, to), append(order, b.pos)
			}
		}
		suspect := func(i int) bool {
			a := &d.after[list[i]]
			b := &d.before[a.is]
			return a.m.Priority != b.m.Priority || a.m.LinkID != b.m.LinkID
		}
		for i, stays := range unmoved(order, suspect) {
			stay[list[i]] = stays
		}
		from = to
	}
	return stay
}

// changed reports what changed about an entry that is in both looks.
func (d *diff) changed(b, a *entry, stays bool) {
	was, is := b.m, a.m
	wasIn, isIn := stateOf(was), stateOf(is)
	switch {
	case is.State == hook.StateDefunct:
		return // it left
	case was.Kind == hook.KindLegacy && is.Kind == hook.KindMember:
		d.add(hook.EventAdopted, b, a)
		return
	case was.Kind != is.Kind || is.Kind == hook.KindMember && was.Name != is.Name:
		d.add(hook.EventNamed, b, a)
		return
	case wasIn == hook.StateEmpty && was.SlotID == is.SlotID && isIn == hook.StateRunning:
		d.add(hook.EventUpdated, b, a)
	case wasIn != isIn && isIn == hook.StateRunning:
		d.add(hook.EventAttached, b, a)
		return
	case wasIn != isIn && isIn == hook.StateEmpty:
		d.add(hook.EventEmptied, b, a)
	case wasIn != isIn:
		d.add(hook.EventDisplaced, b, a)
		return
	case was.Program.ID != is.Program.ID:
		d.add(hook.EventUpdated, b, a)
	}
	switch {
	case !stays:
		d.add(hook.EventReordered, b, a)
	case was.Settings != is.Settings:
		d.add(hook.EventSet, b, a)
	case was.LinkID != is.LinkID && is.Kind != hook.KindLibxdp:
		// The same program was attached again, at the same place.
		d.add(hook.EventAttached, b, a)
	}
	if was.Persistent != is.Persistent {
		kind := hook.EventUnpinned
		if is.Persistent {
			kind = hook.EventPinned
		}
		d.add(kind, b, a)
	}
}

// stateOf returns the state without the effect of freplace, which has its own events.
func stateOf(m *hook.Member) hook.State {
	if m.State == hook.StateBypassed {
		return hook.StateRunning
	}
	return m.State
}

// extended reports functions of dispatchers and entries that freplace has replaced, and
// functions that were restored.
func (d *diff) extended() {
	done := map[*hook.Chain]bool{}
	for i := range d.after {
		a := &d.after[i]
		var b *entry
		was := &entry{c: &hook.Chain{}, m: &hook.Member{}}
		if a.is >= 0 {
			b = &d.before[a.is]
			was = b
		}
		if !done[a.c] && (b != nil || a.pos == len(a.c.Members)) {
			done[a.c] = true
			d.compare(was.c.Extensions, a.c.Extensions, func(kind hook.EventKind) *hook.Event {
				d.events = append(d.events, hook.Event{Kind: kind, EventTarget: a.c.At(), LinkID: a.c.LinkID, Entries: len(a.c.Members)})
				return &d.events[len(d.events)-1]
			})
		}
		d.compare(was.m.Extensions, a.m.Extensions, func(kind hook.EventKind) *hook.Event { return d.add(kind, b, a) })
	}
}

// compare reports the extensions that are in only one of the lists.
func (d *diff) compare(before, after []hook.Extension, add func(hook.EventKind) *hook.Event) {
	report := func(kind hook.EventKind, list, others []hook.Extension) {
		for i := range list {
			same := func(x hook.Extension) bool { return x.LinkID == list[i].LinkID }
			if !slices.ContainsFunc(others, same) {
				add(kind).Extension = &list[i]
			}
		}
	}
	report(hook.EventRestored, before, after)
	report(hook.EventExtended, after, before)
}

// came reports the new entries, ordered by id: the kernel gives rising ids.
func (d *diff) came() {
	first := len(d.events)
	for i := range d.after {
		// A defunct entry is not new: it was attached long ago.
		if a := &d.after[i]; a.is < 0 && a.m.State != hook.StateDefunct {
			d.add(hook.EventAttached, nil, a).Twin = d.twin(a)
		}
	}
	slices.SortStableFunc(d.events[first:], func(x, y hook.Event) int {
		return cmp.Or(cmp.Compare(x.After.SlotID, y.After.SlotID), cmp.Compare(x.After.LinkID, y.After.LinkID))
	})
}

// twin returns an entry that runs the program of another entry a second time, see
// hook.Event.
func (d *diff) twin(a *entry) *hook.Member {
	for i := range d.after {
		b := &d.after[i]
		if (a.m.Kind == hook.KindMember) != (b.m.Kind == hook.KindMember) && a.m.Program.Same(b.m.Program) && a.c.Meets(b.c) {
			return b.m
		}
	}
	return nil
}

// overtaken reports members that an entry without a priority now runs before, and did not
// run before in the last look. For each such entry it reports the first member behind it.
func (d *diff) overtaken(stayed []bool) {
	for i := range d.after {
		by := &d.after[i]
		if by.m.Kind == hook.KindMember || by.is >= 0 && stayed[i] || by.c.Hook == hook.XDP {
			continue
		}
		for j := i + 1; j < len(d.after) && d.after[j].c == by.c; j++ {
			a := &d.after[j]
			if a.m.Kind != hook.KindMember || a.is < 0 {
				continue
			}
			b := &d.before[a.is]
			if by.is >= 0 && d.before[by.is].pos < b.pos {
				continue
			}
			d.add(hook.EventOvertaken, b, a).By = by.m
			break
		}
	}
}
