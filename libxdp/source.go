package libxdp

import (
	"fmt"
	"io/fs"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
)

// A Source is where a new member comes from. Whoever has one closes it; methods
// of Device do not.
type Source interface {
	// Load loads the program (BPF_PROG_TYPE_EXT) so that it can take the place
	// of a function of the dispatcher. The caller closes it.
	Load(dispatcher *ebpf.Program, function string) (*ebpf.Program, error)
	// Name is the name of its function, whole.
	Name() string
	// Settings are what the program asks for; zero values for what it does not.
	Settings() hook.Settings
	// Frags tells whether it takes multi-buffer packets.
	Frags() bool
	// Close releases what the source has.
	Close()
}

// FromSpec is a Source of a function in a collection, as cilium/ebpf reads it
// from an object file. What the program asks for is read from its BTF, see
// [RunConfig]. The spec is copied.
func FromSpec(spec *ebpf.CollectionSpec, function string, opts ebpf.CollectionOptions) (Source, error) {
	prog, ok := spec.Programs[function]
	switch {
	case !ok:
		return nil, hook.Because(fs.ErrNotExist, "there is no program %q in the collection", function)
	case prog.Type != ebpf.XDP && prog.Type != ebpf.Extension:
		return nil, hook.Because(hook.ErrIncompatible, "program %q is of type %v, not XDP", function, prog.Type)
	}
	settings, err := RunConfig(spec.Types, function)
	if err != nil {
		return nil, fmt.Errorf("program %q: %w", function, err)
	}
	return &specSource{spec.Copy(), function, opts, settings, prog.Flags&unix.BPF_F_XDP_HAS_FRAGS != 0}, nil
}

type specSource struct {
	spec     *ebpf.CollectionSpec
	function string
	opts     ebpf.CollectionOptions
	settings hook.Settings
	frags    bool
}

func (s *specSource) Load(dispatcher *ebpf.Program, function string) (*ebpf.Program, error) {
	return loadComponent(s.spec.Copy(), s.function, dispatcher, function, s.opts)
}

func (s *specSource) Name() string            { return s.function }
func (s *specSource) Settings() hook.Settings { return s.settings }
func (s *specSource) Frags() bool             { return s.frags }
func (s *specSource) Close()                  {}

// instructions is how long the program is, which decides between two new ones
// that have all else in common.
func (s *specSource) instructions() int {
	n := 0
	for _, ins := range s.spec.Programs[s.function].Instructions {
		n += int(ins.Size() / 8)
	}
	return n
}
