package libxdp

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// FromProgram returns a Source for a program that is already loaded. The caller
// still owns the program.
//
// A program that was loaded for such a chain (BPF_PROG_TYPE_EXT) is attached as it
// is. An ordinary XDP program is called by a component that is made for it, through
// a slot: a prog array, pinned in the folder of libxdp's pins in bpffs as
// slot-<component's program id>. The slot is removed by the next change or Clean
// after the component has gone, whichever tool removed the component.
//
// The kernel allows this since Linux 6.1, and only for programs that were loaded
// without an expected attach type; libbpf and cilium/ebpf load SEC("xdp") with one.
// For other programs Load returns hook.ErrIncompatible: load those from their file.
//
// frags tells whether the program accepts multi-buffer packets.
func FromProgram(prog *ebpf.Program, bpffs string, frags bool) (Source, error) {
	name, err := functionName(prog)
	if err != nil {
		return nil, err
	}
	if t := prog.Type(); t != ebpf.XDP && t != ebpf.Extension {
		return nil, hook.Because(hook.ErrIncompatible, "program %q is of type %v, not XDP", name, t)
	}
	clone, err := prog.Clone()
	if err != nil {
		return nil, kernel.Errno("program", err)
	}
	return &programSource{clone, name, folderIn(cmp.Or(bpffs, kernel.DefaultBPFFS)), frags}, nil
}

type programSource struct {
	prog   *ebpf.Program
	name   string
	folder folder
	frags  bool
}

func (s *programSource) Name() string            { return s.name }
func (s *programSource) Settings() hook.Settings { return hook.Settings{} }
func (s *programSource) Frags() bool             { return s.frags }
func (s *programSource) Close()                  { s.prog.Close() }

func (s *programSource) Load(dispatcher *ebpf.Program, function string) (*ebpf.Program, error) {
	if s.prog.Type() == ebpf.Extension {
		clone, err := s.prog.Clone()
		return clone, kernel.Errno("program", err)
	}
	wrapper, slot, err := wrapComponent(s.prog, dispatcher, function)
	if err != nil {
		return nil, err
	}
	defer slot.Close()
	if err := s.folder.pinSlot(slot, kernel.ProgramID(wrapper)); err != nil {
		wrapper.Close()
		return nil, err
	}
	return wrapper, nil
}

const slotPrefix = "slot-"

// pinSlot pins the slot of a component. libxdp ignores files that are not a
// dispatcher's folder.
func (f folder) pinSlot(slot *ebpf.Map, component uint32) error {
	dir, err := kernel.OpenFolder(f.path)
	if err != nil {
		return err
	}
	defer dir.Close()
	path := f.slotOf(component)
	// An existing pin can only belong to an earlier program with the same id.
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return kernel.Errno("unpin", err)
	}
	kernel.Step("pin: slot")
	return kernel.PathErrno("pin", path, slot.Pin(path))
}

// slotOf returns the path of a component's slot, if it has one.
func (f folder) slotOf(component uint32) string {
	return filepath.Join(f.path, fmt.Sprint(slotPrefix, component))
}

// dropSlots removes the slots of members that are in was but not in next; nil
// is an empty chain. The kernel frees their components a while later.
func (l *locked) dropSlots(was, next *Chain) {
	for _, m := range was.Members {
		stays := func(n Member) bool { return n.Program.ID == m.Program.ID }
		if next == nil || !slices.ContainsFunc(next.Members, stays) {
			_ = os.Remove(l.slotOf(m.Program.ID))
		}
	}
}

// sweepSlots finds the slots without their component, and removes them.
func (l *locked) sweepSlots(remove bool) (found []string, err error) {
	entries, err := os.ReadDir(l.path)
	if err != nil {
		return nil, kernel.Errno("read the folder of libxdp", err)
	}
	for _, e := range entries {
		digits, ok := strings.CutPrefix(e.Name(), slotPrefix)
		id, err := strconv.ParseUint(digits, 10, 32)
		if !ok || err != nil || e.IsDir() {
			continue
		}
		prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
		if !errors.Is(err, fs.ErrNotExist) {
			prog.Close()
			continue
		}
		path := l.slotOf(uint32(id))
		if remove {
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return found, kernel.Errno("unpin", err)
			}
		}
		found = append(found, path)
	}
	return found, nil
}
