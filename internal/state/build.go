package state

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// Build loads the dispatcher of a chain and binds its description to it. slots
// are the maps of c.Slots, in the same order. The caller closes the program;
// everything it refers to lives as long as it does. It is a plain one: whoever
// watches the chain finds that out, see BuildWatched.
func Build(c *Chain, slots []*ebpf.Map) (*ebpf.Program, error) {
	c.Watch = 0
	prog, err := load(c.Shape, c.settings(), slots)
	if err != nil {
		return nil, err
	}
	if err := describe(prog, c); err != nil {
		prog.Close()
		return nil, err
	}
	return prog, nil
}

// settings are those of the members, in order.
func (c *Chain) settings() []hook.Settings {
	settings := make([]hook.Settings, len(c.Slots))
	for i, s := range c.Slots {
		settings[i] = s.Settings
	}
	return settings
}

func load(shape dispatch.Shape, settings []hook.Settings, slots []*ebpf.Map) (*ebpf.Program, error) {
	return loadCode(dispatch.ProgramName, dispatch.Generate(settings), shape, slots, nil)
}

// loadCode loads a dispatcher; others are maps that it refers to beside the slots.
func loadCode(name string, insns asm.Instructions, shape dispatch.Shape, slots []*ebpf.Map, others map[string]*ebpf.Map) (*ebpf.Program, error) {
	refs := maps.Clone(others)
	if refs == nil {
		refs = map[string]*ebpf.Map{}
	}
	for i, m := range slots {
		refs[dispatch.SlotRef(i)] = m
	}
	for ref, m := range refs {
		if err := insns.AssociateMap(ref, m); err != nil {
			return nil, fmt.Errorf("dispatcher: %w", err)
		}
	}
	spec := &ebpf.ProgramSpec{
		Name: name, Type: ebpf.XDP, AttachType: shape.AttachType,
		Instructions: insns, License: "Dual BSD/GPL",
	}
	if shape.Frags {
		spec.Flags |= unix.BPF_F_XDP_HAS_FRAGS
	}
	prog, err := ebpf.NewProgram(spec)
	if err != nil {
		return nil, kernel.Errno("load dispatcher", err)
	}
	return prog, nil
}

// describe binds the description to the program. A binding is in the program's
// list of maps but costs no instruction (BPF_PROG_BIND_MAP, Linux 5.10).
func describe(prog *ebpf.Program, c *Chain) error {
	value, err := c.Marshal()
	if err != nil {
		return err
	}
	m, err := ebpf.NewMap(mapSpec(value))
	if err != nil {
		return kernel.Errno("write chain description", err)
	}
	defer m.Close()
	if err := m.Freeze(); err != nil {
		return kernel.Errno("freeze chain description", err)
	}
	return kernel.Errno("bind chain description", prog.BindMap(m))
}

// Find reads the description of a chain from its dispatcher. ErrNotOurs when
// the program has none.
func Find(prog *ebpf.Program) (*Chain, error) {
	info, err := prog.Info()
	if err != nil {
		return nil, kernel.Errno("dispatcher", err)
	}
	if info.Name != dispatch.ProgramName {
		return nil, ErrNotOurs
	}
	ids, _ := info.MapIDs()
	// The description was bound last. Coming to it first, no slot is opened on
	// the way; see Slots for what that could do.
	for _, id := range slices.Backward(ids) {
		value, err := readDescription(id)
		if errors.Is(err, ErrNotOurs) || errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		return Unmarshal(value)
	}
	return nil, ErrNotOurs
}

func readDescription(id ebpf.MapID) ([]byte, error) {
	m, err := ebpf.NewMapFromID(id)
	if err != nil {
		return nil, kernel.Errno("chain description", err)
	}
	defer m.Close()
	if m.Type() != ebpf.Array || m.KeySize() != 4 || m.MaxEntries() != 1 || m.ValueSize() < headerSize {
		return nil, ErrNotOurs
	}
	info, err := m.Info()
	if err != nil {
		return nil, kernel.Errno("chain description", err)
	}
	// Whoever may write to it could make us believe anything.
	if info.Name != MapName || !info.Frozen() {
		return nil, ErrNotOurs
	}
	value, err := m.LookupBytes(uint32(0))
	if err != nil {
		return nil, kernel.Errno("chain description", err)
	}
	return value, nil
}

// Loads tries whether the kernel takes such a dispatcher.
func Loads(shape dispatch.Shape, settings []hook.Settings, slots []*ebpf.Map) error {
	prog, err := load(shape, settings, slots)
	if err != nil {
		return err
	}
	return prog.Close()
}
