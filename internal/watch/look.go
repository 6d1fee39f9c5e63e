package watch

import (
	"slices"

	"github.com/libdispatcher/dispatcher/hook"
)

// LinkState is what became of a link that attaches nothing any more in a place
// that was looked at. The zero value: there is no such link, or it was detached.
type LinkState uint8

const (
	// LinkDefunct: its device or cgroup is gone.
	LinkDefunct LinkState = iota + 1
	// LinkElsewhere: it attaches something where nobody looks.
	LinkElsewhere
	// LinkUnsettled: it attaches something, but the place was not found, as of a
	// network namespace that is about to vanish.
	LinkUnsettled
)

// A Look is what was attached at one moment.
type Look struct {
	Chains []hook.Chain
	// Links has what became of those that are missing.
	Links map[uint32]LinkState
	// Doubtful are hooks that changed under the eyes of who looked.
	Doubtful []hook.EventTarget

	unread []unread
}

// unread is a part of the machine that could not be read.
type unread struct {
	hook.EventTarget
	err string
}

// covers tells whether a hook belongs to it. A whole namespace or cgroup has no
// hook, all cgroups nothing at all.
func (u unread) covers(p hook.EventTarget) bool {
	switch {
	case u.Hook == "" && u.NetNS.Inode != 0:
		return netnsOf(p.NetNS) == netnsOf(u.NetNS)
	case u.Hook == "":
		return p.Hook.OnCgroup()
	case u.Hook == "cgroup":
		return p.Hook.OnCgroup() && p.Target == u.Target
	}
	return u.Hook == p.Hook && idOf(u.EventTarget) == idOf(p)
}

func (l *Look) chainAt(p hook.EventTarget) *hook.Chain {
	for i := range l.Chains {
		if at := targetOf(&l.Chains[i]); at.Hook == p.Hook && idOf(at) == idOf(p) {
			return &l.Chains[i]
		}
	}
	return nil
}

// lost tells whether the place of a chain's only entry is not known.
func lost(c *hook.Chain) bool { return c.Err != nil && len(c.Members) > 0 }

// has tells whether a link is in the look, and its place is known.
func (l *Look) has(link uint32) bool {
	return link != 0 && slices.ContainsFunc(l.Chains, func(c hook.Chain) bool { return carries(&c, link) && !lost(&c) && !defunct(&c) })
}

// defunct tells whether a chain is what is left of one.
func defunct(c *hook.Chain) bool {
	return len(c.Members) > 0 && c.Members[0].State == hook.StateDefunct
}

// chainOf returns the chain that a link carries, or has a part of.
func (l *Look) chainOf(link uint32) *hook.Chain {
	for i := range l.Chains {
		if carries(&l.Chains[i], link) {
			return &l.Chains[i]
		}
	}
	return nil
}

func carries(c *hook.Chain, link uint32) bool {
	return c.LinkID == link || slices.ContainsFunc(c.Members, func(m hook.Member) bool { return m.LinkID == link })
}

// Missing returns the links of the look that attach nothing in the next one.
func (l *Look) Missing(next *Look) []uint32 {
	var ids []uint32
	for _, e := range entries(l.Chains) {
		if id := e.link(); id != 0 && !defunct(e.c) && !slices.Contains(ids, id) && !next.has(id) {
			ids = append(ids, id)
		}
	}
	return ids
}

// Settle puts what is known from before into a look in the place of what could
// not be read, so that not to know is not to report that it left.
func Settle(before, now *Look) {
	var keep []hook.Chain
	for i := range now.Chains {
		c := now.Chains[i]
		switch at := targetOf(&c); {
		case c.Err != nil && len(c.Members) == 0:
			now.unread = append(now.unread, unread{at, c.Err.Error()})
		case lost(&c) && (before.has(c.LinkID) || before.has(c.Members[0].LinkID)):
			// Known from before, and there with its name.
		case slices.ContainsFunc(now.Doubtful, func(d hook.EventTarget) bool { return d.Hook == at.Hook && idOf(d) == idOf(at) }):
			if was := before.chainAt(at); was != nil {
				keep = append(keep, *was)
			}
		default:
			keep = append(keep, c)
		}
	}
	for i := range before.Chains {
		c := before.Chains[i]
		at := targetOf(&c)
		unsettled := func(e entry) bool { return now.Links[e.link()] == LinkUnsettled && e.link() != 0 }
		covered := slices.ContainsFunc(now.unread, func(u unread) bool { return u.covers(at) })
		seen := (&Look{Chains: keep}).chainAt(at) != nil
		if !seen && (covered || slices.ContainsFunc(entries([]hook.Chain{c}), unsettled)) {
			keep = append(keep, c)
		}
	}
	now.Chains = keep
}
