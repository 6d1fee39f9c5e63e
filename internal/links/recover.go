package links

import (
	"errors"
	"io/fs"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// Recover reports the pin of a member that has lost its device or cgroup. It attaches
// the member again, or removes the pin, as r asks.
func Recover(r *target.Recovery, folder string) {
	members, err := r.Pins.Members(folder)
	if err != nil || len(members) != 1 {
		return
	}
	pinned, err := kernel.LoadPinnedLink(r.Pins.HeldPath(folder, members[0]))
	if err != nil {
		return
	}
	defer pinned.Close()
	info, err := kernel.LinkInfoOf(pinned)
	if err != nil || !info.Gone() {
		return
	}
	f := hook.Leftover{
		Hook: info.Hook(), LinkID: info.ID, Members: members, Path: r.Pins.Path(folder),
	}
	kind := "device"
	if info.Type == link.CgroupType {
		kind = "cgroup"
	}
	f.What = target.Lost("a member", kind, state.LastSeen{})
	names := OpenNames(&target.Opened{Pins: r.Pins})
	defer names.Close()
	rec, err := names.Record(info)
	if err != nil {
		f.Err = err
		r.Report(f)
		return
	}
	if rec != nil {
		f.Target, f.What = rec.LastSeen.Target, target.Lost("a member", kind, rec.LastSeen)
	}
	if r.Settle(f, folder, func() error { return reattachLink(r, folder, members[0], info, rec) }) {
		_ = names.Forget(info)
	}
}

// reattachLink makes a new link with the old link's program on the same target.
func reattachLink(r *target.Recovery, folder, name string, info *kernel.LinkInfo, rec *state.Record) error {
	if rec == nil || rec.LastSeen.Target == "" {
		return target.Nowhere("place known")
	}
	o := &target.Opened{Target: target.Target{Hook: info.Hook(), Name: rec.LastSeen.Target, BPFFS: r.Pins.BPFFS()}, Pins: r.Pins}
	var err error
	kind := "device "
	if o.Hook.OnCgroup() {
		kind = "cgroup "
		o.NS, err = kernel.OpenNetNS("")
	} else {
		o.NS, err = target.FindNetNS(rec.LastSeen)
	}
	if err != nil {
		return err
	}
	defer o.NS.Close()
	err = withOrder(o, func(op *opened, list *order) error {
		return op.reattach(r, list, folder, name, info, rec)
	})
	if errors.Is(err, fs.ErrNotExist) {
		return target.Nowhere(kind + rec.LastSeen.Target)
	}
	return err
}

// reattach makes the new link, now that the target exists again.
func (op *opened) reattach(r *target.Recovery, list *order, folder, name string, info *kernel.LinkInfo, rec *state.Record) error {
	if i := list.Named(name); i >= 0 {
		e := list.Order[i]
		if e.Program == info.Program && e.pinned {
			return succeeded(r, folder, state.LinkFolder(op.Hook, e.Link), name) // another recover died before this step
		}
		err := hook.Because(fs.ErrExist, "there is another member %q by now", name)
		if e.Program == info.Program {
			err = hook.Because(target.ErrTaken, "%w", err) // a recover that died made this link: it is about to go
		}
		return err
	}
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(info.Program))
	if err != nil {
		return kernel.Errno("the member's program", err)
	}
	defer prog.Close()
	if err := op.checkAbove(list, target.Request{Override: r.Override}); err != nil {
		return err
	}
	i := list.IndexFor(rec.Priority)
	at, err := op.neighbor(list, i)
	if err != nil || r.DryRun {
		return err
	}
	next, err := op.create(prog, at, list)
	if err != nil {
		return err
	}
	defer next.Close()
	made, err := kernel.LinkInfoOf(next)
	if err != nil {
		return err
	}
	kernel.Step("recover: attached")
	again := *rec
	// A process that still has the old link open has lost the member.
	again.LastSeen, again.MovedFrom, again.Member = op.seen(), 0, newMember()
	records, err := op.names.put(prog, made.ID, &again)
	if err != nil {
		return err
	}
	records.Close()
	kernel.Step("recover: named")
	to := state.LinkFolder(op.Hook, made.ID)
	if err := r.Locked.Add(to, nil, state.MemberPins{Name: name, Link: next}); err != nil {
		return err
	}
	return succeeded(r, folder, to, name)
}

// succeeded moves the pins of the maps to the member that is attached and pinned again,
// and removes the old pins.
func succeeded(r *target.Recovery, from, to, name string) error {
	if r.DryRun {
		return nil
	}
	if err := r.Locked.MoveMaps(from, name, to, name); err != nil {
		return err
	}
	kernel.Step("recover: pinned")
	return r.Locked.RemoveChain(from)
}
