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
	"github.com/libdispatcher/dispatcher/internal/links"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// A family is how programs are attached to hooks of one kind. A Handle that it
// returns has taken over the opened target.
type family interface {
	Attach(ctx context.Context, o *target.Opened, src load.Source, req target.Request) (target.Handle, error)
	// plan is attach up to the point where others would see it.
	Plan(ctx context.Context, o *target.Opened, src load.Source, req target.Request) (*hook.Chain, error)
	Adopt(ctx context.Context, o *target.Opened, req target.AdoptRequest) (target.Handle, error)
	Open(ctx context.Context, o *target.Opened, ref hook.Ref) (target.Handle, error)
	// detach takes out one entry, or all members for an empty ref; with force
	// one that is not ours too.
	Detach(ctx context.Context, o *target.Opened, ref hook.Ref, force bool) error
	Read(ctx context.Context, o *target.Opened) (*hook.Chain, error)
}

// families returns those that a target can belong to. On XDP the chain on the
// device tells which: each returns errStyle for a chain of the other.
func families(h hook.Hook) []family {
	switch h.Family() {
	case "xdp":
		return []family{chains.Family{}, interop.Family{}}
	case "tc":
		return []family{filters.Family{}}
	}
	return []family{links.Family{}}
}

// in runs fn with the family that has the opened target.
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

// Attach makes the program of src a member at p.
func Attach(ctx context.Context, t target.Target, src load.Source, req target.Request) (target.Handle, error) {
	return makeHandle(ctx, t, func(o *target.Opened, f family) (target.Handle, error) {
		if err := req.Check(o); err != nil {
			return nil, err
		}
		return f.Attach(ctx, o, src, req)
	})
}

// Adopt makes an entry without a link a member at the same place.
func Adopt(ctx context.Context, t target.Target, req target.AdoptRequest) (target.Handle, error) {
	return makeHandle(ctx, t, func(o *target.Opened, f family) (target.Handle, error) {
		if err := req.Check(o); err != nil {
			return nil, err
		}
		return f.Adopt(ctx, o, req)
	})
}

// Open opens a member.
func Open(ctx context.Context, t target.Target, ref hook.Ref) (target.Handle, error) {
	if err := checkRef(ref); err != nil {
		return nil, err
	}
	return makeHandle(ctx, t, func(o *target.Opened, f family) (target.Handle, error) { return f.Open(ctx, o, ref) })
}

// OpenPinned opens a member by the path of its pin, and tells its hook.
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
	return h, o.Hook, nil
}

// checkRef refuses what names nothing. A name that no member can have is one
// that is not there.
func checkRef(ref hook.Ref) error {
	switch err := ref.Check(); {
	case ref == "":
		return hook.Because(fs.ErrNotExist, "there is no member without a name")
	case err != nil && strings.HasPrefix(string(ref), "id:"), err != nil && strings.HasPrefix(string(ref), "link:"):
		return hook.Because(hook.ErrUsage, "%w", err)
	}
	return nil
}

// makeHandle opens the target for fn, which makes a Handle that takes it over.
func makeHandle(ctx context.Context, t target.Target, fn func(*target.Opened, family) (target.Handle, error)) (h target.Handle, err error) {
	o, err := target.Open(t, sweep)
	if err != nil {
		return nil, err
	}
	err = in(ctx, o, func(f family) (err error) {
		h, err = fn(o, f)
		return err
	})
	if err != nil {
		o.Close()
		return nil, err
	}
	return h, nil
}

// withOpened opens the target for fn.
func withOpened(t target.Target, fn func(*target.Opened) error) error {
	o, err := target.Open(t, sweep)
	if err != nil {
		return err
	}
	defer o.Close()
	return fn(o)
}

// inFamily opens the target for fn.
func inFamily(ctx context.Context, t target.Target, fn func(*target.Opened, family) error) error {
	return withOpened(t, func(o *target.Opened) error {
		return in(ctx, o, func(f family) error { return fn(o, f) })
	})
}

// Plan is Attach without the last step: it returns the chain as it would be.
func Plan(ctx context.Context, t target.Target, src load.Source, req target.Request) (c *hook.Chain, err error) {
	err = inFamily(ctx, t, func(o *target.Opened, f family) error {
		if err := req.Check(o); err != nil {
			return err
		}
		c, err = f.Plan(ctx, o, src, req)
		return err
	})
	return c, err
}

// Detach takes an entry out; one that is not ours only with force.
func Detach(ctx context.Context, t target.Target, ref hook.Ref, force bool) error {
	if err := checkRef(ref); err != nil {
		return err
	}
	return inFamily(ctx, t, func(o *target.Opened, f family) error { return f.Detach(ctx, o, ref, force) })
}

// DetachAll takes all members out.
func DetachAll(ctx context.Context, t target.Target) error {
	return inFamily(ctx, t, func(o *target.Opened, f family) error { return f.Detach(ctx, o, "", false) })
}

// Read returns what is at p.
func Read(ctx context.Context, t target.Target) (c *hook.Chain, err error) {
	err = inFamily(ctx, t, func(o *target.Opened, f family) error {
		c, err = f.Read(ctx, o)
		return err
	})
	return c, err
}

// Effective returns what runs for a cgroup, see dispatcher.Effective.
func Effective(ctx context.Context, t target.Target) (chains []hook.Chain, err error) {
	if !t.Hook.OnCgroup() {
		return nil, hook.Because(hook.ErrUsage, "%s is not a hook of cgroups: nothing is inherited there", t.Hook)
	}
	err = withOpened(t, func(o *target.Opened) error {
		chains, err = links.EffectiveBelow(ctx, o)
		return err
	})
	return chains, err
}

// Runs returns what runs at p: for a cgroup with what its ancestors have.
func ReadEffective(ctx context.Context, t target.Target) (c *hook.Chain, err error) {
	if !t.Hook.OnCgroup() {
		return Read(ctx, t)
	}
	err = withOpened(t, func(o *target.Opened) error {
		c, err = links.EffectiveOn(ctx, o)
		return err
	})
	return c, err
}

// Convert moves all members of the chain on a device over to a chain of the other
// style.
func Convert(ctx context.Context, t target.Target, req interop.ConvertRequest) (c *hook.Chain, err error) {
	if t.Hook != hook.XDP {
		return nil, hook.Because(hook.ErrUsage, "%s has no styles of chains; only xdp has", t.Hook)
	}
	err = withOpened(t, func(o *target.Opened) error {
		if err := interop.Convert(ctx, o, req); err != nil {
			return err
		}
		return in(ctx, o, func(f family) error {
			c, err = f.Read(ctx, o)
			return err
		})
	})
	return c, err
}

// SealChain links the members of the chain at p into its dispatcher, see Seal.
func Seal(ctx context.Context, t target.Target, dry bool) (report []hook.Sealing, err error) {
	err = withOpened(t, func(o *target.Opened) error {
		report, err = chains.Seal(ctx, o, dry)
		return err
	})
	return report, err
}

// UnsealChain has all members of the chain at p called through their slots again.
func Unseal(ctx context.Context, t target.Target) error {
	return withOpened(t, func(o *target.Opened) error { return chains.Unseal(ctx, o) })
}

// CountChain has the chain at p counted, see Count.
func Count(ctx context.Context, t target.Target) (c *chains.Counting, err error) {
	err = withOpened(t, func(o *target.Opened) error {
		c, err = chains.Count(ctx, o)
		return err
	})
	return c, err
}
