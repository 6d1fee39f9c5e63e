package attach

import (
	"cmp"
	"context"
	"slices"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/chains"
	"github.com/libdispatcher/dispatcher/internal/interop"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/links"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
	"github.com/libdispatcher/dispatcher/libxdp"
)

// sweep removes what dead processes left among the pins of the bpffs.
func sweep(l *state.Locked) {
	links.Sweep(l)
	l.RemoveLeftovers()
	chains.Sweep(l)
}

// Recover collects what members left behind when their device or cgroup went, and
// what processes left behind when they died.
//
// With reattach it attaches members again if their device or cgroup is back. A dry
// run only reports. Recover returns ErrChanged when another process has the lock.
func Recover(ctx context.Context, bpffs string, dryRun, reattach, override bool) ([]hook.Leftover, error) {
	o, err := target.OpenPins(target.Target{BPFFS: bpffs}, nil)
	if err != nil {
		return nil, err
	}
	r := &target.Recovery{Ctx: ctx, DryRun: dryRun, Reattach: reattach, Override: override}
	err = o.Locked(ctx, func(l *state.Locked) error {
		if !l.Alone {
			return hook.Because(hook.ErrChanged, "the lock of %s%s was not released in %v", o.Pins.Path(""), kernel.LockedBy(o.Pins.Path("")), kernel.LockWait)
		}
		r.Locked = l
		if err := abandoned(r); err != nil {
			return err
		}
		chains.RecoverWatched(r)
		if !dryRun {
			sweep(l)
		}
		return defunct(r)
	})
	if err != nil {
		return r.Found, err
	}
	more, err := libxdpLeftovers(ctx, bpffs, dryRun)
	return append(r.Found, more...), err
}

// libxdpLeftovers collects the pins of libxdp's dispatchers that are on no device. A
// dry run only reports them.
func libxdpLeftovers(ctx context.Context, bpffs string, dryRun bool) (found []hook.Leftover, err error) {
	find := libxdp.Device.Clean
	if dryRun {
		find = libxdp.Device.Leftovers
	}
	paths, err := find(libxdp.Device{BPFFS: bpffs}, ctx)
	for _, path := range paths {
		found = append(found, hook.Leftover{Hook: hook.XDP, Path: path, What: "pins of a dispatcher of libxdp that is on no device"})
	}
	return found, interop.Cause(err)
}

// byAge sorts folders by the ids of their links: later links have higher ids.
func byAge(folders []string) []string {
	id := func(folder string) uint32 {
		chain, _ := state.ParseChainFolder(folder)
		return max(chain, state.ParseLinkFolder(folder))
	}
	slices.SortFunc(folders, func(a, b string) int { return cmp.Compare(id(a), id(b)) })
	return folders
}

// abandoned reports what the sweep is about to remove.
func abandoned(r *target.Recovery) error {
	paths, err := r.Locked.Leftovers()
	if err != nil {
		return err
	}
	for _, path := range paths {
		r.Report(hook.Leftover{Path: path, What: "pins that a process was about to make or to remove when it died"})
	}
	moves, err := r.Locked.Moves()
	if err != nil {
		return err
	}
	for _, name := range moves {
		r.Report(hook.Leftover{LinkID: state.ParseMove(name), Path: r.Pins.Path(name), What: "a move that a process died at"})
	}
	ofChains, ofLinks, err := folders(r.Locked)
	if err != nil {
		return err
	}
	for _, folder := range append(ofChains, ofLinks...) {
		id, chain := state.ParseChainFolder(folder)
		id = max(id, state.ParseLinkFolder(folder))
		if id != 0 && !kernel.LinkMayExist(id) || id == 0 && chain != 0 && !chains.Alive(folder) {
			f := hook.Leftover{LinkID: id, Path: r.Pins.Path(folder), What: "pins of what is not attached any more"}
			f.Members, f.Err = r.Pins.Members(folder)
			r.Report(f)
		}
	}
	return nil
}

// folders returns the folders of chains, and the folders of members with their own links.
func folders(l *state.Locked) (ofChains, ofLinks []string, err error) {
	if ofChains, err = l.Chains(); err == nil {
		ofLinks, err = l.Links()
	}
	return ofChains, ofLinks, err
}

// defunct recovers the pins of what was on a device or cgroup that is gone.
func defunct(r *target.Recovery) error {
	ofChains, ofLinks, err := folders(r.Locked)
	if err != nil {
		return err
	}
	// If two chains were on one device, the newer chain gets it.
	for _, folder := range slices.Backward(byAge(ofChains)) {
		chains.Recover(r, folder)
	}
	// Of members of equal priority, the oldest runs first.
	for _, folder := range byAge(ofLinks) {
		links.Recover(r, folder)
	}
	return nil
}
