package chains

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
	"github.com/libdispatcher/dispatcher/internal/target"
)

// A Counting counts an XDP chain while it is open. It holds neither the root link nor
// a slot, so watching a chain does not keep the chain.
type Counting struct {
	target     target.Target
	sweep      func(*state.Locked)
	link       uint32 // the root link's id; 0 when netlink carries the chain
	chainID    uint64
	dispatcher uint32 // the counting dispatcher's program id
	watch      *state.Watch
	found      map[uint32]dispatch.Counts // what other processes had counted before
}

// Count swaps in a dispatcher that counts, or joins the processes that count the chain
// already. The caller closes the Counting. The error is fs.ErrNotExist when there is no
// owned chain, and ErrBusy when another version of dispatcher counts it.
func Count(ctx context.Context, o *target.Opened) (c *Counting, err error) {
	d := Device{o}
	err = d.Change(ctx, func(*state.Locked) error {
		c, err = d.count()
		return err
	})
	return c, err
}

func (d Device) count() (*Counting, error) {
	snap, err := d.Read()
	if err != nil {
		return nil, err
	}
	defer snap.Close()
	if snap.Chain == nil || snap.Chain.Closed {
		return nil, hook.Because(fs.ErrNotExist, "there is no chain that could be counted")
	}
	c := &Counting{target: d.Target, sweep: d.Sweep, link: snap.Root.LinkID(), chainID: snap.Chain.ID}
	if snap.Chain.Watch != 0 {
		c.watch, err = state.OpenWatch(snap.Chain)
		if err == nil { // start from the counts that other processes have reached
			c.dispatcher = kernel.ProgramID(snap.Prog)
			if c.found, err = c.watch.Read(); err != nil {
				c.watch.Close()
				return nil, err
			}
			return c, nil
		}
		if errors.Is(err, ebpf.ErrNotSupported) {
			return nil, hook.Because(hook.ErrBusy, "another version of dispatcher is watching the chain: %w", err).
				Hint("end that one first")
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	c.dispatcher, err = rebuild(snap.Root, snap.Prog, snap.Chain, "watch", func(next *state.Chain, slots []*ebpf.Map, codes []*dispatch.Code) (d *state.Dispatcher, err error) {
		d, c.watch, err = state.BuildWatched(next, slots, codes)
		return d, err
	})
	if err != nil {
		if c.watch != nil {
			c.watch.Close()
		}
		return nil, err
	}
	return c, nil
}

// A builder loads a dispatcher for a chain and its open slots; see [state.Build].
type builder func(*state.Chain, []*ebpf.Map, []*dispatch.Code) (*state.Dispatcher, error)

// rebuild swaps in another dispatcher of the same chain and returns its id.
func rebuild(r root, old *ebpf.Program, chain *state.Chain, step string, build builder) (uint32, error) {
	next := *chain
	next.RootLink = r.LinkID()
	d, err := build.load(r, &next)
	if err != nil {
		return 0, err
	}
	defer d.Close()
	return kernel.ProgramID(d.Program), swapIn(r, step, d, old)
}

// load builds the dispatcher. Like revise it keeps the slots open only meanwhile.
func (build builder) load(r root, chain *state.Chain) (*state.Dispatcher, error) {
	opened := slotsOf(r, chain)
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

// unwatch swaps the plain dispatcher in if no process counts the chain any more.
func unwatch(r root, old *ebpf.Program, chain *state.Chain) error {
	if chain.Closed || !state.Abandoned(chain) {
		return nil
	}
	_, err := rebuild(r, old, chain, "unwatch", state.Build)
	return err
}

// Counts reports whether the chain runs the counting dispatcher.
func (c *Counting) Counts(chain *hook.Chain) bool {
	return chain.DispatcherID == c.dispatcher && c.watch.Alive()
}

// Current is a cheap form of Counts that asks only the root link. It returns true when
// the link cannot tell: netlink carries the chain, or the chain is gone.
func (c *Counting) Current() bool {
	if c.link == 0 {
		return true
	}
	r, err := openLinkRoot(c.link, nil)
	if err != nil {
		return true
	}
	defer r.Close()
	prog, ifindex, err := r.state()
	return err != nil || ifindex == 0 || prog == c.dispatcher
}

// Read returns the counts so far, by slot id. Other processes may have begun to count
// earlier; see Found.
func (c *Counting) Read() (map[uint32]dispatch.Counts, error) { return c.watch.Read() }

// Found returns the counts at the time when this Counting began: none, unless other
// processes counted the chain already.
func (c *Counting) Found() map[uint32]dispatch.Counts { return c.found }

// Close ends the counting. It swaps the plain dispatcher in unless other processes
// still count. A chain that is gone is no error.
func (c *Counting) Close(ctx context.Context) error {
	c.watch.Close()
	err := kernel.Retry(ctx, func() error { return c.end(ctx) })
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, hook.ErrDefunct) || errors.Is(err, kernel.ErrNetNSGone) {
		return nil
	}
	return err
}

// end finds the chain, by its root link or else on its device, and calls unwatch.
func (c *Counting) end(ctx context.Context) error {
	if c.link == 0 {
		o, err := target.Open(c.target, c.sweep)
		if err != nil {
			return err
		}
		defer o.Close()
		d := Device{o}
		return d.Locked(ctx, func(*state.Locked) error {
			snap, err := d.Read()
			if err != nil {
				return err
			}
			defer snap.Close()
			if !c.ours(snap.Chain) {
				return nil
			}
			return unwatch(snap.Root, snap.Prog, snap.Chain)
		})
	}
	o, err := target.OpenPins(c.target, c.sweep)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return o.Locked(ctx, func(*state.Locked) error {
		r, err := openLinkRoot(c.link, o.Pins)
		if err != nil {
			return err
		}
		defer r.Close()
		prog, chain, err := carried(r, c.chainID)
		if err != nil {
			return err
		}
		defer prog.Close()
		if !c.ours(chain) {
			return nil
		}
		return unwatch(r, prog, chain)
	})
}

// ours reports whether the chain is the counted one.
func (c *Counting) ours(chain *state.Chain) bool { return chain != nil && chain.Watch == c.watch.ID }
