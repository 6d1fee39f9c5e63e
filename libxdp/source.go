package libxdp

import (
	"fmt"
	"io/fs"
	"maps"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
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
	case len(prog.Instructions) == 0 || btf.FuncMetadata(&prog.Instructions[0]) == nil:
		return nil, hook.Because(hook.ErrIncompatible, "program %q has no type information, which libxdp's way of attaching needs: compile it with clang -g", function)
	}
	settings, err := RunConfig(spec.Types, function)
	if err != nil {
		return nil, fmt.Errorf("program %q: %w", function, err)
	}
	return &specSource{spec.Copy(), function, opts, settings, prog.Flags&hasFrags != 0}, nil
}

type specSource struct {
	spec     *ebpf.CollectionSpec
	function string
	opts     ebpf.CollectionOptions
	settings hook.Settings
	frags    bool
}

// Load loads the program unchanged but for its type, with the maps and the programs that
// it tail-calls; the maps live as long as the program.
func (s *specSource) Load(dispatcher *ebpf.Program, function string) (*ebpf.Program, error) {
	spec, opts := s.spec.Copy(), s.opts
	kernel.KeepOnly(spec, s.function)
	opts.MapReplacements = maps.Clone(opts.MapReplacements)
	maps.DeleteFunc(opts.MapReplacements, func(n string, _ *ebpf.Map) bool { return s.spec.Maps[n] != nil && spec.Maps[n] == nil })
	p := spec.Programs[s.function]
	p.Type, p.AttachType = ebpf.Extension, ebpf.AttachNone
	p.AttachTarget, p.AttachTo = dispatcher, function
	// These flags belong to the dispatcher; the kernel refuses them here.
	p.Flags &^= hasFrags | devBoundOnly
	p.Ifindex = 0

	coll, err := ebpf.NewCollectionWithOptions(spec, opts)
	if err != nil {
		return nil, loadError(s.function, err)
	}
	defer coll.Close()
	return coll.DetachProgram(s.function), nil
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
