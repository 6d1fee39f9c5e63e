package state

import (
	"errors"
	"io/fs"
	"slices"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// markName is the name of the map with a program's mark, which is bound to the program.
const markName = "ld_mark"

// KeepMark binds a text to a program that was just loaded, in a frozen map, which goes with the program.
func KeepMark(prog *ebpf.Program, text string) error {
	if err := hook.CheckName(text); err != nil {
		return hook.Because(hook.ErrUsage, "mark: %w", err)
	}
	value := make([]byte, nameSize)
	copy(value, text)
	m, err := bindFrozen(prog, &ebpf.MapSpec{
		Name: markName, Type: ebpf.Array, KeySize: 4, ValueSize: nameSize, MaxEntries: 1, Flags: readOnlyProg,
		Contents: []ebpf.MapKV{{Key: uint32(0), Value: value}},
	}, "the mark")
	if err != nil {
		return err
	}
	return m.Close()
}

// MarkOf returns the text that KeepMark has bound to a program; empty if there is none. The error is
// fs.ErrNotExist if the program is gone.
func MarkOf(prog *ebpf.Program) (string, error) {
	ids, err := kernel.ProgramMaps(prog)
	if err != nil {
		return "", err
	}
	// The mark was bound right after the load, so before what others bound.
	m, err := firstFrozen(slices.All(ids), markName)
	if errors.Is(err, ErrNotOurs) || errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	defer m.Close()
	value, err := m.LookupBytes(uint32(0))
	return unix.ByteSliceToString(value), kernel.Errno(markName, err)
}
