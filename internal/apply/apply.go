package apply

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/plan"
)

// A Result is what became of a member.
type Result struct {
	plan.Item
	// Done: what the plan says was done.
	Done bool
	// Err says why not, or why it cannot be done; a *hook.Error.
	Err error
}

// A Report is what became of all.
type Report struct {
	Results []Result
	// Sealed are the places whose chains were sealed, or are to be. The error of one says why not.
	Sealed []Result
}

// rounds is how often a run looks again after others have changed what it changes.
const rounds = 5

// Diff says what Apply would do, and changes nothing.
func Diff(ctx context.Context, docs []Document, o Options) (*Report, error) {
	r := &run{docs, o, objects{}}
	p, err := r.look(ctx)
	if err != nil {
		return nil, err
	}
	report := &Report{}
	for _, item := range p.Items {
		report.Results = append(report.Results, Result{Item: item, Err: failed(&item, item.Err)})
	}
	for _, item := range p.Seal {
		report.Sealed = append(report.Sealed, Result{Item: item})
	}
	return report, nil
}

// Apply makes the host have what the documents declare. What cannot be done is in the report, and the rest
// is done. The error is about the whole.
func Apply(ctx context.Context, docs []Document, o Options) (*Report, error) {
	r := &run{docs, o, objects{}}
	type key struct {
		plan.Place
		name, owner string
	}
	report, at := &Report{}, map[key]int{}
	for round := 1; ; round++ {
		p, err := r.look(ctx)
		if err != nil {
			return report, err
		}
		again, unfinished := false, map[plan.Place]bool{}
		for _, item := range p.Items {
			k := key{item.Place, item.Name, item.Owner}
			n, known := at[k]
			if known && !transient(report.Results[n].Err) {
				continue
			}
			result := r.do(ctx, item)
			again = again || transient(result.Err)
			if item.Acts() && !result.Done {
				unfinished[item.Place] = true
			}
			if !known {
				at[k] = len(report.Results)
				report.Results = append(report.Results, result)
				continue
			}
			report.Results[n] = result
		}
		for _, item := range p.Seal {
			if (!again || round == rounds) && !unfinished[item.Place] {
				report.Sealed = append(report.Sealed, r.seal(ctx, item))
			}
		}
		if !again || round == rounds || ctx.Err() != nil {
			return report, ctx.Err()
		}
	}
}

// transient tells whether somebody else may have caused the error by a change at the same time, perhaps one who
// applies the same documents. Then it is looked at again.
func transient(err error) bool {
	for _, cause := range []error{fs.ErrExist, dispatcher.ErrChanged, dispatcher.ErrDefunct, errMeanwhile} {
		if errors.Is(err, cause) {
			return true
		}
	}
	return false
}

// ErrNoDevice: no device, cgroup or network namespace matches what is declared.
var ErrNoDevice = errors.New("no device")

// errMeanwhile: the member is not there any more, or is another's.
var errMeanwhile = errors.New("changed meanwhile")

// do does what an item says.
func (r *run) do(ctx context.Context, item plan.Item) Result {
	result := Result{Item: item, Err: failed(&item, item.Err)}
	if !item.Acts() {
		return result
	}
	kernel.Step("apply: " + string(item.State))
	t := target(&item)
	var err error
	switch item.State {
	case plan.Attach:
		err = r.attach(ctx, t, &item)
	case plan.Change:
		err = r.change(ctx, t, &item)
	case plan.Detach:
		err = r.open(ctx, t, &item, func(l *dispatcher.Link) error { return l.Detach(ctx) })
	}
	result.Done, result.Err = err == nil || errors.Is(err, dispatcher.ErrPins), failed(&item, err)
	return result
}

func target(item *plan.Item) dispatcher.Target {
	return dispatcher.On(item.Place.Hook, item.Target).In(item.NetNS)
}

func (r *run) attach(ctx context.Context, t dispatcher.Target, item *plan.Item) error {
	w := item.Want
	from, err := r.objects.source(w.Attachment, w.File, w.Program, r.o.BPFFS)
	if err != nil {
		return err
	}
	if item.Adopt != "" {
		adopted, err := dispatcher.Adopt(ctx, t, dispatcher.AdoptOptions{Persistent: true, Entry: item.Adopt, BPFFS: r.o.BPFFS})
		if err != nil {
			return err
		}
		defer adopted.Close()
		kernel.Step("apply: adopted")
	}
	mode := hook.ModeAuto
	if w.Mode != "" {
		if mode, err = hook.ParseMode(w.Mode); err != nil {
			return err
		}
	}
	link, err := dispatcher.Attach(ctx, t, from, dispatcher.Options{
		Name: item.Name, Priority: item.Settings.Priority, ContinueOn: item.Settings.ContinueOn, OnMissing: item.Settings.OnMissing,
		Mode: mode, Persistent: w.Confirm == nil, Owner: item.Owner, BPFFS: r.o.BPFFS,
	})
	if err != nil {
		return err
	}
	defer link.Close()
	if w.Confirm == nil {
		return nil
	}
	return hold(ctx, link, item)
}

// change brings a member to what is declared: first the program, then when it runs.
func (r *run) change(ctx context.Context, t dispatcher.Target, item *plan.Item) error {
	w := item.Want
	return r.open(ctx, t, item, func(l *dispatcher.Link) error {
		if item.Differs("pinned") {
			if _, err := l.Pin(ctx); err != nil {
				return err
			}
		}
		if item.Differs("program") {
			from, err := r.objects.source(w.Attachment, w.File, w.Program, r.o.BPFFS)
			if err != nil {
				return err
			}
			if err := replace(ctx, l, from, item); err != nil {
				return err
			}
			kernel.Step("apply: replaced")
		}
		if item.Differs("priority") || item.Differs("continue_on") || item.Differs("on_missing") {
			return l.Set(ctx, item.Settings)
		}
		return nil
	})
}

// open opens the member of an item and runs fn, if it is still of the item's owner.
func (r *run) open(ctx context.Context, t dispatcher.Target, item *plan.Item, fn func(*dispatcher.Link) error) error {
	l, err := dispatcher.Open(ctx, t, hook.Ref(item.Name), dispatcher.ReadOptions{BPFFS: r.o.BPFFS})
	if errors.Is(err, fs.ErrNotExist) {
		return hook.Because(errMeanwhile, "the member has left meanwhile: %w", err)
	}
	if err != nil {
		return err
	}
	defer l.Close()
	m, err := l.Info(ctx)
	if err != nil {
		return err
	}
	if m.Owner != item.Owner {
		return hook.Because(errMeanwhile, "the member is of owner %q meanwhile", m.Owner)
	}
	return fn(l)
}

// noDevice is an error that is also ErrNoDevice, and nothing else.
type noDevice struct{ error }

// Is tells that it is ErrNoDevice.
func (noDevice) Is(err error) bool { return err == ErrNoDevice }

// seal seals the chain of an item. A chain that cannot be sealed works as well.
func (r *run) seal(ctx context.Context, item plan.Item) Result {
	kernel.Step("apply: seal")
	_, err := dispatcher.Seal(ctx, target(&item), dispatcher.SealOptions{BPFFS: r.o.BPFFS})
	return Result{Item: item, Done: err == nil, Err: failed(&item, err)}
}

// failed is the error of an item: it says which document asks for what.
func failed(item *plan.Item, err error) error {
	if err == nil {
		return nil
	}
	if item.State == plan.NoDevice {
		err = noDevice{err}
	}
	who := fmt.Sprintf("%q", item.Name)
	if item.Want != nil {
		who += " of " + filepath.Base(item.Want.File)
	}
	var inner *hook.Error
	if !errors.As(hook.Wrap("", "", "", err), &inner) {
		return err
	}
	if e := (*hook.Error)(nil); errors.As(err, &e) {
		inner = e
	}
	place := item.Target
	if item.Place == (plan.Place{Hook: item.Place.Hook}) && !item.Place.Hook.OnCgroup() {
		place = "" // it is said in the error
	}
	return &hook.Error{Op: "apply", Hook: item.Place.Hook, Target: place, Occupant: inner.Occupant, Err: fmt.Errorf("%s: %w", who, inner.Err), Hint: inner.Hint}
}
