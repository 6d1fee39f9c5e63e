package target

import (
	"github.com/cilium/ebpf"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// Describe returns what the kernel says about a program, and whether the program
// makes tail calls, as far as the kernel tells.
func Describe(prog *ebpf.Program) (hook.Program, bool) {
	p := kernel.Describe(prog)
	if dispatch.IsOurs(p.Name) {
		return p, false // its maps are slots: do not open them, see state.Slots
	}
	ids, err := kernel.ProgramMaps(prog)
	return p, err == nil && tailCalls(ids)
}

func tailCalls(maps []ebpf.MapID) bool {
	for _, id := range maps {
		m, err := ebpf.NewMapFromID(id)
		if err != nil {
			continue
		}
		t := m.Type()
		m.Close()
		if t == ebpf.ProgramArray {
			return true
		}
	}
	return false
}

// ProgramOf describes the program with the id. It returns the id alone when the
// program is gone.
func ProgramOf(id uint32) hook.Program {
	p, _ := ProgramAt(id)
	return p
}

// ProgramAt is ProgramOf, and says also whether the program makes tail calls.
func ProgramAt(id uint32) (hook.Program, bool) {
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
	if err != nil {
		return hook.Program{ID: id}, false
	}
	defer prog.Close()
	return Describe(prog)
}
