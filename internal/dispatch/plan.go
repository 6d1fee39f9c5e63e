package dispatch

import (
	"fmt"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
)

// A Shape is what the kernel wants to be equal in a dispatcher, its slots and
// their programs (bpf_prog_map_compatible, kernel/bpf/core.c).
type Shape struct {
	// AttachType is the expected_attach_type: BPF_XDP, or 0 (AttachNone) for
	// loaders that set none. Compared by the kernel on 6.1.192,
	// 6.18 and 7.2, not on 5.10.
	AttachType ebpf.AttachType
	// Frags is BPF_F_XDP_HAS_FRAGS.
	Frags bool
}

// Plain is the shape of a program from SEC("xdp"), and the one to load with
// when nothing else asks for another.
var Plain = Shape{AttachType: ebpf.AttachXDP}

func (s Shape) String() string {
	t := "attach type BPF_XDP"
	switch s.AttachType {
	case ebpf.AttachNone:
		t = "no expected attach type"
	case ebpf.AttachXDP:
	default:
		t = "attach type " + s.AttachType.String()
	}
	if s.Frags {
		return t + ", with frags"
	}
	return t + ", without frags"
}

// A Slot is a member's place in a plan.
type Slot struct {
	// MapID is the id of the one-entry prog array that holds the program.
	MapID uint32
	Name  string
	Owner string
	hook.Settings
	Persistent bool
}

// A Plan is a chain as it shall be: the slots in run order.
type Plan struct {
	Shape Shape
	Slots []Slot
}

// Index returns the position of the slot with that map, or -1.
func (p *Plan) Index(mapID uint32) int {
	return slices.IndexFunc(p.Slots, func(s Slot) bool { return s.MapID == mapID })
}

// Named returns the position of the slot of that name, or -1.
func (p *Plan) Named(name string) int {
	return slices.IndexFunc(p.Slots, func(s Slot) bool { return s.Name == name })
}

// Insert puts a slot at its place: behind all those of lower or equal priority.
func (p *Plan) Insert(s Slot) error {
	if p.Named(s.Name) >= 0 {
		return fmt.Errorf("there is a member %q already", s.Name)
	}
	if len(p.Slots) >= hook.MaxMembers {
		return hook.Because(hook.ErrChainFull, "the chain has %d members, and the kernel allows a packet no more tail calls", len(p.Slots))
	}
	p.Slots = slices.Insert(p.Slots, p.place(s.Priority), s)
	return nil
}

func (p *Plan) place(priority int) int {
	i := slices.IndexFunc(p.Slots, func(o Slot) bool { return o.Priority > priority })
	if i < 0 {
		return len(p.Slots)
	}
	return i
}

// Remove takes the slot at i out.
func (p *Plan) Remove(i int) { p.Slots = slices.Delete(p.Slots, i, i+1) }

// Set gives the slot at i new settings. A member whose priority stays keeps
// its place among equals; one whose priority changes goes behind its new equals.
func (p *Plan) Set(i int, settings hook.Settings) {
	s := p.Slots[i]
	moved := settings.Priority != s.Priority
	s.Settings = settings
	p.Slots[i] = s
	if moved {
		p.Remove(i)
		p.Slots = slices.Insert(p.Slots, p.place(s.Priority), s)
	}
}
