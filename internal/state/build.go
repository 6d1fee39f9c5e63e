package state

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// Build loads the dispatcher of a chain and binds its description to it. slots
// are the maps of c.Slots, in the same order, and codes the codes of those that
// are sealed; nil when none is. The caller closes the program; everything it
// refers to lives as long as it does.
func Build(c *Chain, slots []*ebpf.Map, codes []*dispatch.Code) (*ebpf.Program, error) {
	settings := make([]hook.Settings, len(c.Slots))
	for i, s := range c.Slots {
		settings[i] = s.Settings
	}
	prog, err := load(c.Shape, settings, slots, codes)
	if err != nil {
		return nil, err
	}
	for i, code := range codes {
		if code == nil || err != nil {
			continue
		}
		// The code does not name the slot, which shall live on all the same.
		err = kernel.Errno("bind slot", prog.BindMap(slots[i]))
	}
	if err == nil {
		err = describe(prog, c)
	}
	if err != nil {
		prog.Close()
		return nil, err
	}
	return prog, nil
}

// load takes the verifier's word for how members can be linked: it may find that
// too much stands in one function.
func load(shape dispatch.Shape, settings []hook.Settings, slots []*ebpf.Map, codes []*dispatch.Code) (*ebpf.Program, error) {
	prog, err := loadLinked(shape, settings, slots, codes, true, 0)
	if err != nil && codes != nil && !errors.Is(err, fs.ErrPermission) {
		prog, err = loadLinked(shape, settings, slots, codes, false, 0)
	}
	return prog, err
}

func loadLinked(shape dispatch.Shape, settings []hook.Settings, slots []*ebpf.Map, codes []*dispatch.Code, inline bool, log ebpf.LogLevel) (*ebpf.Program, error) {
	insns := dispatch.Link(settings, codes, inline)
	for i, m := range slots {
		if i < len(codes) && codes[i] != nil {
			continue
		}
		if err := insns.AssociateMap(dispatch.SlotRef(i), m); err != nil {
			return nil, fmt.Errorf("dispatcher: %w", err)
		}
	}
	maps, err := associate(insns, codes)
	defer func() {
		for _, m := range maps {
			m.Close()
		}
	}()
	if err != nil {
		return nil, err
	}
	spec := &ebpf.ProgramSpec{
		Name: dispatch.ProgramName, Type: ebpf.XDP, AttachType: shape.AttachType,
		Instructions: insns, License: "Dual BSD/GPL",
	}
	if shape.Frags {
		spec.Flags |= unix.BPF_F_XDP_HAS_FRAGS
	}
	prog, err := ebpf.NewProgramWithOptions(spec, ebpf.ProgramOptions{LogLevel: log})
	if err != nil {
		return nil, kernel.Errno("load dispatcher", err)
	}
	return prog, nil
}

// associate gives the codes their maps, which the caller closes.
func associate(insns asm.Instructions, codes []*dispatch.Code) (map[uint32]*ebpf.Map, error) {
	maps := map[uint32]*ebpf.Map{}
	for i, code := range codes {
		if code == nil {
			continue
		}
		for index, id := range code.Maps {
			if maps[id] == nil {
				m, err := ebpf.NewMapFromID(ebpf.MapID(id))
				if err != nil {
					return maps, kernel.Errno(fmt.Sprintf("map %d of program %q", id, code.Name), err)
				}
				maps[id] = m
			}
			if err := insns.AssociateMap(dispatch.CodeMapRef(i, index), maps[id]); err != nil {
				return maps, fmt.Errorf("dispatcher: %w", err)
			}
		}
	}
	return maps, nil
}

// describe binds the description to the program.
func describe(prog *ebpf.Program, c *Chain) error {
	value, err := c.Marshal()
	if err != nil {
		return err
	}
	return bindFrozen(prog, mapSpec(value), "the chain description")
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
		value, err := readFrozen(id, MapName)
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

// Loads tries whether the kernel takes such a dispatcher.
func Loads(shape dispatch.Shape, settings []hook.Settings, slots []*ebpf.Map, codes []*dispatch.Code) error {
	prog, err := load(shape, settings, slots, codes)
	if err != nil {
		return err
	}
	return prog.Close()
}
