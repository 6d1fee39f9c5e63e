package attach

import (
	"errors"
	"io/fs"
	"slices"

	"github.com/cilium/ebpf"

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
	for _, id := range reg.Links() {
		if !linkExists(id) {
			_ = reg.Delete(id)
		}
	}
}

// finishMove puts the program back into the links that stand-ins are in. Where
// the new link was made to last before the process died it is the member now.
func finishMove(l *state.Locked, reg *state.Registry, name string) {
	slot, err := ebpf.LoadPinnedMap(l.Path(name), nil)
	if err != nil {
		return
	}
	defer slot.Close()
	slotID, err := mapID(slot)
	if err != nil {
		return
	}
	id, err := state.Occupant(slot)
	if err != nil || id == 0 {
		l.RemoveMove(name)
		return
	}
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
	if err != nil {
		return
	}
	defer prog.Close()
	links, err := AllLinks()
	if err != nil {
		return
	}
	var at []LinkInfo
	for _, li := range links {
		if runsFrom(li.Program, slotID) {
			at = append(at, li)
		}
	}
	for _, li := range at {
		rec := reg.Get(li.ID)
		moved := rec != nil && rec.MovedTo != 0 && slices.ContainsFunc(links, func(o LinkInfo) bool { return o.ID == rec.MovedTo })
		link, err := openLink(li.ID)
		if err != nil {
			continue
		}
		if moved {
			if link.Detach() == nil {
				_ = l.RemoveChain(state.LinkFolder(hookOf(li), li.ID))
			}
		}
		link.Close()
	}
	for _, li := range at {
		if link, err := openLink(li.ID); err == nil {
			_ = link.Update(prog) // refused where it was detached
			link.Close()
		}
	}
	// Stand-ins of programs without links go on running until those are detached.
	if !anyRunsFrom(slotID) {
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
	if err != nil || !slices.Contains([]string{dispatch.StandInFirst, dispatch.StandInSecond, dispatch.StandInAway}, info.Name) {
		return 0
	}
	ids, _ := info.MapIDs()
	for _, id := range ids {
		if m, err := ebpf.NewMapFromID(id); err == nil {
			isSlot := m.Type() == ebpf.ProgramArray
			m.Close()
			if isSlot {
				return uint32(id)
			}
		}
	}
	return 0
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
