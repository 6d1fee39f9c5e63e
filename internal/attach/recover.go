package attach

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/libxdp"
)

// A Recovery is one run of recover.
type Recovery struct {
	DryRun   bool
	Reattach bool
}

// Recover collects what is left of members whose device or cgroup is gone, and
// of processes that died.
func Recover(ctx context.Context, bpffs string, o Recovery) ([]hook.Leftover, error) {
	pins, err := state.OpenPins(bpffs)
	if err != nil {
		return nil, err
	}
	var found []hook.Leftover
	s := &site{Place: Place{BPFFS: bpffs}, pins: pins}
	err = s.lockedUnswept(ctx, func(l *state.Locked) error {
		r := &recovery{Recovery: o, ctx: ctx, l: l, pins: pins}
		if err := r.abandoned(); err != nil {
			return err
		}
		r.watched()
		if !o.DryRun {
			sweep(l)
		}
		r.registry()
		err := r.defunct()
		found = r.found
		return err
	})
	if err != nil {
		return found, err
	}
	more, err := libxdpLeftovers(ctx, bpffs, o.DryRun)
	return append(found, more...), err
}

// libxdpLeftovers deals with the pins of dispatchers of libxdp that are on no
// device, whoever made them.
func libxdpLeftovers(ctx context.Context, bpffs string, dryRun bool) (found []hook.Leftover, err error) {
	find := libxdp.Device.Clean
	if dryRun {
		find = libxdp.Device.Leftovers
	}
	paths, err := find(libxdp.Device{BPFFS: bpffs}, ctx)
	for _, path := range paths {
		found = append(found, hook.Leftover{Hook: hook.XDP, Path: path, What: "pins of a dispatcher of libxdp that is on no device"})
	}
	return found, cause(err)
}

// lockedUnswept is locked without the sweeping, which recover reports.
func (s *site) lockedUnswept(ctx context.Context, fn func(*state.Locked) error) error {
	l, err := s.pins.Lock(ctx)
	if err != nil {
		return err
	}
	defer l.Unlock()
	if !l.Alone {
		return hook.Because(hook.ErrChanged, "another process has the lock of the pins in %s; try again", s.BPFFS)
	}
	return fn(l)
}

// byAge sorts folders by their links, whose ids rise.
func byAge(folders []string) []string {
	id := func(folder string) uint32 {
		chain, _ := state.ParseChainFolder(folder)
		return max(chain, state.ParseLinkFolder(folder))
	}
	slices.SortFunc(folders, func(a, b string) int { return cmp.Compare(id(a), id(b)) })
	return folders
}

type recovery struct {
	Recovery
	ctx   context.Context
	l     *state.Locked
	pins  *state.Pins
	found []hook.Leftover
}

func (r *recovery) add(f hook.Leftover) { r.found = append(r.found, f) }

// abandoned reports what the sweep is about to remove.
func (r *recovery) abandoned() error {
	paths, err := r.l.Leftovers()
	if err != nil {
		return err
	}
	for _, path := range paths {
		r.add(hook.Leftover{Path: path, What: "pins that a process was about to make or to remove when it died"})
	}
	moves, err := r.l.Moves()
	if err != nil {
		return err
	}
	for _, name := range moves {
		r.add(hook.Leftover{LinkID: state.ParseMove(name), Path: r.pins.Path(name), What: "a move that a process died at"})
	}
	chains, links, err := r.folders()
	if err != nil {
		return err
	}
	for _, folder := range append(chains, links...) {
		id, chain := state.ParseChainFolder(folder)
		if link := state.ParseLinkFolder(folder); link != 0 {
			id = link
		}
		if id != 0 && !linkExists(id) || id == 0 && chain != 0 && !alive(folder) {
			f := hook.Leftover{LinkID: id, Path: r.pins.Path(folder), What: "pins of what is not attached any more"}
			f.Members, f.Err = r.pins.Members(folder)
			r.add(f)
		}
	}
	return nil
}

// folders returns the folders of chains, and those of members with links of their own.
func (r *recovery) folders() (chains, links []string, err error) {
	if chains, err = r.pins.Chains(); err == nil {
		links, err = r.pins.Links()
	}
	return chains, links, err
}

// defunct deals with the pins of what is on a device or cgroup that is gone.
func (r *recovery) defunct() error {
	chains, links, err := r.folders()
	if err != nil {
		return err
	}
	// Of two that were on one device, the newer one has it.
	for _, folder := range slices.Backward(byAge(chains)) {
		r.chain(folder)
	}
	// Of equal priority, the one that came first is first.
	for _, folder := range byAge(links) {
		r.link(folder)
	}
	return nil
}

// watched deals with dispatchers that are watched by nobody any more, on all
// devices: those of chains without pins, the sweep does not see.
func (r *recovery) watched() {
	all, err := kernel.NetNamespaces()
	if err != nil {
		return
	}
	for _, ns := range all {
		if r.ctx.Err() == nil {
			r.watchedIn(ns)
		}
		ns.Close()
	}
}

func (r *recovery) watchedIn(ns *kernel.NetNS) {
	var found []*snapshot
	_ = rtnl.In(ns, func(conn *rtnl.Conn) error {
		devices, err := conn.Devices()
		for _, d := range devices {
			snap := &snapshot{}
			s := &site{Place: Place{Hook: hook.XDP, Target: d.Name}, ns: ns, pins: r.pins}
			if s.inspect(snap, conn, d) == nil && snap.root != nil && state.Abandoned(snap.chain) {
				found = append(found, snap)
			} else {
				snap.close()
			}
		}
		return err
	})
	for _, snap := range found {
		f := hook.Leftover{Hook: hook.XDP, Target: snap.device.Name, LinkID: snap.root.linkID(), What: "a dispatcher that counts for nobody: whoever watched it died"}
		if !r.DryRun {
			f.Err = unwatch(snap.root, snap.prog, snap.chain)
		}
		r.add(f)
		snap.close()
	}
}

// registry takes away a registry of another version, or what else is in its place:
// what was read and cannot be used, and nothing that could not be read.
func (r *recovery) registry() {
	reg, err := r.pins.OpenRegistry()
	reg.Close()
	f := hook.Leftover{Path: r.pins.RegistryPath(), What: "a registry of another version: members have no names"}
	switch {
	case err == nil, errors.Is(err, fs.ErrNotExist):
		return
	case !unsupported(err):
		f.What, f.Err = "a registry that cannot be read", err
	case !r.DryRun:
		f.Err = os.RemoveAll(f.Path)
	}
	r.add(f)
}

// chain deals with the pins of an XDP chain whose device is gone.
func (r *recovery) chain(folder string) {
	root, err := openPinnedRoot(r.pins, folder)
	if err != nil {
		return // not defunct, or what the sweep reports
	}
	defer root.close()
	prog, index, err := root.state()
	if err != nil || index != 0 {
		return
	}
	f := hook.Leftover{
		Hook: hook.XDP, LinkID: root.id, Path: r.pins.Path(folder),
		What: "a chain whose device is gone",
	}
	if f.Members, f.Err = r.pins.Members(folder); f.Err != nil {
		r.add(f)
		return
	}
	chain, err := chainOf(prog)
	if err == nil && chain == nil {
		err = hook.Because(fs.ErrNotExist, "its dispatcher was replaced by whoever holds the link")
	}
	if err == nil {
		f.Target = chain.LastSeen.Target
	}
	if r.Reattach && err == nil {
		err = r.reattach(func() error { return r.reattachChain(folder, root, prog, chain) })
		if err == nil {
			f.Reattached = true
		}
	}
	r.settle(f, folder, err)
}

// settle collects what was not attached again, or says what kept it from that.
func (r *recovery) settle(f hook.Leftover, folder string, err error) (done bool) {
	switch {
	case r.Reattach && err != nil:
		f.Err = err
	case !f.Reattached && !r.DryRun:
		f.Err = r.l.RemoveChain(folder)
	}
	r.add(f)
	return !r.DryRun && f.Err == nil
}

// nowhere is that nothing of the old name is there to be attached to.
func nowhere(what string) error {
	return hook.Because(fs.ErrNotExist, "there is no %s to attach it to", what).
		Hint("make it and recover again, or recover without --reattach to let it go")
}

// homeNS finds the namespace of old, or the one that has its place: the one that
// it was in if that is still there, else the caller's.
func homeNS(home state.LastSeen) (*kernel.NetNS, error) {
	ns, err := kernel.FindNetNS(func(ns *kernel.NetNS) error {
		id := ns.ID()
		if id.Cookie != home.NetNS.Cookie || id.Cookie == 0 && id.Inode != home.NetNS.Inode {
			return fs.ErrNotExist
		}
		return nil
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nowhere(fmt.Sprintf("network namespace (cookie %d), which was its own,", home.NetNS.Cookie))
	}
	return ns, err
}

// reattach runs fn, again for a while as long as what another recover attached, which
// died before it was pinned, is not gone: the kernel releases a link some time after
// its last descriptor.
func (r *recovery) reattach(fn func() error) error {
	patience := untilLeft()
	return kernel.Retry(r.ctx, func() error { return patience(fn()) })
}

// reattachChain puts the chain on a device of the old name, with a link of its own.
func (r *recovery) reattachChain(folder string, root *linkRoot, progID uint32, chain *state.Chain) error {
	if chain.LastSeen.Target == "" {
		return nowhere("name known of a device")
	}
	ns, err := homeNS(chain.LastSeen)
	if err != nil {
		return err
	}
	defer ns.Close()
	s := &site{Place: Place{Hook: hook.XDP, Target: chain.LastSeen.Target, BPFFS: r.pins.BPFFS()}, ns: ns, pins: r.pins}
	snap, err := s.read()
	if errors.Is(err, fs.ErrNotExist) {
		return nowhere("device " + chain.LastSeen.Target)
	}
	if err != nil {
		return err
	}
	defer snap.close()
	if !snap.free() {
		if snap.chain == nil {
			return s.occupied(snap)
		}
		err := hook.Because(hook.ErrBusy, "device %s has another chain by now", chain.LastSeen.Target)
		if snap.chain.ID == chain.ID {
			err = hook.Because(errTaken, "%w", err) // put there by one who died, and about to go
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
	next, err := s.create(snap.device.Index, mode, prog)
	if err != nil {
		return err
	}
	defer next.close()
	to := state.ChainFolder(next.linkID(), 0)
	kernel.Step("recover: attached")
	if err := r.l.Succession(folder, to, next.pinner()); err != nil {
		return kernel.Undo(err, next.release(prog))
	}
	return nil
}

// link deals with the pin of a member of TCX or of a cgroup.
func (r *recovery) link(folder string) {
	members, err := r.pins.Members(folder)
	if err != nil || len(members) != 1 {
		return
	}
	pinned, err := loadPinnedLink(r.pins.HeldPath(folder, members[0]))
	if err != nil {
		return
	}
	defer pinned.Close()
	info, err := describeLink(pinned)
	if err != nil || !info.Gone() {
		return
	}
	f := hook.Leftover{
		Hook: info.Hook(), LinkID: info.ID, Members: members, Path: r.pins.Path(folder),
		What: "a member whose device is gone",
	}
	if info.Type == link.CgroupType {
		f.What = "a member whose cgroup is gone"
	}
	reg, err := openRegistry(r.pins)
	defer reg.Close()
	var rec *state.Record
	if err == nil {
		rec, err = reg.Get(info.ID)
	}
	if err != nil {
		f.Err = err
		r.add(f)
		return
	}
	if rec != nil {
		f.Target = rec.LastSeen.Target
	}
	if r.Reattach {
		err = r.reattach(func() error { return r.reattachLink(folder, members[0], info, rec) })
		if err == nil {
			f.Reattached = true
		}
	}
	if r.settle(f, folder, err) {
		_ = reg.Delete(info.ID)
	}
}

// reattachLink makes a link with the program of the old one where that was.
func (r *recovery) reattachLink(folder, name string, info *LinkInfo, rec *state.Record) error {
	if rec == nil || rec.LastSeen.Target == "" {
		return nowhere("place known")
	}
	s := &site{Place: Place{Hook: info.Hook(), Target: rec.LastSeen.Target, BPFFS: r.pins.BPFFS()}, pins: r.pins}
	var err error
	if s.Hook.OnCgroup() {
		s.ns, err = kernel.OpenNetNS("")
	} else {
		s.ns, err = homeNS(rec.LastSeen)
	}
	if err != nil {
		return err
	}
	defer s.ns.Close()
	sp, err := s.spot()
	if errors.Is(err, fs.ErrNotExist) && s.Hook.OnCgroup() {
		return nowhere("cgroup " + rec.LastSeen.Target)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nowhere("device " + rec.LastSeen.Target)
	}
	if err != nil {
		return err
	}
	defer sp.close()
	names, err := s.namesToWrite(r.l)
	if err != nil {
		return err
	}
	defer names.close()
	list, err := sp.list(names, nil)
	if err != nil {
		return err
	}
	if i := list.named(name); i >= 0 {
		e := list.entries[i]
		if e.prog == info.Program && e.pinned {
			return r.succeeded(folder, state.LinkFolder(s.Hook, e.link), name) // and died before the end
		}
		err := hook.Because(fs.ErrExist, "there is another member %q by now", name)
		if e.prog == info.Program {
			err = hook.Because(errTaken, "%w", err) // made by one who died, and about to go
		}
		return err
	}
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(info.Program))
	if err != nil {
		return kernel.Errno("the member's program", err)
	}
	defer prog.Close()
	i := dispatch.IndexFor(list.ranks(), rec.Priority)
	at, err := sp.anchor(list, i)
	if err != nil || r.DryRun {
		return err
	}
	next, err := sp.create(prog, at, list)
	if err != nil {
		return err
	}
	defer next.Close()
	made, err := describeLink(next)
	if err != nil {
		return err
	}
	kernel.Step("recover: attached")
	again := *rec
	again.LastSeen, again.MovedFrom, again.MovedTo = sp.home(), 0, 0
	if err := names.reg.Put(made.ID, &again); err != nil {
		return err
	}
	kernel.Step("recover: named")
	to := state.LinkFolder(s.Hook, made.ID)
	if err := r.l.Add(to, nil, state.MemberPins{Name: name, Link: next}); err != nil {
		return err
	}
	return r.succeeded(folder, to, name)
}

// succeeded gives a member that is attached and pinned again the pins of its
// maps, and removes the old ones.
func (r *recovery) succeeded(from, to, name string) error {
	if r.DryRun {
		return nil
	}
	if err := r.l.MoveMaps(from, name, to, name); err != nil {
		return err
	}
	kernel.Step("recover: pinned")
	return r.l.RemoveChain(from)
}
