package attach

import (
	"errors"
	"io/fs"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/state"
)

// sweepLinks finishes the moves of processes that died at it, and removes the
// records of links that are no more. Pins of links whose target is gone stay.
func sweepLinks(l *state.Locked) {
	reg, err := l.OpenRegistry()
	if err != nil {
		reg = nil // missing, or of another version: left alone
	}
	defer reg.Close()
	for _, name := range l.Moves() {
		finishMove(l, reg, name)
	}
	for _, folder := range l.Links() {
		if !linkExists(state.ParseLinkFolder(folder)) {
			_ = l.RemoveChain(folder) // somebody removed the pin that mattered
		}
	}
	moving := len(l.Moves()) > 0
	for _, id := range reg.Links() {
		if !linkExists(id) {
			_ = reg.Delete(id)
		} else if rec := reg.Get(id); !moving && rec != nil && rec.MovedFrom != 0 {
			finishLeaving(l, reg, rec.MovedFrom, id)
		}
	}
}

// finishLeaving detaches a link whose place another one has taken, if both are
// pinned: only then is it sure that the other one stays. The record of the old
// one stays, for those who hold it.
func finishLeaving(l *state.Locked, reg *state.Registry, old, by uint32) {
	link, err := openLink(old)
	if err != nil {
		return
	}
	defer link.Close()
	info, err := describeLink(link)
	if err != nil {
		return
	}
	h := info.Hook()
	if !pinnedLink(l, h, old) || !pinnedLink(l, h, by) {
		return
	}
	if rec := reg.Get(old); rec != nil && reg.Moved(old, by, rec) != nil {
		return
	}
	if link.Detach() == nil {
		_ = l.RemoveChain(state.LinkFolder(h, old))
	}
}

// pinnedLink tells whether a link is pinned as a member.
func pinnedLink(l *state.Locked, h hook.Hook, id uint32) bool {
	folder := state.LinkFolder(h, id)
	members := l.Members(folder)
	return len(members) == 1 && l.Has(folder, members[0])
}

// finishMove ends a move on TCX that a process died at: forwards if the new link
// is pinned, back if not. Until then stand-ins do the member's work; what cannot
// be finished goes on that way.
func finishMove(l *state.Locked, reg *state.Registry, name string) {
	m, err := openMove(l, name)
	if err != nil {
		return
	}
	defer m.close()
	if m.prog == nil { // died before the slot was filled, or emptied by hand
		l.RemoveMove(name)
		return
	}
	switch {
	case m.next == nil:
	case !m.kept:
		_ = m.next.Detach() // at once, where it might go by itself later
	case m.old == nil:
		if !m.finishAdoption() {
			return
		}
	default:
		rec := reg.Get(m.oldID)
		if rec == nil {
			if rec = reg.Get(m.nextID); rec != nil {
				rec.MovedFrom = 0
			}
		}
		if rec != nil && reg.Moved(m.oldID, m.nextID, rec) != nil {
			return
		}
		if m.standIn.finish(oldLink{m.old, m.oldID}, m.there, m.next, m.prog, m.up) != nil {
			return
		}
		_ = l.RemoveChain(state.LinkFolder(m.hook, m.oldID))
	}
	if m.old != nil && !m.kept && m.old.Update(m.prog) != nil {
		return
	}
	// A stand-in of a program without a link goes on running until somebody
	// adopts or detaches that.
	if !anyRunsFrom(m.slotID) {
		l.RemoveMove(name)
	}
}

// runsFrom tells whether a program is a stand-in that runs what is in the slot.
func runsFrom(progID, slotID uint32) bool {
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(progID))
	if err != nil {
		return false
	}
	defer prog.Close()
	return standInFor(prog) == slotID
}

// standInFor returns the slot of a stand-in, 0 for another program.
func standInFor(prog *ebpf.Program) uint32 {
	info, err := prog.Info()
	if err != nil || !isStandIn(info.Name) {
		return 0
	}
	// The kernel lists maps as the code comes to them: the mark, then the slot. A
	// slot that may have no owner had better not be opened, see state.Slots.
	ids, _ := info.MapIDs()
	if len(ids) != 2 {
		return 0
	}
	return uint32(ids[1])
}

func isStandIn(name string) bool {
	return slices.Contains([]string{dispatch.StandInFirst, dispatch.StandInSecond, dispatch.StandInAway}, name)
}

func anyRunsFrom(slotID uint32) bool {
	for id := ebpf.ProgramID(0); ; {
		next, err := ebpf.ProgramGetNextID(id)
		if err != nil {
			return !errors.Is(err, fs.ErrNotExist)
		}
		if runsFrom(uint32(next), slotID) {
			return true
		}
		id = next
	}
}
