package links

import (
	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/state"
)

// Sweep finishes the moves of processes that died in the middle, and removes the
// pins of links that do not exist any more. It keeps the pins of links that
// have lost their target, and whatever it cannot read.
func Sweep(l *state.Locked) {
	moves, err := l.Moves()
	if err != nil {
		return
	}
	for _, name := range moves {
		finishMove(l, name)
	}
	folders, err := l.Links()
	if err != nil {
		return
	}
	for _, folder := range folders {
		if !kernel.LinkMayExist(state.ParseLinkFolder(folder)) {
			_ = l.RemoveChain(folder) // the link's own pin was removed by hand
		}
	}
}

// finishLeaving ends a move on a cgroup: it detaches the link old if one of the records is
// of a link that has replaced it. Both must be pinned: only then is it sure that the new
// link stays. It returns false when the move could not be finished.
func finishLeaving(l *state.Locked, records state.Records, old uint32) bool {
	links, err := records.Links()
	if err != nil {
		return false
	}
	for _, by := range links {
		rec, err := records.Get(by)
		if err != nil {
			return false
		}
		if rec == nil || rec.MovedFrom != old {
			continue
		}
		// If the new link is gone, the old one stays.
		if info, err := linkInfo(by); err != nil || info.Gone() {
			continue
		}
		h := kernel.LinkHook(link.CgroupType, rec.Attach)
		for _, id := range []uint32{old, by} {
			if pinned, err := pinnedLink(l, h, id); err != nil || !pinned {
				return err == nil
			}
		}
		link, err := kernel.OpenLink(old)
		if err != nil {
			return false
		}
		defer link.Close()
		return link.Detach() == nil && records.Delete(old) == nil && l.RemoveChain(state.LinkFolder(h, old)) == nil
	}
	return true
}

// linkInfo returns what the kernel says about the link with the id.
func linkInfo(id uint32) (*kernel.LinkInfo, error) {
	l, err := kernel.OpenLink(id)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	return kernel.LinkInfoOf(l)
}

// pinnedLink reports whether a link is pinned as a member.
func pinnedLink(l *state.Locked, h hook.Hook, id uint32) (bool, error) {
	folder := state.LinkFolder(h, id)
	members, err := l.Members(folder)
	return len(members) == 1 && l.Has(folder, members[0]), err
}

// finishMove ends a move after its process died. On TCX: forwards if the new link is
// pinned, else backwards. Until then stand-ins run the member's program, and if the
// move cannot be finished they go on.
func finishMove(l *state.Locked, name string) {
	pinned, err := ebpf.LoadPinnedMap(l.Path(name), nil)
	if err != nil {
		return
	}
	if pinned.Type() == ebpf.LPMTrie {
		defer pinned.Close()
		if finishLeaving(l, state.Records{pinned}, state.ParseMove(name)) {
			l.RemoveMove(name)
		}
		return
	}
	m, err := openMove(l, name, pinned)
	if err != nil {
		return
	}
	defer m.close()
	if m.prog == nil { // the process died before it filled the slot, or the slot was emptied by hand
		l.RemoveMove(name)
		return
	}
	switch {
	case m.next == nil:
	case !m.kept:
		_ = m.next.Detach() // now: without a pin it may go at any time
	case m.old == nil:
		if !m.finishAdoption() {
			return
		}
	default:
		if m.standIn.finish(oldLink{m.old, m.oldID}, m.there, m.next, m.prog, m.up) != nil || m.standIn.records.Delete(m.oldID) != nil {
			return
		}
		_ = l.RemoveChain(state.LinkFolder(m.hook, m.oldID))
	}
	if m.old != nil && !m.kept && m.old.Update(m.prog) != nil {
		return
	}
	// A stand-in for a program without a link goes on until the program is adopted or
	// detached.
	if !anyRunsFrom(m.slotID) {
		l.RemoveMove(name)
	}
}

// standInFor returns the slot id of a stand-in, 0 for another program.
func standInFor(prog *ebpf.Program) (uint32, error) {
	info, err := prog.Info()
	if err != nil {
		return 0, kernel.Errno("program", err)
	}
	if !dispatch.IsStandIn(info.Name) {
		return 0, nil
	}
	// The kernel lists maps in the order of the code: the mark, then the slot; what is
	// bound follows. Do not open a slot that may have no owner, see state.Slots.
	ids, _ := info.MapIDs()
	if len(ids) < 2 {
		return 0, nil
	}
	return uint32(ids[1]), nil
}

// anyRunsFrom reports whether there is a stand-in for the program in the slot. When in
// doubt it returns true.
func anyRunsFrom(slotID uint32) bool {
	for prog, err := range kernel.Programs() {
		if err != nil {
			return true
		}
		if slot, err := standInFor(prog); err != nil || slot == slotID {
			return true
		}
	}
	return false
}
