package plan

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/libdispatcher/dispatcher/declare"
	"github.com/libdispatcher/dispatcher/hook"
)

// A Place is a hook on one target, as the kernel knows it.
type Place struct {
	Hook     hook.Hook
	Ifindex  int
	CgroupID uint64
	NetNS    uint64 // inode
}

// PlaceOf is the place of a chain.
func PlaceOf(c *hook.Chain) Place { return Place{c.Hook, c.Ifindex, c.CgroupID, c.NetNS.Inode} }

// A Want is an attachment on one target, or on none.
type Want struct {
	*declare.Attachment
	File  string // the document
	Owner string // the label of its members
	// Place is where; the zero value if nothing matches.
	Place  Place
	Target string // in words
	NetNS  string // opens the namespace
	// Program is the mark or, in the form "id:N", the id of the program that shall run.
	Program string
	// Err says why the attachment cannot be made, whatever is there.
	Err error
}

// Observed is what is there.
type Observed struct {
	Chains []hook.Chain
	// Marks are the marks of programs by id, see dispatcher.MarkOf.
	Marks map[uint32]string
	// Unsealable are programs that cannot be sealed.
	Unsealable map[uint32]bool
}

// A State says what becomes of a member.
type State string

// States.
const (
	Attach     State = "attach"     // it is not there
	Change     State = "change"     // it is not as declared
	Keep       State = "keep"       // it is as declared
	Detach     State = "detach"     // no document declares it any more
	Undeclared State = "undeclared" // the same, and it stays
	Blocked    State = "blocked"    // it cannot be as declared; Err says why
	NoDevice   State = "no-device"  // no device, cgroup or network namespace matches
)

// A Difference is what a change changes.
type Difference struct {
	What string `json:"what"` // "program", "priority", "continue_on", "on_missing", "pinned"
	From string `json:"from"`
	To   string `json:"to"`
}

// An Item is what becomes of one member.
type Item struct {
	State       State
	Place       Place
	Target      string
	NetNS       string
	Name, Owner string
	Want        *Want // nil if it is not declared
	Settings    hook.Settings
	Differences []Difference
	// Adopt is the program without a link to be made a member first; empty if there is none.
	Adopt hook.Ref
	Err   error
}

// Differs tells whether a change is about that.
func (i *Item) Differs(what string) bool {
	return slices.ContainsFunc(i.Differences, func(d Difference) bool { return d.What == what })
}

// Acts tells whether something is to be done.
func (i *Item) Acts() bool { return i.State == Attach || i.State == Change || i.State == Detach }

// A Plan is what is to be done, by targets.
type Plan struct {
	Items []Item
	// Seal are the places whose chains are to be sealed, with the first item there.
	Seal []Item
}

// Acts tells whether something is to be done.
func (p *Plan) Acts() bool {
	return len(p.Seal) > 0 || slices.ContainsFunc(p.Items, func(i Item) bool { return i.Acts() })
}

// Options say what the plan may do.
type Options struct {
	// Owners are the labels of members that the documents account for.
	Owners []string
	// Partial: documents are missing, so what they do not declare is not known.
	Partial bool
	// Prune detaches members that are not declared any more.
	Prune bool
}

// Make compares what is wanted with what there is. Items come by targets, in the order of the
// wants, and on a target in the order in which the members run.
func Make(wants []Want, now *Observed, o Options) *Plan {
	p := &Plan{}
	chains := map[Place]*hook.Chain{}
	for i := range now.Chains {
		chains[PlaceOf(&now.Chains[i])] = &now.Chains[i]
	}
	var places []Place
	at := map[Place][]*Want{}
	for i := range wants {
		w := &wants[i]
		if w.Place == (Place{}) {
			continue
		}
		if at[w.Place] == nil {
			places = append(places, w.Place)
		}
		at[w.Place] = append(at[w.Place], w)
	}
	for i := range now.Chains {
		c := &now.Chains[i]
		if place := PlaceOf(c); at[place] == nil && c.Target != "" {
			places = append(places, place)
			at[place] = []*Want{}
		}
	}
	for _, place := range places {
		p.place(place, at[place], chains[place], now, o)
	}
	for i := range wants {
		if w := &wants[i]; w.Place == (Place{}) {
			item := Item{State: NoDevice, Place: Place{Hook: hook.Hook(w.Hook)}, Target: w.Target, NetNS: w.NetNS, Name: w.Name, Owner: w.Owner, Want: w, Err: w.Err}
			p.Items = append(p.Items, item)
		}
	}
	return p
}

// place plans one hook on one target.
func (p *Plan) place(place Place, wants []*Want, c *hook.Chain, now *Observed, o Options) {
	if c == nil {
		c = &hook.Chain{Hook: place.Hook}
	}
	priorities, failed := order(wants, c)
	var items []Item
	for _, w := range wants {
		item := Item{Place: place, Target: w.Target, NetNS: w.NetNS, Name: w.Name, Owner: w.Owner, Want: w}
		item.Settings, _ = w.Settings()
		item.Settings.Priority = cmp.Or(priorities[w.Name], item.Settings.Priority)
		m := member(c, w.Name)
		item.Err = cmp.Or(w.Err, failed[w.Name])
		if item.Err == nil {
			item.Err = blocked(w, c, m)
		}
		switch {
		case item.Err != nil:
			item.State = Blocked
		case m == nil || m.State == hook.StateEmpty:
			item.State = Attach
			item.Adopt = inTheWay(c)
		default:
			item.Differences = differences(w, &item.Settings, m, now)
			item.State = Keep
			if len(item.Differences) > 0 {
				item.State = Change
			}
		}
		items = append(items, item)
	}
	if c.Target != "" && !o.Partial {
		for i := range c.Members {
			m := &c.Members[i]
			if m.Kind != hook.KindMember || !slices.Contains(o.Owners, m.Owner) || slices.ContainsFunc(wants, func(w *Want) bool { return w.Name == m.Name }) {
				continue
			}
			item := Item{State: Undeclared, Place: place, Target: c.Target, NetNS: c.NetNS.Name, Name: m.Name, Owner: m.Owner, Settings: m.Settings}
			if o.Prune {
				item.State = Detach
			}
			items = append(items, item)
		}
	}
	slices.SortStableFunc(items, func(a, b Item) int { return cmp.Compare(a.Settings.Priority, b.Settings.Priority) })
	p.Items = append(p.Items, items...)
	if len(items) > 0 && seals(items, c, now) {
		p.Seal = append(p.Seal, items[0])
	}
}

// member returns the member of that name; nil if there is none.
func member(c *hook.Chain, name string) *hook.Member {
	i := slices.IndexFunc(c.Members, func(m hook.Member) bool { return m.Kind == hook.KindMember && m.Name == name })
	if i < 0 {
		return nil
	}
	return &c.Members[i]
}

// inTheWay is the program without a link that holds an XDP device; empty if there is none.
func inTheWay(c *hook.Chain) hook.Ref {
	if c.Hook == hook.XDP && len(c.Members) == 1 && c.Members[0].Kind == hook.KindLegacy {
		return c.Members[0].Ref()
	}
	return ""
}

// blocked says why a member cannot be as declared; m is the one that is there.
func blocked(w *Want, c *hook.Chain, m *hook.Member) error {
	if c.Err != nil {
		return c.Err
	}
	if c.Hook == hook.XDP && len(c.Members) > 0 {
		first := &c.Members[0]
		occupant := &hook.Occupant{Kind: first.Kind, Program: first.Program, LinkID: first.LinkID, Mode: c.Mode}
		switch {
		case first.Kind == hook.KindLegacy && !w.Adopts():
			return hook.Busy(occupant).Hint("onConflict: adopt makes it a member")
		case first.Kind == hook.KindForeign:
			return hook.Busy(occupant)
		case c.Style == hook.StyleLibxdp:
			return hook.Because(hook.ErrBusy, "a chain of libxdp is on the device, whose members have no owners").HeldBy(occupant).
				Hint("\"dispatcher convert\" makes it a chain that a document can have members in")
		case first.Kind == hook.KindMember && w.Mode != "" && w.Mode != "auto" && w.Mode != c.Mode.String():
			return hook.Because(hook.ErrBusy, "the chain is in %v mode, not in %s mode, and a chain with members stays in its mode", c.Mode, w.Mode)
		}
	}
	switch {
	case m == nil:
	case m.Owner != w.Owner:
		return hook.Because(hook.ErrBusy, "there is a member %q already, of owner %q: this document did not make it, and leaves it alone", m.Name, m.Owner).
			Hint("choose another name, or detach that member")
	case w.Confirm != nil && !m.Persistent && m.State == hook.StateRunning:
		return hook.Because(hook.ErrBusy, "a process holds the member, which is not pinned: it is to be confirmed first").
			Hint("\"dispatcher holders\" says which process")
	case m.State == hook.StateDisplaced, m.State == hook.StateBypassed:
		return hook.Because(hook.ErrBusy, "the member is %s: packets do not meet it", m.State).Hint("\"dispatcher doctor\" says what mends it")
	}
	return nil
}

// differences says what of a member is not as declared.
func differences(w *Want, s *hook.Settings, m *hook.Member, now *Observed) (list []Difference) {
	add := func(what, from, to string) {
		if from != to {
			list = append(list, Difference{what, from, to})
		}
	}
	runs := cmp.Or(now.Marks[m.Program.ID], "unknown")
	if strings.HasPrefix(w.Program, "id:") {
		runs = string(hook.ProgramRef(m.Program.ID))
	}
	add("program", runs, w.Program)
	add("priority", fmt.Sprint(m.Priority), fmt.Sprint(s.Priority))
	if m.ContinueOn != s.ContinueOn {
		add("continue_on", m.ContinueOn.String(), s.ContinueOn.String())
	}
	if m.OnMissing != s.OnMissing {
		add("on_missing", m.OnMissing.String(), s.OnMissing.String())
	}
	if !m.Persistent {
		add("pinned", "no", "yes")
	}
	return list
}

// seals tells whether the chain is to be sealed once the items are done: all members are then
// declared with it, and not all are sealed that can be.
func seals(items []Item, c *hook.Chain, now *Observed) bool {
	if c.Hook != hook.XDP {
		return false
	}
	need := false
	for i := range items {
		item := &items[i]
		switch {
		case item.State == Detach && item.Want == nil:
			continue
		case item.Want == nil, item.State == Blocked, !item.Want.Sealed():
			return false
		}
		m := member(c, item.Name)
		made := item.State == Attach || item.Differs("program") || item.Differs("pinned")
		if item.Want.Attachment.Program.Pin == "" && (made || m != nil && !m.Sealed && !now.Unsealable[m.Program.ID]) {
			need = true
		}
		if item.Adopt != "" {
			return false // what was adopted is not declared
		}
	}
	for i := range c.Members {
		if !slices.ContainsFunc(items, func(item Item) bool { return item.Name == c.Members[i].Name }) {
			return false
		}
	}
	return need
}
