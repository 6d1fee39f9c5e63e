package dispatch

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
)

// A Shape is what the kernel wants to be equal in a dispatcher, its slots and
// their programs (bpf_prog_map_compatible, kernel/bpf/core.c).
type Shape struct {
	// AttachType is the expected_attach_type: BPF_XDP, or 0 (AttachNone) from
	// loaders that set none. Linux 6.1.192, 6.18 and 7.2 compare it; 5.10 does
	// not.
	AttachType ebpf.AttachType
	// Frags tells whether BPF_F_XDP_HAS_FRAGS is set.
	Frags bool
}

// Plain is the shape of a program from SEC("xdp"), and the default shape to
// load with.
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

// A Slot is a member in a plan.
type Slot struct {
	// MapID is the id of the one-entry prog array that holds the program.
	MapID uint32
	Name  string
	Owner string
	hook.Settings
	Persistent bool
	// Sealed says which program is linked into the dispatcher. It is zero when
	// the dispatcher calls the member through its slot.
	Sealed Sealed
}

// Sealed identifies a program that is linked into a dispatcher.
type Sealed struct {
	Program uint32 // id
	Frame   uint32 // of the main function, in bytes
	Code    CodeHash
}

// A Plan is the chain to build: the slots in run order.
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

// Insert adds a slot at the position at or, without one, behind all slots of
// lower or equal priority. asked is the priority for a position, 0 for any.
func (p *Plan) Insert(s Slot, at hook.Position, asked int) error {
	if p.Named(s.Name) >= 0 {
		return fmt.Errorf("there is a member %q already", s.Name)
	}
	if len(p.Slots) >= hook.MaxMembers {
		return hook.Because(hook.ErrChainFull, "the chain has %d members, and the kernel allows a packet no more tail calls", len(p.Slots))
	}
	return p.settle(s, at, asked)
}

func (p *Plan) settle(s Slot, at hook.Position, asked int) error {
	entries := make([]Entry, len(p.Slots))
	for i, o := range p.Slots {
		entries[i] = Entry{true, o.Priority}
	}
	if at.IsZero() {
		asked = s.Priority
	}
	i, priority, err := Settle(entries, at, p.find, asked, s.Priority)
	if err != nil {
		return err
	}
	s.Priority = priority
	p.Slots = slices.Insert(p.Slots, i, s)
	return nil
}

// find returns the position of the member that ref names.
func (p *Plan) find(ref hook.Ref) (int, error) {
	if i := p.Named(string(ref)); i >= 0 {
		return i, nil
	}
	return 0, p.NoMember(ref)
}

// ErrNoEntry: no entry has the given name.
var ErrNoEntry = errors.New("no such entry")

// NoMember returns the error, an ErrNoEntry, for a name that no member has.
func (p *Plan) NoMember(ref hook.Ref) error {
	names := make([]string, len(p.Slots))
	for i, s := range p.Slots {
		names[i] = s.Name
	}
	return hook.Because(ErrNoEntry, "there is no member %q (the chain has: %s)", ref, strings.Join(names, ", "))
}

// Remove removes the slot at i.
func (p *Plan) Remove(i int) { p.Slots = slices.Delete(p.Slots, i, i+1) }

// Set changes the settings of the slot at i. A member with the same priority as
// before keeps its index among equals; with another priority it goes behind its
// new equals.
func (p *Plan) Set(i int, settings hook.Settings) error {
	s := p.Slots[i]
	moved := settings.Priority != s.Priority
	s.Settings = settings
	p.Slots[i] = s
	if !moved {
		return nil
	}
	p.Remove(i)
	return p.settle(s, hook.Position{}, 0)
}

// Move moves the slot at i, and gives it a priority that fits there.
func (p *Plan) Move(i int, to hook.Position) error {
	s := p.Slots[i]
	p.Remove(i)
	return p.settle(s, to, 0)
}
