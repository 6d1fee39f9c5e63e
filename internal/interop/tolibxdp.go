package interop

import (
	"context"
	"fmt"
	"io/fs"
	"maps"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/chains"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/libxdp"
)

// toLibxdp takes an owned chain off the device and puts a dispatcher of libxdp
// there. Netlink cannot replace a link, so nothing is attached for a moment.
// Everything else is done before.
func (d device) toLibxdp(ctx context.Context, req ConvertRequest) error {
	snap, err := d.Read()
	if err != nil {
		return err
	}
	defer snap.Close()
	switch {
	case snap.Free():
		return hook.Because(fs.ErrNotExist, "nothing is attached")
	case snap.Libxdp:
		return hook.Because(fs.ErrExist, "the chain is one of libxdp already").
			Hint("attach adds members to it")
	case snap.Chain == nil:
		return d.Occupied(snap)
	}
	view, err := d.View(snap)
	if err != nil {
		return err
	}
	members, release, err := d.incoming(view, req)
	if err != nil {
		return err
	}
	// Build loads all members, which takes time. So the lock is not held here.
	built, err := d.libxdp().Build(ctx, members, req.ConfigVersion)
	if err != nil {
		release(false)
		return Cause(err)
	}
	kernel.Step("convert: built")
	attached := false
	err = d.Locked(ctx, func(l *state.Locked) (err error) {
		if !snap.Current() { // the chain was changed meanwhile
			return kernel.ErrAgain
		}
		attached, err = d.exchangeForLibxdp(l, snap, built)
		return err
	})
	if !attached {
		err = kernel.Undo(err, built.Discard())
	}
	release(err == nil)
	return err
}

// exchangeForLibxdp replaces the owned chain by libxdp's dispatcher. It tells whether that
// is attached; there may be an error all the same.
func (d device) exchangeForLibxdp(l *state.Locked, snap *chains.Snapshot, built *libxdp.Built) (attached bool, err error) {
	folder := state.ChainFolder(snap.Root.LinkID(), snap.Chain.ID)
	n := snap.OnNetlink(d.Opened)
	kernel.Step("convert: before the gap")
	if snap.Root.LinkID() == 0 {
		if err := n.Swap(built.Dispatcher, snap.Prog); err != nil {
			return false, err
		}
	} else {
		if err := snap.Root.Release(snap.Prog); err != nil {
			return false, err
		}
		kernel.Step("convert: in the gap")
		if err := n.Attach(built.Dispatcher); err != nil {
			return false, kernel.Undo(fmt.Errorf("attach libxdp's dispatcher: %w", err), d.reinstate(l, snap, folder))
		}
	}
	kernel.Step("convert: after the gap")
	built.Commit()
	return true, l.DropChain(folder)
}

// reinstate puts the chain back after its link was detached. The chain gets a new link.
func (d device) reinstate(l *state.Locked, snap *chains.Snapshot, folder string) error {
	r, err := d.Create(snap.Device.Index, snap.Mode, snap.Prog)
	if err == nil {
		defer r.Close()
		err = l.Succession(folder, state.ChainFolder(r.LinkID(), 0), r.Pinner())
	}
	if err != nil {
		return hook.WithHint(fmt.Errorf("the chain could not be put back: %w", err), "\"%s\" tries it again", kernel.Command("", d.BPFFS, kernel.Flags{"--reattach"}, "recover"))
	}
	return nil
}

// incoming returns the members of an owned chain as members of a chain of libxdp.
// The caller calls release, and says whether the members are in use.
func (d device) incoming(view *hook.Chain, req ConvertRequest) (members []libxdp.Source, release func(used bool), err error) {
	var components []*component
	release = func(used bool) {
		for _, c := range components {
			if c.loaded != nil && used {
				c.loaded.Close()
			} else {
				c.Close()
			}
		}
	}
	given := maps.Clone(req.Programs)
	last := hook.MinPriority
	for i := range view.Members {
		m := &view.Members[i]
		if err := convertible(m); err != nil {
			return nil, nil, err
		}
		if m.State == hook.StateEmpty {
			continue // packets skip it in the owned chain too
		}
		src := req.source(given, m)
		if src == nil {
			src = load.ID(m.Program.ID)
		}
		src, about, err := load.Describe(load.PinningIn(src, d.BPFFS))
		if err != nil {
			return nil, nil, err
		}
		about.Shape.Frags = view.Frags
		// libxdp orders members of equal priority by name.
		if n := len(components); n > 0 && m.Priority <= last && components[n-1].about.Name > about.Name {
			last++
		}
		last = max(last, m.Priority)
		c := &component{src: src, about: about, asked: m.Settings, old: m.Program.ID, bpffs: d.BPFFS, begins: d.Begins}
		c.asked.Priority = last
		components, members = append(components, c), append(members, c)
	}
	switch err := unknown(given, view); {
	case err != nil:
		return nil, nil, err
	case len(members) == 0:
		return nil, nil, hook.Because(fs.ErrNotExist, "the chain has no member that runs")
	case len(members) > libxdp.MaxMembers:
		return nil, nil, hook.Because(hook.ErrChainFull, "the chain has %d members, and libxdp's dispatcher has room for %d", len(members), libxdp.MaxMembers)
	}
	return members, release, nil
}

// convertible returns an error when a member cannot be in a chain of libxdp.
func convertible(m *hook.Member) error {
	switch {
	case m.State != hook.StateRunning && m.OnMissing != hook.MissingContinue, m.OnMissing > hook.MissingContinue:
		return hook.Because(hook.ErrIncompatible, "member %q asks for a closed door when its owner is gone (%v), which libxdp does not have", m.Name, m.OnMissing).
			Hint("set it to --on-missing continue first, or detach it")
	case m.State == hook.StateRunning && !m.Persistent:
		return hook.Because(hook.ErrBusy, "member %q is owned by a process, which would lose it", m.Name).
			Hint("pin it first, or end its owner")
	}
	return nil
}
