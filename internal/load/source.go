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

// A Source is where a program comes from.
type Source interface {
	// Load returns the program. One that is yet to be loaded is loaded to fit.
	// The caller closes the result.
	Load(want Want) (*Loaded, error)
}

// A Want is where a program is to run.
type Want struct {
	Hook hook.Hook
	// Shape is that of the XDP chain it joins; nil when it starts one, and gets
	// the shape it was written for.
	Shape *dispatch.Shape
	// Extension is the function whose place an XDP program takes; nil for one
	// that is attached by itself.
	Extension *Extension
}

// An Extension is a function of a loaded program that another one replaces
// (BPF_PROG_TYPE_EXT, "freplace").
type Extension struct {
	Target   *ebpf.Program
	Function string
}

// Loaded is a program and what is known about it.
type Loaded struct {
	Program *ebpf.Program
	Shape   dispatch.Shape // of an XDP program
	// Name is the function's name, whole where the kernel would cut it.
	Name string
	// Defaults are settings that the program itself asks for.
	Defaults hook.Settings
	// Maps are those that were made for the program, by name; empty for one
	// that was loaded before.
	Maps map[string]*ebpf.Map

	pinned []*ebpf.Map // pinned by this load, not found
	owned  []interface{ Close() error }
}

// Close releases the descriptors. The program stays loaded where it is in a slot.
func (l *Loaded) Close() {
	for _, c := range l.owned {
		c.Close()
	}
	l.owned = nil
}

// Discard is Close for a program that was not used after all: pins of maps
// that were made on loading it go too.
func (l *Loaded) Discard() {
	for _, m := range l.pinned {
		_ = m.Unpin()
	}
	l.Close()
}

// Program is a program that the caller has loaded and goes on to own.
type Program struct{ *ebpf.Program }

func (p Program) Load(want Want) (*Loaded, error) {
	if p.Program == nil {
		return nil, hook.Because(hook.ErrUsage, "the program is nil")
	}
	return existing(p.Program, want)
}

// ID is the id of a loaded program.
type ID uint32

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

// Pin is the path of a pinned program.
type Pin string

func (path Pin) Load(want Want) (*Loaded, error) {
	prog, err := ebpf.LoadPinnedProgram(string(path), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, hook.Because(fs.ErrNotExist, "there is no pinned program at %s", string(path))
	}
	if err != nil {
		return nil, kernel.Errno("pinned program "+string(path), err)
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

// existing checks that a program that is loaded already fits.
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
	// ShapeOf may find a shape that this kernel takes for the same.
	if want.Shape != nil && l.Shape != *want.Shape {
		return nil, Mismatch(info.Name, l.Shape, *want.Shape)
	}
	return l, nil
}

// Mismatch is the refusal of a program whose shape is not the chain's.
func Mismatch(name string, have, want dispatch.Shape) error {
	why := "and the kernel lets programs of one kind only run in a chain; load it as the others were, or give the file, which is then loaded to fit"
	if have.Frags != want.Frags {
		why = "and a chain takes multi-buffer packets with all its members or with none; load it from SEC(\"xdp\")"
		if want.Frags {
			why = "and would see only the first buffer of a packet; load it from SEC(\"xdp.frags\") if it can handle multi-buffer packets"
		}
	}
	return hook.Because(hook.ErrIncompatible, "program %q has %v, the chain %v, %s", name, have, want, why)
}
