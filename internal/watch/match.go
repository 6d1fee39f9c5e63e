package watch

import (
	"strings"

	"github.com/libdispatcher/dispatcher/hook"
)

// An entry is one program on a hook, in one look.
type entry struct {
	c   *hook.Chain
	m   *hook.Member
	pos int // from 1
	is  int // index of the same entry in the other look, or -1
}

func entries(chains []hook.Chain) []entry {
	var list []entry
	for i := range chains {
		c := &chains[i]
		for j := range c.Members {
			list = append(list, entry{c, &c.Members[j], j + 1, -1})
		}
	}
	return list
}

// link returns the link that holds an entry, alone or with others; 0 without a link.
func (e *entry) link() uint32 {
	if e.m.LinkID != 0 {
		return e.m.LinkID
	}
	return e.c.LinkID
}

func (e *entry) target() targetID { return idOf(e.c.At()) }

// A key names an entry across looks.
type key struct {
	kind   string
	id     uint32 // id of a link, slot or program
	at     targetID
	filter hook.Filter
	detail string
}

func (e *entry) key() key {
	m := e.m
	switch {
	case m.Kind == hook.KindLibxdp && m.Program.ID != 0:
		// Each change of such a chain gives all its members new links.
		return key{kind: string(m.Kind), id: m.Program.ID}
	case m.LinkID != 0:
		return key{kind: "link", id: m.LinkID}
	case m.SlotID != 0:
		return key{kind: "slot", id: m.SlotID}
	case e.c.Hook == hook.XDP:
		// It is the only entry there. Its link is not certain when devices of the same
		// index have the same program.
		return key{kind: "xdp " + string(m.Kind), at: e.target()}
	case m.Filter != nil:
		f := *m.Filter
		f.DirectAction = false
		return key{kind: string(e.c.Hook), at: e.target(), filter: f}
	}
	return key{kind: string(e.c.Hook), at: e.target(), id: m.Program.ID, detail: m.Detail}
}

// match finds the entries that are in both looks.
func match(before, after []entry) {
	keys := map[key][]int{}
	for i := range after {
		k := after[i].key()
		keys[k] = append(keys[k], i)
	}
	for i := range before {
		k := before[i].key()
		if found := keys[k]; len(found) > 0 {
			keys[k] = found[1:]
			if !exchanged(&before[i], &after[found[0]]) {
				before[i].is, after[found[0]].is = found[0], i
			}
		}
	}
	for _, same := range []func(b, a *entry) bool{adopted, remade, replaced, carried} {
		pair(before, after, same)
	}
}

// pair matches entries that are left over, when only one fits.
func pair(before, after []entry, same func(b, a *entry) bool) {
	for i := range before {
		found, n := -1, 0
		for j := range after {
			if before[i].is < 0 && after[j].is < 0 && same(&before[i], &after[j]) {
				found, n = j, n+1
			}
		}
		if n == 1 {
			before[i].is, after[found].is = found, i
		}
	}
}

// exchanged tells whether a foreign XDP program went and another came.
func exchanged(b, a *entry) bool {
	return b.c.Hook == hook.XDP && b.m.Kind == hook.KindForeign && b.c.LinkID != a.c.LinkID && b.m.Program.ID != a.m.Program.ID
}

// adopted tells whether the program became a member. A filter becomes a member on TCX.
func adopted(b, a *entry) bool {
	from := b.c.Hook
	return b.m.Kind == hook.KindLegacy && a.m.Kind == hook.KindMember &&
		b.m.Program.ID != 0 && b.m.Program.ID == a.m.Program.ID && b.target() == a.target() &&
		(from == a.c.Hook || strings.Replace(string(from), "tc/", "tcx/", 1) == string(a.c.Hook))
}

// remade tells whether the same member has another link, filter or slot. A moved member
// gets a new link; a new slot opens a closed door.
func remade(b, a *entry) bool {
	return b.m.Kind == hook.KindMember && a.m.Kind == hook.KindMember && b.m.Name == a.m.Name &&
		b.c.Hook == a.c.Hook && b.target() == a.target() &&
		(b.m.Program.ID == a.m.Program.ID || b.m.State == hook.StateEmpty)
}

// replaced tells whether another program replaced one that no link protects.
func replaced(b, a *entry) bool {
	exposed := b.m.Kind == hook.KindLegacy || b.m.Kind == hook.KindLibxdp
	return exposed && b.m.Kind == a.m.Kind && b.m.Filter == nil && a.m.Filter == nil &&
		b.c.Hook == a.c.Hook && b.target() == a.target() &&
		b.pos == a.pos && len(b.c.Members) == len(a.c.Members)
}

// carried tells whether an entry without a link moved with its device.
func carried(b, a *entry) bool {
	return b.m.Kind == a.m.Kind && b.m.SlotID == 0 && a.m.SlotID == 0 && b.m.LinkID == 0 && a.m.LinkID == 0 && b.m.Filter == nil &&
		b.c.Hook.OnDevice() && b.c.Hook == a.c.Hook && b.m.Program.ID == a.m.Program.ID &&
		b.c.LinkID == a.c.LinkID && b.target() != a.target() &&
		(b.c.Target == a.c.Target || b.c.Ifindex == a.c.Ifindex)
}
