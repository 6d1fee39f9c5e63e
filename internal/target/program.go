package target

import (
	"github.com/cilium/ebpf"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// describe reads what the kernel says about a program, and whether it makes
// tail calls.
func Describe(prog *ebpf.Program) (hook.Program, bool) {
	info, err := prog.Info()
	if err != nil {
		return hook.Program{}, false
	}
	p := kernel.DescribeInfo(info)
	if dispatch.IsOurs(info.Name) {
		return p, false // its maps are slots: do not open them, see state.Slots
	}
	ids, _ := info.MapIDs()
	return p, tailCalls(ids)
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

// programOf describes a program by its id, as far as it is still there.
func ProgramOf(id uint32) hook.Program {
	p, _ := ProgramAt(id)
	return p
}

// programAt is programOf, and whether the program makes tail calls.
func ProgramAt(id uint32) (hook.Program, bool) {
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
	if err != nil {
		return hook.Program{ID: id}, false
	}
	defer prog.Close()
	return Describe(prog)
}
