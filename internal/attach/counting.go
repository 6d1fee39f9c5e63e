package attach

import (
	"context"
	"errors"
	"io/fs"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/state"
)

// A Counting has an XDP chain counted while it is open. It holds neither the link
// nor a slot: who watches a chain does not keep it.
type Counting struct {
	place      Place
	link       uint32 // that carries the chain; 0 for netlink
	dispatcher uint32 // program id
	watch      *state.Watch
	found      map[uint32]dispatch.Counts // what others had counted before
}

// Count swaps in a dispatcher that counts, or joins those for whom one is there.
// fs.ErrNotExist when there is no chain of ours.
func Count(ctx context.Context, p Place) (c *Counting, err error) {
	err = p.do(func(s *site) error {
		return kernel.Retry(ctx, func() error {
			return s.locked(ctx, func(*state.Locked) error {
				c, err = s.count()
				return err
			})
		})
	})
	return c, err
}

func (s *site) count() (*Counting, error) {
	snap, err := s.read()
	if err != nil {
		return nil, err
	}
	defer snap.close()
	if snap.chain == nil || snap.chain.Closed {
		return nil, hook.Because(fs.ErrNotExist, "there is no chain that could be counted")
	}
	c := &Counting{place: s.Place, link: snap.root.linkID()}
	if snap.chain.Watch != 0 {
		c.watch, err = state.OpenWatch(snap.chain)
		if err == nil {
			return c.join(snap.prog)
		}
		if errors.Is(err, ebpf.ErrNotSupported) {
			return nil, hook.Because(hook.ErrBusy, "another version of dispatcher is watching the chain: %w", err).
				Hint("end that one first")
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	c.dispatcher, err = rebuild(snap.root, snap.prog, snap.chain, "watch", func(next *state.Chain, slots []*ebpf.Map, codes []*dispatch.Code) (prog *ebpf.Program, err error) {
		prog, c.watch, err = state.BuildWatched(next, slots, codes)
		return prog, err
	})
	if err != nil {
		if c.watch != nil {
			c.watch.Close()
		}
		return nil, err
	}
	return c, nil
}

// join begins with what others have counted so far.
func (c *Counting) join(prog *ebpf.Program) (_ *Counting, err error) {
	c.dispatcher = kernel.ProgramID(prog)
	if c.found, err = c.watch.Read(); err != nil {
		c.watch.Close()
		return nil, err
	}
	return c, nil
}

// A builder loads a dispatcher for a chain whose slots are open; see [state.Build].
type builder func(*state.Chain, []*ebpf.Map, []*dispatch.Code) (*ebpf.Program, error)

// rebuild swaps in another dispatcher of the same chain and returns its id.
func rebuild(r root, old *ebpf.Program, chain *state.Chain, step string, build builder) (uint32, error) {
	next := *chain
	next.RootLink = r.linkID()
	prog, err := build.load(&next)
	if err != nil {
		return 0, err
	}
	defer prog.Close()
	kernel.Step(step + ": before")
	if err := r.swap(prog, old); err != nil {
		return 0, err
	}
	kernel.Step(step + ": after")
	return kernel.ProgramID(prog), nil
}

// load opens the slots for no longer than it takes, as revise does.
func (build builder) load(chain *state.Chain) (*ebpf.Program, error) {
	var opened state.Slots
	defer opened.Close()
	slots := make([]*ebpf.Map, len(chain.Slots))
	for i, s := range chain.Slots {
		var err error
		if slots[i], err = opened.Open(s.MapID, false); err != nil {
			return nil, kernel.Again(err)
		}
	}
	chain.Slots = slices.Clone(chain.Slots)
	return build(chain, slots, sealedCodes(chain, slots))
}

// unwatch swaps the plain dispatcher in where one is watched by nobody any more.
func unwatch(r root, old *ebpf.Program, chain *state.Chain) error {
	if chain.Closed || !state.Abandoned(chain) {
		return nil
	}
	_, err := rebuild(r, old, chain, "unwatch", state.Build)
	return err
}

// Counts tells whether what runs is what counts.
func (c *Counting) Counts(chain *hook.Chain) bool {
	return chain.DispatcherID == c.dispatcher && c.watch.Alive()
}

// Current tells it at little cost, where that is possible: not for a chain that
// netlink carries, nor for one that is gone.
func (c *Counting) Current() bool {
	if c.link == 0 {
		return true
	}
	r, err := openLinkRoot(c.link)
	if err != nil {
		return true
	}
	defer r.close()
	prog, ifindex, err := r.state()
	return err != nil || ifindex == 0 || prog == c.dispatcher
}

// Read returns what was counted so far, by slot id. Others who watch may have
// begun before; see Found.
func (c *Counting) Read() (map[uint32]dispatch.Counts, error) { return c.watch.Read() }

// Found is what Read would have returned when this counting began: nothing, unless
// others were watching.
func (c *Counting) Found() map[uint32]dispatch.Counts { return c.found }

// Close ends the counting, and swaps the plain dispatcher in unless others still
// watch. That the chain is gone is no error.
func (c *Counting) Close(ctx context.Context) error {
	c.watch.Close()
	err := kernel.Retry(ctx, c.end(ctx))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, hook.ErrDefunct) || errors.Is(err, kernel.ErrNetNSGone) {
		return nil
	}
	return err
}

// end returns what looks for the chain, by its link or else on its device, and
// swaps.
func (c *Counting) end(ctx context.Context) func() error {
	ours := func(chain *state.Chain) bool { return chain != nil && chain.Watch == c.watch.ID }
	if c.link == 0 {
		return func() error {
			return c.place.do(func(s *site) error {
				return s.locked(ctx, func(*state.Locked) error {
					snap, err := s.read()
					if err != nil {
						return err
					}
					defer snap.close()
					if !ours(snap.chain) {
						return nil
					}
					return unwatch(snap.root, snap.prog, snap.chain)
				})
			})
		}
	}
	return func() error {
		pins, err := state.OpenPins(c.place.BPFFS)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		s := &site{Place: c.place, pins: pins}
		return s.locked(ctx, func(*state.Locked) error {
			r, err := openLinkRoot(c.link)
			if err != nil {
				return err
			}
			defer r.close()
			prog, err := r.program()
			if err != nil {
				return err
			}
			defer prog.Close()
			chain, err := state.Find(prog)
			if errors.Is(err, state.ErrNotOurs) || err == nil && !ours(chain) {
				return nil
			}
			if err != nil {
				return kernel.Again(err)
			}
			return unwatch(r, prog, chain)
		})
	}
}
