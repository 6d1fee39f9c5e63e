package attach

import (
	"context"
	"errors"
	"io/fs"
	"strings"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/chains"
	"github.com/libdispatcher/dispatcher/internal/filters"
	"github.com/libdispatcher/dispatcher/internal/interop"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/links"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// A family attaches programs to hooks of one kind. A Handle that it returns has taken
// over the opened target. On XDP the methods return ErrStyle when the chain on the
// device has the other style. A method that takes no context returns kernel.ErrAgain when
// others were faster.
type family interface {
	// Attach makes the program a member.
	Attach(ctx context.Context, o *target.Opened, src load.Source, req target.Request) (target.Handle, error)
	// Plan does what Attach does, but for the steps that others could see.
	Plan(ctx context.Context, o *target.Opened, src load.Source, req target.Request) (*hook.Chain, error)
	// Adopt makes an entry without a link a member, with the lock held.
	Adopt(o *target.Opened, l *state.Locked, req target.AdoptRequest) (target.Handle, error)
	// Open opens a member.
	Open(o *target.Opened, ref hook.Ref) (target.Handle, error)
	// Detach removes one entry, or all members for an empty ref. It removes an entry
	// that is not ours only with force.
	Detach(ctx context.Context, o *target.Opened, ref hook.Ref, force bool) error
	// Read describes what is on the hook.
	Read(o *target.Opened) (*hook.Chain, error)
}

// families returns the families that a hook can belong to. XDP has two, and the chain
// on the device decides: each family returns ErrStyle for a chain of the other.
func families(h hook.Hook) []family {
	switch h.Family() {
	case "xdp":
		return []family{chains.Family{}, interop.Family{}}
	case "tc":
		return []family{filters.Family{}}
	}
	return []family{links.Family{}}
}

// in runs fn with the family of the opened target.
func in(ctx context.Context, o *target.Opened, fn func(family) error) (err error) {
	const tries = 10 // devices do not change their style all the time
	for range tries {
		for _, f := range families(o.Hook) {
			if err = fn(f); !errors.Is(err, chains.ErrStyle) {
				return err
			}
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	return hook.Because(hook.ErrChanged, "gave up: %w", err)
}

// Attach makes the program of src a member on the target. The caller closes the Handle.
func Attach(ctx context.Context, t target.Target, src load.Source, req target.Request) (target.Handle, error) {
	return makeHandle(ctx, t, func(o *target.Opened, f family) (target.Handle, error) {
		if err := req.Check(o); err != nil {
			return nil, err
		}
		return f.Attach(ctx, o, src, req)
	})
}

// Adopt makes an entry without a link a member at the same place. The caller closes
// the Handle.
func Adopt(ctx context.Context, t target.Target, req target.AdoptRequest) (target.Handle, error) {
	return makeHandle(ctx, t, func(o *target.Opened, f family) (h target.Handle, err error) {
		if err := req.Check(o); err != nil {
			return nil, err
		}
		err = o.Locked(ctx, func(l *state.Locked) error {
			h, err = f.Adopt(o, l, req)
			return err
		})
		return h, err
	})
}

// Open opens a member. The caller closes the Handle.
func Open(ctx context.Context, t target.Target, ref hook.Ref) (target.Handle, error) {
	if err := checkRef(ref); err != nil {
		return nil, err
	}
	return makeHandle(ctx, t, func(o *target.Opened, f family) (target.Handle, error) { return f.Open(o, ref) })
}

// OpenPinned opens a member by the path of its pin, and returns its hook. The caller
// closes the Handle.
func OpenPinned(ctx context.Context, path string) (h target.Handle, _ hook.Hook, err error) {
	pins, folder, member, err := state.ParseHeldPath(path)
	if err != nil {
		return nil, "", hook.Because(hook.ErrUsage, "%w", err)
	}
	o, err := target.Open(target.Target{Hook: hook.XDP, BPFFS: pins.BPFFS()}, sweep)
	if err != nil {
		return nil, "", err
	}
	o.Pins = pins // in a bpffs or not: opening them tells
	if id := state.ParseLinkFolder(folder); id != 0 {
		h, err = links.OpenPinned(o, folder, member)
	} else {
		h, err = chains.OpenPinned(o, folder, member)
	}
	if err != nil {
		o.Close()
		return nil, "", err
	}
	h.ReleaseNetNS()
	return h, o.Hook, nil
}

// checkRef returns an error for a reference that cannot name an entry. A name that no
// member can have gives fs.ErrNotExist.
func checkRef(ref hook.Ref) error {
	switch err := ref.Check(); {
	case ref == "":
		return hook.Because(fs.ErrNotExist, "there is no member without a name")
	case err != nil && strings.HasPrefix(string(ref), "id:"), err != nil && strings.HasPrefix(string(ref), "link:"):
		return hook.Because(hook.ErrUsage, "%w", err)
	}
	return nil
}

// ask runs fn with the family of the opened target. It tries again while fn returns
// kernel.ErrAgain.
func ask[T any](ctx context.Context, o *target.Opened, fn func(*target.Opened, family) (T, error)) (answer T, err error) {
	err = kernel.Retry(ctx, func() error {
		return in(ctx, o, func(f family) error {
			answer, err = fn(o, f)
			return err
		})
	})
	return answer, err
}

// makeHandle opens the target for fn. The Handle that fn makes takes over the opened
// target.
func makeHandle(ctx context.Context, t target.Target, fn func(*target.Opened, family) (target.Handle, error)) (target.Handle, error) {
	o, err := target.Open(t, sweep)
	if err != nil {
		return nil, err
	}
	h, err := ask(ctx, o, fn)
	if err != nil {
		o.Close()
		return nil, err
	}
	h.ReleaseNetNS()
	return h, nil
}

// opened opens the target, runs fn, again while fn returns kernel.ErrAgain, and closes the
// target.
func opened[T any](ctx context.Context, t target.Target, fn func(*target.Opened) (T, error)) (answer T, err error) {
	o, err := target.Open(t, sweep)
	if err != nil {
		return answer, err
	}
	defer o.Close()
	err = kernel.Retry(ctx, func() error {
		answer, err = fn(o)
		return err
	})
	return answer, err
}

// inFamily does the same, and gives fn the family too, see ask.
func inFamily[T any](ctx context.Context, t target.Target, fn func(*target.Opened, family) (T, error)) (T, error) {
	return opened(ctx, t, func(o *target.Opened) (T, error) { return ask(ctx, o, fn) })
}

// Plan does what Attach does but for the last step, and returns the chain as it would
// be.
func Plan(ctx context.Context, t target.Target, src load.Source, req target.Request) (*hook.Chain, error) {
	return inFamily(ctx, t, func(o *target.Opened, f family) (*hook.Chain, error) {
		if err := req.Check(o); err != nil {
			return nil, err
		}
		return f.Plan(ctx, o, src, req)
	})
}

// Detach removes an entry. It removes an entry that is not ours only with force.
func Detach(ctx context.Context, t target.Target, ref hook.Ref, force bool) error {
	if err := checkRef(ref); err != nil {
		return err
	}
	return detach(ctx, t, ref, force)
}

// DetachAll removes all members.
func DetachAll(ctx context.Context, t target.Target) error { return detach(ctx, t, "", false) }

func detach(ctx context.Context, t target.Target, ref hook.Ref, force bool) error {
	_, err := inFamily(ctx, t, func(o *target.Opened, f family) (any, error) { return nil, f.Detach(ctx, o, ref, force) })
	return err
}

// Read returns what is on the target.
func Read(ctx context.Context, t target.Target) (*hook.Chain, error) {
	return inFamily(ctx, t, read)
}

func read(o *target.Opened, f family) (*hook.Chain, error) { return f.Read(o) }

// Effective returns what runs for a cgroup and for the cgroups below it, see
// dispatcher.Effective. It returns ErrUsage when the hook is not a cgroup's.
func Effective(ctx context.Context, t target.Target) ([]hook.Chain, error) {
	if !t.Hook.OnCgroup() {
		return nil, hook.Because(hook.ErrUsage, "%s is not a hook of cgroups: nothing is inherited there", t.Hook)
	}
	return opened(ctx, t, links.EffectiveBelow)
}

// ReadEffective returns what runs on the target. For a cgroup this includes what the
// cgroup inherits.
func ReadEffective(ctx context.Context, t target.Target) (*hook.Chain, error) {
	if !t.Hook.OnCgroup() {
		return Read(ctx, t)
	}
	return opened(ctx, t, links.EffectiveOn)
}

// Convert moves all members of the chain on a device to a chain of the other style,
// and returns the new chain.
func Convert(ctx context.Context, t target.Target, req interop.ConvertRequest) (*hook.Chain, error) {
	if t.Hook != hook.XDP {
		return nil, hook.Because(hook.ErrUsage, "%s has no styles of chains; only xdp has", t.Hook)
	}
	return opened(ctx, t, func(o *target.Opened) (*hook.Chain, error) {
		if err := interop.Convert(ctx, o, req); err != nil {
			return nil, err
		}
		return ask(ctx, o, read)
	})
}

// Seal links the members of the chain on the target into its dispatcher, see
// dispatcher.Seal. A dry run only reports.
func Seal(ctx context.Context, t target.Target, dry bool) ([]hook.Sealing, error) {
	return opened(ctx, t, func(o *target.Opened) ([]hook.Sealing, error) { return chains.Seal(ctx, o, dry) })
}

// Unseal makes the chain's dispatcher call all members through their slots again.
func Unseal(ctx context.Context, t target.Target) error {
	_, err := opened(ctx, t, func(o *target.Opened) (any, error) { return nil, chains.Unseal(ctx, o) })
	return err
}

// Count starts counting in the chain on the target. The caller closes the Counting.
func Count(ctx context.Context, t target.Target) (*chains.Counting, error) {
	return opened(ctx, t, func(o *target.Opened) (*chains.Counting, error) { return chains.Count(ctx, o) })
}
