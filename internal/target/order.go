package target

import (
	"context"
	"io/fs"
	"slices"
	"strings"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/load"
)

// An Entry is what the order needs to know about a program on a hook.
type Entry struct {
	Program uint32 // the program's id
	Link    uint32 // the link's id; 0 without a link
	Name    string // the member's name; empty for a program that is no member
	// Priority is the member's priority.
	Priority int
	// Stays says that the member does not leave with its owner.
	Stays bool
	// Leaving says that another entry has taken this one's place: this one is about
	// to go.
	Leaving bool
}

// String returns the entry as a user can refer to it: by name, else by link, else
// by program.
func (e Entry) String() string {
	switch {
	case e.Name != "":
		return e.Name
	case e.Link != 0:
		return string(hook.LinkRef(e.Link))
	}
	return string(hook.ProgramRef(e.Program))
}

// entry lets a type that embeds an Entry be in an Order.
func (e Entry) entry() Entry { return e }

// An Order is what is on a hook in run order.
type Order[E interface{ entry() Entry }] []E

func (o Order[E]) ranks() []dispatch.Entry {
	ranks := make([]dispatch.Entry, len(o))
	for i, e := range o {
		if e := e.entry(); e.Name != "" && e.Priority != 0 && !e.Leaving {
			ranks[i] = dispatch.Entry{Ranked: true, Priority: e.Priority}
		}
	}
	return ranks
}

func (o Order[E]) index(is func(Entry) bool) int {
	return slices.IndexFunc(o, func(e E) bool { return is(e.entry()) })
}

// Named returns the index of the member called name, or -1. A leaving member is
// not found.
func (o Order[E]) Named(name string) int {
	return o.index(func(e Entry) bool { return e.Name == name && name != "" && !e.Leaving })
}

// WithLink returns the index of the entry with the link id, or -1.
func (o Order[E]) WithLink(id uint32) int {
	return o.index(func(e Entry) bool { return e.Link == id })
}

// Find returns the index of the entry that ref names. The error is fs.ErrNotExist,
// and lists the entries.
func (o Order[E]) Find(ref hook.Ref) (int, error) {
	i := -1
	switch {
	case ref.Link() != 0:
		i = o.WithLink(ref.Link())
	case ref.Program() != 0:
		i = o.index(func(e Entry) bool { return e.Program == ref.Program() })
	default:
		i = o.Named(string(ref))
	}
	if i >= 0 {
		return i, nil
	}
	if len(o) == 0 {
		return -1, hook.Because(fs.ErrNotExist, "there is no %q: nothing is attached", ref)
	}
	var there []string
	for _, e := range o {
		there = append(there, e.entry().String())
	}
	return -1, hook.Because(fs.ErrNotExist, "there is no %q (there are: %s)", ref, strings.Join(there, ", "))
}

// Choose returns the index of the entry that ref names; for an empty ref, of the only one
// that is free, or -1 without such an entry. The error is ErrUsage, and says that there are
// several, when the choice is open.
func (o Order[E]) Choose(ref hook.Ref, free func(E) bool, several string) (int, error) {
	if ref != "" {
		return o.Find(ref)
	}
	i := -1
	var ids []string
	for j, e := range o {
		if free(e) {
			i = j
			ids = append(ids, string(hook.ProgramRef(e.entry().Program)))
		}
	}
	if last := len(ids) - 1; last > 0 {
		return -1, hook.Because(hook.ErrUsage, "%s: choose one, %s or %s", several, strings.Join(ids[:last], ", "), ids[last])
	}
	return i, nil
}

// Detach runs remove for the entry that ref names, or for all members for an empty ref. An
// entry that is no member must be named, and needs force. The error is fs.ErrNotExist when
// there is no such entry, and refuse's for the first entry when none may be removed.
func (o Order[E]) Detach(ref hook.Ref, force bool, refuse, remove func(E) error) error {
	leaving := o
	if ref != "" {
		i, err := o.Find(ref)
		if err != nil {
			return err
		}
		leaving = o[i : i+1]
	}
	if len(leaving) == 0 {
		return hook.Because(fs.ErrNotExist, "nothing is attached")
	}
	removed := false
	for _, e := range leaving {
		if e.entry().Name == "" && (ref == "" || !force) {
			continue
		}
		if err := remove(e); err != nil {
			return err
		}
		removed = true
	}
	if !removed {
		return refuse(leaving[0])
	}
	return nil
}

// Without returns a copy of the order without the entry at i.
func (o Order[E]) Without(i int) Order[E] { return slices.Delete(slices.Clone(o), i, i+1) }

// Join returns the index, the name and the priority of a new member. The error is
// fs.ErrExist when a member has the name, and ErrTaken too if it may be leaving.
func (o Order[E]) Join(prog *load.Loaded, req Request) (i int, name string, priority int, err error) {
	if name, err = req.NameFor(prog); err != nil {
		return 0, "", 0, err
	}
	if i := o.Named(name); i >= 0 {
		return 0, "", 0, NameTaken(name, !o[i].entry().Stays)
	}
	byDefault := req.Settings.Or(prog.Defaults).WithDefaults().Priority
	i, priority, err = dispatch.Settle(o.ranks(), req.Position, o.Find, req.Priority, byDefault)
	return i, name, priority, err
}

// Fit returns the priority of a new member at i.
func (o Order[E]) Fit(i, asked int) (priority int, err error) {
	return dispatch.Fit(o.ranks(), i, asked)
}

// IndexFor returns the index at which a member of the priority goes.
func (o Order[E]) IndexFor(priority int) int { return dispatch.IndexFor(o.ranks(), priority) }

// Move returns the index at which the member at i goes among the other entries, and
// its new priority. A member that is in the right place already stays at i.
func (o Order[E]) Move(i int, to hook.Position, asked int) (j, priority int, err error) {
	if to.IsZero() && dispatch.Stays(o.ranks(), i, asked) {
		return i, asked, nil
	}
	others := o.Without(i)
	return dispatch.Settle(others.ranks(), to, others.Find, asked, hook.DefaultPriority)
}

// NameTaken returns the refusal of a name that a member has: fs.ErrExist, and
// ErrTaken too if that member may be leaving.
func NameTaken(name string, leaving bool) error {
	err := hook.Because(fs.ErrExist, "there is a member %q already", name)
	if leaving {
		err = hook.Because(ErrTaken, "%w", err)
	}
	return err.Hint("choose another name, or replace its program")
}

// A Mover moves a member.
type Mover func(ctx context.Context, to hook.Position, priority int) error

// Set implements Handle.Set for a member whose only setting is its priority.
func (move Mover) Set(ctx context.Context, h hook.Hook, settings hook.Settings) error {
	if err := usage(settings.Check(), settings.CheckFor(h)); err != nil || settings.Priority == 0 {
		return err
	}
	return move(ctx, hook.Position{}, settings.Priority)
}

// Move implements Handle.Move for a member that the kernel keeps in order.
func (move Mover) Move(ctx context.Context, to hook.Position) error {
	if err := usage(to.Check()); err != nil || to.IsZero() {
		return err
	}
	return move(ctx, to, 0)
}
