package load

import (
	"fmt"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// A Description says what is known of an XDP program before the load.
type Description struct {
	Name     string // of the function, not cut
	Shape    dispatch.Shape
	Defaults hook.Settings // settings that the program itself asks for
	Loaded   bool          // the program was loaded before; the shape of an extension is not known then
}

// Describe describes an XDP program, and returns the source to load it from. Load from
// that source, so that a file is read only once.
func Describe(src Source) (Source, Description, error) {
	switch s := src.(type) {
	case File:
		of, err := s.read()
		if err != nil {
			return nil, Description{}, err
		}
		d, err := of.describe()
		if err != nil {
			err = fmt.Errorf("%s: %w", s.Path, err)
		}
		return of, d, err
	case Spec:
		d, err := s.describe()
		return s, d, err
	}
	// A program that was loaded to replace a function is accepted too.
	l, err := src.Load(Want{Hook: hook.XDP, Extension: &Extension{}})
	if err != nil {
		return nil, Description{}, err
	}
	defer l.Close()
	return src, Description{Name: l.Name, Shape: l.Shape, Defaults: l.Defaults, Loaded: true}, nil
}

func (s Spec) describe() (d Description, err error) {
	if s.Collection == nil {
		return d, hook.Because(hook.ErrUsage, "the collection spec is nil")
	}
	spec := s.Collection.Copy()
	if d.Name, err = choose(spec, s.Options.Program, hook.XDP); err != nil {
		return d, err
	}
	declareFrags(spec)
	d.Shape, d.Defaults, err = prepare(spec, d.Name, Want{Hook: hook.XDP, Frags: true})
	return d, err
}

// Reuse returns a loaded program for a chain of that shape, even if the program was
// loaded for another purpose: the kernel checks that it fits when it is put in a slot.
// The caller still owns prog.
func Reuse(prog *ebpf.Program, shape dispatch.Shape) (*Loaded, error) {
	clone, err := prog.Clone()
	if err != nil {
		return nil, kernel.Errno("program", err)
	}
	info, err := clone.Info()
	if err != nil {
		clone.Close()
		return nil, kernel.Errno("program", err)
	}
	return &Loaded{Program: clone, Shape: shape, Name: info.Name, owned: []interface{ Close() error }{clone}}, nil
}
