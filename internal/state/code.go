package state

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// codeName is the name of a map with the code of the program it is bound to.
const codeName = "ld_code"

// KeepCode binds its code to a program, for whoever wants to link it into a
// dispatcher later: in a frozen map, which dies with the program.
func KeepCode(prog *ebpf.Program, c *dispatch.Code) error {
	value, err := marshalCode(c)
	if err != nil {
		return err
	}
	return bindFrozen(prog, &ebpf.MapSpec{
		Name: codeName, Type: ebpf.Array, KeySize: 4, ValueSize: uint32(len(value)), MaxEntries: 1,
		Flags:    readOnlyProg,
		Contents: []ebpf.MapKV{{Key: uint32(0), Value: value}},
	}, "the object code")
}

// bindFrozen makes a map that nobody can write to any more, and binds it to the
// program. A binding is in the program's list of maps but costs no instruction
// (BPF_PROG_BIND_MAP, Linux 5.10).
func bindFrozen(prog *ebpf.Program, spec *ebpf.MapSpec, what string) error {
	m, err := ebpf.NewMap(spec)
	if err != nil {
		return kernel.Errno("write "+what, err)
	}
	defer m.Close()
	if err := m.Freeze(); err != nil {
		return kernel.Errno("freeze "+what, err)
	}
	return kernel.Errno("bind "+what, prog.BindMap(m))
}

// CodeOf returns the code that is bound to a program; fs.ErrNotExist when there
// is none.
func CodeOf(prog *ebpf.Program) (*dispatch.Code, dispatch.CodeHash, error) {
	info, err := prog.Info()
	if err != nil {
		return nil, dispatch.CodeHash{}, kernel.Errno("program", err)
	}
	ids, _ := info.MapIDs()
	// It was bound right after the load, so before whatever others bound.
	for _, id := range ids {
		value, err := readFrozen(id, codeName)
		if errors.Is(err, ErrNotOurs) || errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, dispatch.CodeHash{}, err
		}
		c, err := unmarshalCode(value)
		if err != nil {
			return nil, dispatch.CodeHash{}, fmt.Errorf("object code of program %q: %w", info.Name, err)
		}
		return c, sha256.Sum256(value), nil
	}
	return nil, dispatch.CodeHash{}, fmt.Errorf("no object code is kept with program %q: %w", info.Name, fs.ErrNotExist)
}

// Verify tells whether the code is that of the program: it is loaded by itself,
// and the kernel's hash of its instructions must be the program's. For anyone may
// bind a map to a program. The hash does not cover the maps; those must be the
// program's as well. It finds out the code's Frame.
func Verify(prog *ebpf.Program, c *dispatch.Code, shape dispatch.Shape) error {
	info, err := prog.Info()
	if err != nil {
		return kernel.Errno("program", err)
	}
	ids, _ := info.MapIDs()
	for _, id := range c.Maps {
		if !slices.Contains(ids, ebpf.MapID(id)) {
			return fmt.Errorf("its object code is not that of the program (it uses map %d)", id)
		}
	}
	m := members{shape, []hook.Settings{hook.Settings{}.WithDefaults()}, nil, []*dispatch.Code{c}}
	alone, err := m.loadCode(dispatch.ProgramName, dispatch.Link(m.settings, m.codes, true), nil, ebpf.LogLevelStats)
	if err != nil {
		return fmt.Errorf("its object code does not load any more: %w", err)
	}
	defer alone.Close()
	again, err := alone.Info()
	if err != nil {
		return kernel.Errno("program", err)
	}
	if again.Tag != info.Tag {
		return fmt.Errorf("its object code is not that of the program (tag %s, not %s)", again.Tag, info.Tag)
	}
	c.Frame = frame(alone.VerifierLog)
	return nil
}

// frame reads the size of the first frame, that of main, from a verifier's log, as in
// "stack depth 24+0" (print_verification_stats, kernel/bpf/verifier.c). Without one
// it is the largest there can be.
func frame(log string) int {
	for line := range strings.Lines(log) {
		var n int
		if _, err := fmt.Sscanf(line, "stack depth %d", &n); err == nil {
			return n
		}
	}
	return maxStack
}

const maxStack = 512 // MAX_BPF_STACK, linux/filter.h

// readFrozen reads the entry of a map of that name that nobody can write to:
// whoever may, could make us believe anything. ErrNotOurs of another one.
func readFrozen(id ebpf.MapID, name string) ([]byte, error) {
	m, err := ebpf.NewMapFromID(id)
	if err != nil {
		return nil, kernel.Errno(name, err)
	}
	defer m.Close()
	if m.Type() != ebpf.Array || m.KeySize() != 4 || m.MaxEntries() != 1 {
		return nil, ErrNotOurs
	}
	info, err := m.Info()
	if err != nil {
		return nil, kernel.Errno(name, err)
	}
	if info.Name != name || !info.Frozen() {
		return nil, ErrNotOurs
	}
	value, err := m.LookupBytes(uint32(0))
	return value, kernel.Errno(name, err)
}
