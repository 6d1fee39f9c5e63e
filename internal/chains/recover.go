package chains

import (
	"errors"
	"io/fs"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/holders"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// RecoverWatched reports the counting dispatchers on all devices that have lost their
// watchers. Except in a dry run it swaps the plain dispatchers in. The sweep does not
// do that: it sees only chains with pins.
func RecoverWatched(r *target.Recovery) {
	all, err := kernel.NetNamespaces()
	if err != nil {
		return
	}
	for _, ns := range all {
		if r.Ctx.Err() == nil {
			recoverWatchedIn(r, ns)
		}
		ns.Close()
	}
}

func recoverWatchedIn(r *target.Recovery, ns *kernel.NetNS) {
	var found []*Snapshot
	_ = rtnl.In(ns, func(conn *rtnl.Conn) error {
		devices, err := conn.Devices()
		for _, d := range devices {
			o := &target.Opened{Target: target.Target{Hook: hook.XDP, Name: d.Name}, NS: ns, Pins: r.Pins}
			snap, err := ReadDevice(o, conn, d)
			switch {
			case err != nil:
			case snap.Root != nil && state.Abandoned(snap.Chain):
				found = append(found, snap)
			default:
				snap.Close()
			}
		}
		return err
	})
	for _, snap := range found {
		f := hook.Leftover{Hook: hook.XDP, Target: snap.Device.Name, LinkID: snap.Root.LinkID(), What: "a dispatcher that counts without a watcher: the process that watched it died"}
		if !r.DryRun {
			f.Err = unwatch(snap.Root, snap.Prog, snap.Chain)
		}
		if !errors.Is(f.Err, kernel.ErrAgain) { // else somebody has put in another dispatcher
			r.Report(f)
		}
		snap.Close()
	}
}

// Recover reports the pins of an XDP chain that has lost its device. It attaches the
// chain again, or removes the pins, as r asks.
func Recover(r *target.Recovery, folder string) {
	root, err := openPinnedRoot(r.Pins, folder)
	if err != nil {
		return // not defunct, or for the sweep
	}
	defer root.Close()
	prog, index, err := root.state()
	if err != nil {
		return
	}
	if index != 0 {
		takenBack(r, folder, root.id, prog)
		return
	}
	f := hook.Leftover{
		Hook: hook.XDP, LinkID: root.id, Path: r.Pins.Path(folder),
		What: target.Lost("a chain", "device", state.LastSeen{}),
	}
	if f.Members, f.Err = r.Pins.Members(folder); f.Err != nil {
		r.Report(f)
		return
	}
	chain, err := ChainOf(prog)
	if err == nil && chain == nil {
		err = hook.Because(fs.ErrNotExist, "a holder of the link has replaced its dispatcher")
	}
	if err == nil {
		f.Target, f.What = chain.LastSeen.Target, target.Lost("a chain", "device", chain.LastSeen)
	}
	r.Settle(f, folder, func() error {
		if err != nil {
			return err
		}
		return reattachChain(r, folder, root, prog, chain)
	})
}

// takenBack reports a link whose app has put its own program in the place of the chain, and
// has ended: only the pin keeps that program on the device. Except in a dry run it removes
// the pins.
func takenBack(r *target.Recovery, folder string, link, prog uint32) {
	if chain, err := ChainOf(prog); err != nil || chain != nil || !OnlyPinned(link) {
		return
	}
	f := hook.Leftover{
		Hook: hook.XDP, LinkID: link, Path: r.Pins.Path(folder),
		What: "a link whose app took it back from the chain, and ended: only its pin here keeps it on the device",
	}
	if f.Members, f.Err = r.Pins.Members(folder); f.Err == nil && !r.DryRun {
		f.Err = r.Locked.RemoveChain(folder)
	}
	r.Report(f)
}

// OnlyPinned tells whether nothing but one pin holds a link, with certainty.
func OnlyPinned(link uint32) bool {
	f := holders.Open(holders.Options{})
	defer f.Close()
	view, err := f.Look(hook.HolderLink)
	if err != nil {
		return false
	}
	h, err := view.Of(hook.HolderRef{Kind: hook.HolderLink, ID: link})
	return err == nil && h.Verified && len(h.Processes) == 0 && len(h.Pins) == 1
}

// reattachChain puts the chain on a device of the old name, with a new root link.
func reattachChain(r *target.Recovery, folder string, root *linkRoot, progID uint32, chain *state.Chain) error {
	if chain.LastSeen.Target == "" {
		return target.Nowhere("name known of a device")
	}
	ns, err := target.FindNetNS(chain.LastSeen)
	if err != nil {
		return err
	}
	defer ns.Close()
	s := Device{&target.Opened{Target: target.Target{Hook: hook.XDP, Name: chain.LastSeen.Target, BPFFS: r.Pins.BPFFS()}, NS: ns, Pins: r.Pins}}
	snap, err := s.Read()
	if errors.Is(err, fs.ErrNotExist) {
		return target.Nowhere("device " + chain.LastSeen.Target)
	}
	if err != nil {
		return err
	}
	defer snap.Close()
	if !snap.Free() {
		if snap.Chain == nil {
			return s.Occupied(snap)
		}
		err := hook.Because(hook.ErrBusy, "device %s has another chain by now", chain.LastSeen.Target)
		if snap.Chain.ID == chain.ID {
			err = hook.Because(target.ErrTaken, "%w", err) // a recover that died put the chain there: it is about to go
		}
		return err
	}
	if r.DryRun {
		return nil
	}
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(progID))
	if err != nil {
		return kernel.Errno("dispatcher", err)
	}
	defer prog.Close()
	mode := chain.LastSeen.Mode
	next, err := s.Create(snap.Device.Index, mode, prog)
	if err != nil {
		return err
	}
	defer next.Close()
	to := state.ChainFolder(next.LinkID(), 0)
	kernel.Step("recover: attached")
	if err := r.Locked.Succession(folder, to, next.Pinner()); err != nil {
		return kernel.Undo(err, next.Release(prog))
	}
	return nil
}
