package state

import (
	"errors"
	"fmt"
	"maps"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// Build loads the dispatcher of a chain and binds the description to it. slots are
// the maps of c.Slots, in the same order. codes are the codes of the sealed members,
// or nil if none is sealed. The caller closes the dispatcher; what the program refers to
// lives as long as the program. The dispatcher does not count; processes that watch
// the chain notice this and call BuildWatched.
func Build(c *Chain, slots []*ebpf.Map, codes []*dispatch.Code) (*Dispatcher, error) {
	c.Watch = 0
	m := c.members(slots, codes)
	prog, err := m.load(nil, nil)
	if err != nil {
		return nil, err
	}
	return m.complete(prog, c)
}

// members are the members of a dispatcher to be built.
type members struct {
	shape    dispatch.Shape
	settings []hook.Settings
	slots    []*ebpf.Map
	codes    []*dispatch.Code // of the members that are linked; or nil
}

func (c *Chain) members(slots []*ebpf.Map, codes []*dispatch.Code) members {
	m := members{c.Shape, make([]hook.Settings, len(c.Slots)), slots, codes}
	for i, s := range c.Slots {
		m.settings[i] = s.Settings
	}
	return m
}

func (m *members) linked(i int) bool { return i < len(m.codes) && m.codes[i] != nil }

// load loads a dispatcher. wrap adds code to it, which may refer to the maps in others.
func (m *members) load(wrap func(asm.Instructions) asm.Instructions, others map[string]*ebpf.Map) (*ebpf.Program, error) {
	// The verifier may refuse a dispatcher that has too much in its main function.
	// Then linked members become functions.
	for inline := true; ; inline = false {
		insns := dispatch.Link(m.settings, m.codes, inline)
		if wrap != nil {
			insns = wrap(insns)
		}
		prog, err := m.loadCode(dispatch.ProgramName, insns, others, 0)
		if err == nil || !inline || m.codes == nil || errors.Is(err, unix.EPERM) {
			return prog, err
		}
	}
}

// loadCode loads a dispatcher with this code.
func (m *members) loadCode(name string, insns asm.Instructions, others map[string]*ebpf.Map, log ebpf.LogLevel) (*ebpf.Program, error) {
	refs := map[string]*ebpf.Map{}
	for i, slot := range m.slots {
		if !m.linked(i) {
			refs[dispatch.SlotRef(i)] = slot
		}
	}
	own, err := m.codeMaps(refs)
	defer func() {
		for _, m := range own {
			m.Close()
		}
	}()
	if err != nil {
		return nil, err
	}
	maps.Copy(refs, others)
	for ref, m := range refs {
		if err := insns.AssociateMap(ref, m); err != nil {
			return nil, fmt.Errorf("dispatcher: %w", err)
		}
	}
	spec := &ebpf.ProgramSpec{
		Name: name, Type: ebpf.XDP, AttachType: m.shape.AttachType,
		Instructions: insns, License: "Dual BSD/GPL",
	}
	if m.shape.Frags {
		spec.Flags |= unix.BPF_F_XDP_HAS_FRAGS
	}
	prog, err := ebpf.NewProgramWithOptions(spec, ebpf.ProgramOptions{LogLevel: log})
	var refusal *ebpf.VerifierError
	if uncompiled := kernel.Uncompiled(err); uncompiled != nil {
		return nil, fmt.Errorf("load dispatcher: %w", uncompiled)
	}
	if errors.As(err, &refusal) && len(refusal.Log) > 0 {
		return nil, fmt.Errorf("load dispatcher: %w", err) // here EACCES is about the code, not about privileges
	}
	if err != nil {
		return nil, kernel.Errno("load dispatcher", err)
	}
	return prog, nil
}

// codeMaps opens the maps that linked members use, and adds them to refs. The caller
// closes the maps that it returns.
func (m *members) codeMaps(refs map[string]*ebpf.Map) (map[uint32]*ebpf.Map, error) {
	open := map[uint32]*ebpf.Map{}
	for i, code := range m.codes {
		if code == nil {
			continue
		}
		for index, id := range code.Maps {
			if open[id] == nil {
				m, err := ebpf.NewMapFromID(ebpf.MapID(id))
				if err != nil {
					return open, kernel.Errno(fmt.Sprintf("map %d of program %q", id, code.Name), err)
				}
				open[id] = m
			}
			refs[dispatch.CodeMapRef(i, index)] = open[id]
		}
	}
	return open, nil
}

// complete binds the description to a dispatcher. If that fails it closes the program.
func (m *members) complete(prog *ebpf.Program, c *Chain) (*Dispatcher, error) {
	var description *ebpf.Map
	var err error
	for i, slot := range m.slots {
		// Linked code does not refer to the slot, but the slot must stay.
		if m.linked(i) && err == nil {
			err = kernel.Errno("bind slot", prog.BindMap(slot))
		}
	}
	if err == nil {
		description, err = describe(prog, c)
	}
	if err != nil {
		prog.Close()
		return nil, err
	}
	return &Dispatcher{prog, description}, nil
}

// describe binds the description to the program; the caller closes it.
func describe(prog *ebpf.Program, c *Chain) (*ebpf.Map, error) {
	value, err := c.Marshal()
	if err != nil {
		return nil, err
	}
	return bindFrozen(prog, mapSpec(value), "the chain description")
}

// Loads tries whether the kernel accepts such a dispatcher.
func Loads(shape dispatch.Shape, settings []hook.Settings, slots []*ebpf.Map, codes []*dispatch.Code) error {
	m := members{shape, settings, slots, codes}
	prog, err := m.load(nil, nil)
	if err != nil {
		return err
	}
	return prog.Close()
}
