package attach

import (
	"context"
	"fmt"
	"io/fs"
	"strings"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/state"
)

// A Handle owns a member: the member stays while one is open. The methods are
// those of dispatcher.Link.
type Handle interface {
	Update(ctx context.Context, src load.Source) error
	Set(ctx context.Context, settings hook.Settings) error
	Move(ctx context.Context, to hook.Position) error
	Pin(ctx context.Context) error
	Unpin(ctx context.Context) error
	Detach(ctx context.Context) error
	Close() error
	Info(ctx context.Context) (*hook.Member, error)
	Chain(ctx context.Context) (*hook.Chain, error)
	Program() (*ebpf.Program, error)
}

// A family is how programs are attached to hooks of one kind. A Handle that it
// returns has taken over the site.
type family interface {
	attach(ctx context.Context, s *site, src load.Source, req Request) (Handle, error)
	// plan is attach up to the point where others would see it.
	plan(ctx context.Context, s *site, src load.Source, req Request) (*hook.Chain, error)
	adopt(ctx context.Context, s *site, req AdoptRequest) (Handle, error)
	open(ctx context.Context, s *site, ref hook.Ref) (Handle, error)
	// detach takes out one entry, or all members for an empty ref; with force
	// one that is not ours too.
	detach(ctx context.Context, s *site, ref hook.Ref, force bool) error
	read(ctx context.Context, s *site) (*hook.Chain, error)
}

func (p Place) family() family {
	switch p.Hook.Family() {
	case "xdp":
		return xdp{}
	case "tc":
		return filters{}
	}
	return linked{}
}

// An AdoptRequest is what a program that is attached without a link asks for
// when it becomes a member.
type AdoptRequest struct {
	Request
	NoGap bool
	// Entry is which one; may be empty where there is one only.
	Entry hook.Ref
}

// Attach makes the program of src a member at p.
func Attach(ctx context.Context, p Place, src load.Source, req Request) (Handle, error) {
	return p.handle(func(s *site) (Handle, error) {
		if err := req.check(s); err != nil {
			return nil, err
		}
		return p.family().attach(ctx, s, src, req)
	})
}

// Adopt makes an entry without a link a member at the same place.
func Adopt(ctx context.Context, p Place, req AdoptRequest) (Handle, error) {
	return p.handle(func(s *site) (Handle, error) {
		if err := req.check(s); err != nil {
			return nil, err
		}
		return p.family().adopt(ctx, s, req)
	})
}

// Open opens a member.
func Open(ctx context.Context, p Place, ref hook.Ref) (Handle, error) {
	if err := checkRef(ref); err != nil {
		return nil, err
	}
	return p.handle(func(s *site) (Handle, error) { return p.family().open(ctx, s, ref) })
}

// OpenPinned opens a member by the path of its pin, and tells its hook.
func OpenPinned(ctx context.Context, path string) (h Handle, _ hook.Hook, err error) {
	pins, folder, member, err := state.ParseHeldPath(path)
	if err != nil {
		return nil, "", hook.Because(hook.ErrUsage, "%w", err)
	}
	ns, err := kernel.OpenNetNS("")
	if err != nil {
		return nil, "", err
	}
	s := &site{Place: Place{Hook: hook.XDP, BPFFS: pins.BPFFS()}, ns: ns, pins: pins}
	if id := state.ParseLinkFolder(folder); id != 0 {
		h, err = s.openPinnedLink(folder, member)
	} else {
		h, err = s.openPinned(folder, member)
	}
	if err != nil {
		ns.Close()
		return nil, "", err
	}
	return h, s.Hook, nil
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

// handle opens the place for fn, which makes a Handle.
func (p Place) handle(fn func(*site) (Handle, error)) (Handle, error) {
	s, err := p.open()
	if err != nil {
		return nil, err
	}
	h, err := fn(s)
	if err != nil {
		s.close()
		return nil, err
	}
	return h, nil
}

// do opens the place for fn.
func (p Place) do(fn func(*site) error) error {
	s, err := p.open()
	if err != nil {
		return err
	}
	defer s.close()
	return fn(s)
}

// Plan is Attach without the last step: it returns the chain as it would be.
func Plan(ctx context.Context, p Place, src load.Source, req Request) (c *hook.Chain, err error) {
	err = p.do(func(s *site) error {
		if err := req.check(s); err != nil {
			return err
		}
		c, err = p.family().plan(ctx, s, src, req)
		return err
	})
	return c, err
}

// Detach takes an entry out; one that is not ours only with force.
func Detach(ctx context.Context, p Place, ref hook.Ref, force bool) error {
	if err := checkRef(ref); err != nil {
		return err
	}
	return p.do(func(s *site) error { return p.family().detach(ctx, s, ref, force) })
}

// DetachAll takes all members out.
func DetachAll(ctx context.Context, p Place) error {
	return p.do(func(s *site) error { return p.family().detach(ctx, s, "", false) })
}

// Read returns what is at p.
func Read(ctx context.Context, p Place) (c *hook.Chain, err error) {
	err = p.do(func(s *site) error {
		c, err = p.family().read(ctx, s)
		return err
	})
	return c, err
}

// needs is the error for a hook that this kernel does not have.
func needs(h hook.Hook, err error) error {
	return fmt.Errorf("%s needs Linux %s: %w: %w", h, kernel.KindOf(h).Needs, ebpf.ErrNotSupported, err)
}
