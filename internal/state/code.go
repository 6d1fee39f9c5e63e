package state

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"slices"
	"strings"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// codeName is the name of the map with a program's code, which is bound to the program.
const codeName = "ld_code"

// KeepCode binds the code of a program to the program, so that any process can link
// it into a dispatcher later. The code is in a frozen map, which goes with the program.
func KeepCode(prog *ebpf.Program, c *dispatch.Code) error {
	value, err := marshalCode(c)
	if err != nil {
		return err
	}
	m, err := bindFrozen(prog, &ebpf.MapSpec{
		Name: codeName, Type: ebpf.Array, KeySize: 4, ValueSize: uint32(len(value)), MaxEntries: 1,
		Flags:    readOnlyProg,
		Contents: []ebpf.MapKV{{Key: uint32(0), Value: value}},
	}, "the object code")
	if err != nil {
		return err
	}
	return m.Close()
}

// bindFrozen makes a map, freezes it so that nothing can write to it, and binds it to
// the program. Such a map is in the program's list of maps, but costs no instruction
// (BPF_PROG_BIND_MAP, Linux 5.10). The caller closes it.
func bindFrozen(prog *ebpf.Program, spec *ebpf.MapSpec, what string) (*ebpf.Map, error) {
	m, err := ebpf.NewMap(spec)
	if err != nil {
		return nil, kernel.Errno("write "+what, err)
	}
	if err = kernel.Errno("freeze "+what, m.Freeze()); err == nil {
		err = kernel.Errno("bind "+what, prog.BindMap(m))
	}
	if err != nil {
		m.Close()
		return nil, err
	}
	return m, nil
}

// CodeOf returns the code that is bound to a program. The error is fs.ErrNotExist if
// there is none.
func CodeOf(prog *ebpf.Program) (*dispatch.Code, dispatch.CodeHash, error) {
	info, err := prog.Info()
	if err != nil {
		return nil, dispatch.CodeHash{}, kernel.Errno("program", err)
	}
	ids, _ := info.MapIDs()
	// The code was bound right after the load, so before what others bound.
	m, err := firstFrozen(slices.All(ids), codeName)
	if errors.Is(err, ErrNotOurs) {
		err = fmt.Errorf("program %q keeps no object code: %w", info.Name, fs.ErrNotExist)
	}
	if err != nil {
		return nil, dispatch.CodeHash{}, err
	}
	defer m.Close()
	value, err := m.LookupBytes(uint32(0))
	if err != nil {
		return nil, dispatch.CodeHash{}, kernel.Errno(codeName, err)
	}
	c, err := unmarshalCode(value)
	if err != nil {
		return nil, dispatch.CodeHash{}, fmt.Errorf("object code of program %q: %w", info.Name, err)
	}
	return c, sha256.Sum256(value), nil
}

// Verify checks that the code is the program's, because any process with the right to
// can bind a map to a program. It loads the code by itself; the kernel's hash of the
// instructions must be the program's. The hash does not cover the maps, so the code's
// maps must be among the program's. Verify also sets the code's Frame.
func Verify(prog *ebpf.Program, c *dispatch.Code, shape dispatch.Shape) error {
	info, err := prog.Info()
	if err != nil {
		return kernel.Errno("program", err)
	}
	ids, _ := info.MapIDs()
	for _, id := range c.Maps {
		if !slices.Contains(ids, ebpf.MapID(id)) {
			return fmt.Errorf("its object code is not the program's (it uses map %d)", id)
		}
	}
	m := members{shape, []hook.Settings{hook.Settings{}.WithDefaults()}, nil, []*dispatch.Code{c}}
	alone, err := m.loadCode(dispatch.ProgramName, dispatch.Link(m.settings, m.codes, true), nil, ebpf.LogLevelStats)
	if err != nil {
		return fmt.Errorf("its object code no longer loads: %w", err)
	}
	defer alone.Close()
	again, err := alone.Info()
	if err != nil {
		return kernel.Errno("program", err)
	}
	if again.Tag != info.Tag {
		return fmt.Errorf("its object code is not the program's (tag %s, not %s)", again.Tag, info.Tag)
	}
	c.Frame = frame(alone.VerifierLog)
	return nil
}

// frame reads the size of the main function's stack frame from a verifier's log, as in
// "stack depth 24+0" (print_verification_stats, kernel/bpf/verifier.c). If the log has
// none it returns the largest possible size.
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

// firstFrozen opens the first of the maps that is frozen and has that name; ErrNotOurs if
// none is. The caller closes it.
func firstFrozen(ids iter.Seq2[int, ebpf.MapID], name string) (*ebpf.Map, error) {
	for _, id := range ids {
		m, err := ebpf.NewMapFromID(id)
		if err == nil {
			if err = isFrozen(m, name); err == nil {
				return m, nil
			}
			m.Close()
		}
		if !errors.Is(err, ErrNotOurs) && !errors.Is(err, fs.ErrNotExist) {
			return nil, kernel.Errno(name, err)
		}
	}
	return nil, ErrNotOurs
}

// isFrozen returns nil for a frozen map of that name with one entry. Other maps are
// ErrNotOurs: what can still be written to must not be trusted.
func isFrozen(m *ebpf.Map, name string) error {
	if m.Type() != ebpf.Array || m.KeySize() != 4 || m.MaxEntries() != 1 {
		return ErrNotOurs
	}
	info, err := m.Info()
	if err != nil {
		return kernel.Errno(name, err)
	}
	if info.Name != name || !info.Frozen() {
		return ErrNotOurs
	}
	return nil
}
