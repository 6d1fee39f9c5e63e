package load

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/state"
)

// A Source says where a program comes from.
type Source interface {
	// Load returns the program. If the program is not loaded yet, Load loads it such
	// that it fits. The caller closes the result.
	Load(want Want) (*Loaded, error)
}

// A Want says where a program will run.
type Want struct {
	Hook hook.Hook
	// Shape is the shape of the XDP chain that the program joins. It is nil when the
	// program starts a chain: a loaded program then keeps its frags, and must have been
	// loaded as others are.
	Shape *dispatch.Shape
	// Adopt lets a program start a chain that most others cannot join: it has the
	// device already, so no more are locked out than before.
	Adopt bool
	// Frags lets a program that starts a chain keep its frags. Without them more programs
	// can join.
	Frags bool
	// Begins tells what packets on the device begin with; nil for what is not a device.
	Begins func() (hook.Begins, error)
	// Extension is the function that an XDP program replaces; nil for a program that
	// is attached by itself.
	Extension *Extension
}

// An Extension names a function of a loaded program that another program replaces
// (BPF_PROG_TYPE_EXT, "freplace").
type Extension struct {
	Target   *ebpf.Program
	Function string
}

// A Loaded is a loaded program and what is known about it.
type Loaded struct {
	Program *ebpf.Program
	Shape   dispatch.Shape // of an XDP program
	Frags   bool           // the file has frags, whether or not it was loaded with them
	// Name is the function's whole name, which the kernel may have cut.
	Name string
	// Defaults are settings that the program itself asks for.
	Defaults hook.Settings
	// Maps are the maps that were made for the program, by name. It is empty for a
	// program that was loaded before.
	Maps map[string]*ebpf.Map

	pinned []*ebpf.Map // maps that this load has pinned
	owned  []interface{ Close() error }
}

// Close closes the descriptors. A program in a slot stays loaded.
func (l *Loaded) Close() {
	for _, c := range l.owned {
		c.Close()
	}
	l.owned = nil
}

// Own returns an open program as a Loaded, which takes it over.
func Own(prog *ebpf.Program) *Loaded {
	return &Loaded{Program: prog, owned: []interface{ Close() error }{prog}}
}

// Twin is a second Loaded of the same program and maps. The caller closes it.
func (l *Loaded) Twin() (*Loaded, error) {
	twin := &Loaded{}
	prog, err := l.Program.Clone()
	if err != nil {
		return nil, err
	}
	twin.Program, twin.owned = prog, append(twin.owned, prog)
	if l.Maps == nil {
		return twin, nil
	}
	twin.Maps = map[string]*ebpf.Map{}
	for name, m := range l.Maps {
		m, err := m.Clone()
		if err != nil {
			twin.Close()
			return nil, err
		}
		twin.Maps[name], twin.owned = m, append(twin.owned, m)
	}
	return twin, nil
}

// Discard closes a program that was not used after all, and removes the pins that the
// load made for its maps.
func (l *Loaded) Discard() {
	for _, m := range l.pinned {
		_ = m.Unpin()
	}
	l.Close()
}

// A Program is the source of a program that the caller has loaded and still owns.
type Program struct{ *ebpf.Program }

// Load returns a clone of the program. The caller closes the result.
func (p Program) Load(want Want) (*Loaded, error) {
	if p.Program == nil {
		return nil, hook.Because(hook.ErrUsage, "the program is nil")
	}
	return existing(p.Program, want)
}

// An ID is the id of a loaded program, as a source.
type ID uint32

// Load opens the program. The caller closes the result.
func (id ID) Load(want Want) (*Loaded, error) {
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, hook.Because(fs.ErrNotExist, "there is no program with id %d; \"bpftool prog\" lists the loaded ones", uint32(id))
	}
	if err != nil {
		return nil, kernel.Errno(fmt.Sprintf("program id %d", uint32(id)), err)
	}
	return owned(prog, want)
}

// A Pin is the path of a pinned program, as a source.
type Pin string

// Load opens the pinned program. The caller closes the result.
func (path Pin) Load(want Want) (*Loaded, error) {
	prog, err := ebpf.LoadPinnedProgram(string(path), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, hook.Because(fs.ErrNotExist, "there is no pinned program at %s", string(path))
	}
	if err != nil {
		return nil, kernel.PathErrno("open the pinned program", string(path), err)
	}
	return owned(prog, want)
}

func owned(prog *ebpf.Program, want Want) (*Loaded, error) {
	l, err := existing(prog, want)
	if err != nil {
		prog.Close()
		return nil, err
	}
	l.owned = append(l.owned, prog)
	return l, nil
}

// existing returns a loaded program after a check that it fits.
func existing(prog *ebpf.Program, want Want) (*Loaded, error) {
	info, err := prog.Info()
	if err != nil {
		return nil, kernel.Errno("program", err)
	}
	if _, err := state.Find(prog); err == nil {
		return nil, hook.Because(hook.ErrIncompatible, "program %q is itself a dispatcher of libdispatcher", info.Name)
	}
	l := &Loaded{Program: prog, Name: info.Name}
	if want.Extension != nil && prog.Type() == ebpf.Extension {
		return l, nil
	}
	if kind := kernel.KindOf(want.Hook); prog.Type() != kind.Program {
		return nil, hook.Because(hook.ErrIncompatible, "program %q is a %v program; %s takes %v programs", info.Name, prog.Type(), want.Hook, kind.Program)
	}
	if want.Hook.OnCgroup() && !kernel.KindOf(want.Hook).Fits(prog) {
		return nil, hook.Because(hook.ErrIncompatible, "program %q was loaded for another hook than %s (expected attach type); load it from SEC(%q)", info.Name, want.Hook, want.Hook)
	}
	if want.Hook != hook.XDP {
		return l, nil
	}
	if want.Shape != nil {
		if err := state.Fits(prog, *want.Shape); err == nil {
			l.Shape = *want.Shape
			return l, nil
		}
	}
	if l.Shape, err = state.ShapeOf(prog); err != nil {
		return nil, fmt.Errorf("program %q: %w", info.Name, err)
	}
	switch {
	case want.Shape != nil && l.Shape != *want.Shape:
		// ShapeOf may return a shape that differs but is the same to this kernel.
		return nil, Mismatch(info.Name, l.Shape, *want.Shape)
	case want.Shape == nil && want.Extension == nil && !want.Adopt && l.Shape.AttachType == ebpf.AttachNone:
		// As the first it would decide for the chain, and shut out what nearly all
		// loaders load.
		return nil, hook.Because(hook.ErrIncompatible, "program %q has %v, and the kernel would let no program of SEC(\"xdp\") that is loaded already into its chain; %s", info.Name, l.Shape, withType)
	}
	return l, nil
}

// withType is how a program gets the attach type of nearly all XDP programs.
const withType = "load it with the expected attach type BPF_XDP: in cilium/ebpf ProgramSpec.AttachType = ebpf.AttachXDP, in libbpf SEC(\"xdp\"); or give the file, which is loaded to fit"

// Mismatch returns the error for a program that does not have the chain's shape.
func Mismatch(name string, have, want dispatch.Shape) error {
	why := "and the kernel lets programs of one kind only run in a chain; "
	if want.AttachType == ebpf.AttachXDP {
		why += withType
	} else {
		why += "give the file, which is loaded to fit, or begin the chain anew without the program that was adopted"
	}
	if have.Frags != want.Frags {
		why = "and a chain takes multi-buffer packets with all its members or with none; load it from SEC(\"xdp\")"
		if want.Frags {
			why = "and would see only the first buffer of a packet; load it from SEC(\"xdp.frags\") if it can handle multi-buffer packets"
		}
	}
	return hook.Because(hook.ErrIncompatible, "program %q has %v, the chain %v, %s", name, have, want, why)
}
