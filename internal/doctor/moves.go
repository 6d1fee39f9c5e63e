package doctor

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/links"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// readMoves finds the links that have taken the place of others.
func (e *exam) readMoves() error {
	names := links.OpenNames(&target.Opened{Pins: e.pins})
	defer names.Close()
	for _, li := range e.links {
		if li.Type != link.TCXType && li.Type != link.CgroupType {
			continue
		}
		rec, err := names.Record(&li)
		if errors.Is(err, kernel.ErrAgain) {
			continue // gone meanwhile
		}
		if err != nil {
			return err
		}
		if rec != nil && rec.MovedFrom != 0 {
			e.movedTo[rec.MovedFrom] = li.ID
		}
	}
	return nil
}

// unsettled tells whether a link belongs to an unfinished move.
func (e *exam) unsettled(id uint32) bool {
	for old, next := range e.movedTo {
		if (id == old || id == next) && e.attached(old) && e.attached(next) {
			return true
		}
	}
	return false
}

func (e *exam) attached(id uint32) bool {
	li := e.links[id]
	return li.ID != 0 && !li.Gone()
}

// move looks at the mark of a move: a slot from which stand-ins run a program, or the
// records of a member of a cgroup.
func (e *exam) move(name string) {
	f := hook.Finding{Check: "move", Level: hook.LevelDrift, Mend: e.recover()}
	old, path := state.ParseMove(name), e.pins.Path(name)
	li, next := e.links[old], e.movedTo[old]
	switch {
	case old == 0:
		f.Text = fmt.Sprintf("an adoption was not finished, its process died (%s); stand-ins run the program meanwhile", path)
	case li.Type == link.CgroupType && e.unsettled(old):
		f.Text = fmt.Sprintf("the move from link %d to link %d was not finished, its process died (%s): both run", old, next, path)
	case li.Type == link.CgroupType:
		f.Text = fmt.Sprintf("the move of link %d was not finished, its process died (%s)", old, path)
	case li.Gone() && e.runs(next):
		f.Level, f.Mend = hook.LevelNote, ""
		f.Text = fmt.Sprintf("the move of link %d to link %d is done; %s stays as long as a process has the old link open", old, next, path)
	default:
		f.Text = fmt.Sprintf("the move of link %d was not finished, its process died (%s); stand-ins run the program meanwhile", old, path)
	}
	e.add(f)
}

// runs tells whether a link runs its member's program, and not a stand-in.
func (e *exam) runs(id uint32) bool {
	li := e.links[id]
	if !e.attached(id) {
		return false
	}
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(li.Program))
	if err != nil {
		return false
	}
	defer prog.Close()
	return !dispatch.IsStandIn(kernel.Describe(prog).Name)
}
