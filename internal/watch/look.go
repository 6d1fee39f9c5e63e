package watch

import (
	"slices"

	"github.com/libdispatcher/dispatcher/hook"
)

// LinkState says what became of a link that attaches nothing any more in the places
// that are looked at. The zero value: the link is gone, or it was detached.
type LinkState uint8

const (
	// LinkDefunct: its device or cgroup is gone.
	LinkDefunct LinkState = iota + 1
	// LinkElsewhere: it attaches something outside the places that are looked at.
	LinkElsewhere
	// LinkUnsettled: it attaches something, but the place was not found, for example
	// because the network namespace is about to vanish.
	LinkUnsettled
)

// A Look is what was attached at one moment.
type Look struct {
	Chains []hook.Chain
	// Links says what became of the missing links.
	Links map[uint32]LinkState
	// Doubtful are hooks that changed during the look.
	Doubtful []hook.EventTarget

	unread []unread
}

// An unread is a part of the machine that could not be read.
type unread struct {
	hook.EventTarget
	err string
}

// covers tells whether a hook belongs to the part. A part that is a whole namespace or
// cgroup has no hook; the part of all cgroups has no target either.
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
		if at := l.Chains[i].At(); at.Hook == p.Hook && idOf(at) == idOf(p) {
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

// defunct tells whether the device or cgroup of a chain is gone.
func defunct(c *hook.Chain) bool {
	return len(c.Members) > 0 && c.Members[0].State == hook.StateDefunct
}

// chainOf returns the chain that a link carries or has an entry of.
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

// Settle replaces what could not be read in a look by what the look before has. So an
// entry that could not be read is not reported as left.
func Settle(before, now *Look) {
	var keep []hook.Chain
	for i := range now.Chains {
		c := now.Chains[i]
		switch at := c.At(); {
		case c.Err != nil && len(c.Members) == 0:
			now.unread = append(now.unread, unread{at, c.Err.Error()})
		case lost(&c) && (before.has(c.LinkID) || before.has(c.Members[0].LinkID)):
			// The chain is known from before, and is in the look with its name.
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
		at := c.At()
		unsettled := func(e entry) bool { return now.Links[e.link()] == LinkUnsettled && e.link() != 0 }
		covered := slices.ContainsFunc(now.unread, func(u unread) bool { return u.covers(at) })
		seen := (&Look{Chains: keep}).chainAt(at) != nil
		if !seen && (covered || slices.ContainsFunc(entries([]hook.Chain{c}), unsettled)) {
			keep = append(keep, c)
		}
	}
	now.Chains = keep
}
