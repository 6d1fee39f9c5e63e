package libxdp

import (
	"fmt"
	"io/fs"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
)

// A Source provides the program of a new member. Its owner closes it; methods
// of Device do not.
type Source interface {
	// Load loads the program (BPF_PROG_TYPE_EXT) so that it can replace a
	// function of the dispatcher. The caller closes it.
	Load(dispatcher *ebpf.Program, function string) (*ebpf.Program, error)
	// Name returns the whole name of its function.
	Name() string
	// Settings returns the settings that the program asks for; the others are
	// zero.
	Settings() hook.Settings
	// Frags tells whether the program accepts multi-buffer packets.
	Frags() bool
	// Close releases the resources of the source.
	Close()
}

// FromSpec returns a Source for a function in a collection that cilium/ebpf
// read from an object file. The program's settings are read from its BTF, see
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

// instructions returns the length of the program. It decides between two new
// programs that are otherwise equal.
func (s *specSource) instructions() int {
	n := 0
	for _, ins := range s.spec.Programs[s.function].Instructions {
		n += int(ins.Size() / 8)
	}
	return n
}
