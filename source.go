package dispatcher

import (
	"fmt"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/state"
)

// A Source says where a program comes from: [Program], [ProgramID],
// [ProgramPin], [File] or [Spec] make one. The zero value is refused.
type Source struct{ from load.Source }

// source returns what there is to load.
func (s Source) source() load.Source {
	if s.from == nil {
		return noSource{}
	}
	return s.from
}

// noSource is the zero value of [Source].
type noSource struct{}

// Load returns ErrUsage.
func (noSource) Load(load.Want) (*load.Loaded, error) {
	return nil, hook.Because(ErrUsage, "the source is empty: make one with Program, ProgramID, ProgramPin, File or Spec")
}

// Program is a program that the caller has loaded and still owns. The caller may
// close it as soon as the call that takes the source has returned.
//
// An XDP program must have the expected attach type BPF_XDP, see [ErrIncompatible].
// cilium/ebpf and libbpf set it for SEC("xdp"); in a spec made by hand it is
// ProgramSpec.AttachType = ebpf.AttachXDP. And it must be with or without frags as the
// members that are there already.
func Program(prog *ebpf.Program) Source { return Source{load.Program{Program: prog}} }

// ProgramID is a loaded program, by its id.
func ProgramID(id uint32) Source { return Source{load.ID(id)} }

// ProgramPin is a program pinned in a bpffs, by its path.
func ProgramPin(path string) Source { return Source{load.Pin(path)} }

// LoadOptions say how to load a program from an object file or a spec.
// The zero value loads the only program for the hook.
type LoadOptions struct {
	// Program is the name of the program's function or section. It may be empty when
	// the file has only one program for the hook. A program in a section with a name of
	// its own ("prog") is loaded as what the hook takes.
	Program string
	// Globals are the constants and variables to set before the load, by name. Values
	// are written as in C: a number, true, a 'c', a "string".
	Globals map[string]string
	// Maps are used instead of the file's maps of the same names, and may have more or
	// fewer entries. The caller still owns them, and may close them once the program is loaded.
	Maps map[string]*ebpf.Map
	// MapPins is a folder in a bpffs for all maps of the file. A map that is pinned
	// there under its name is used; a map that is not is made and pinned there.
	MapPins string
	// BPFFS is the bpffs in which maps with LIBBPF_PIN_BY_NAME are pinned and shared.
	// Default: the bpffs of the member.
	BPFFS string
	// NewMaps gives a program that replaces another program new maps. Without NewMaps
	// the new program takes over the old program's maps, see [Link.Update].
	NewMaps bool
	// Mark is a text of at most 63 bytes that is kept with the loaded program, so that [MarkOf] can
	// tell later what was loaded: the hash of a file, a version. Default: none.
	Mark string
}

// File is a program in an object file. It is loaded so that it fits the
// chain, and its maps are pinned beside a persistent member. Priority and
// continue set come from the metadata that programs for libxdp carry
// (.xdp_run_config), unless the [Options] say otherwise.
func File(path string, o LoadOptions) Source {
	return Source{load.File{Path: path, Options: load.Options(o)}}
}

// MarkOf returns the mark of a loaded program, see LoadOptions.Mark; empty if it has none. The error
// is fs.ErrNotExist if there is no such program.
func MarkOf(program uint32) (string, error) {
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(program))
	if err != nil {
		return "", wrap("read mark", Target{}, kernel.Errno(fmt.Sprintf("program id %d", program), err))
	}
	defer prog.Close()
	mark, err := state.MarkOf(prog)
	return mark, wrap("read mark", Target{}, err)
}

// Spec is a program in a collection that the caller has read. The collection
// is not changed.
func Spec(spec *ebpf.CollectionSpec, o LoadOptions) Source {
	return Source{load.Spec{Collection: spec, Options: load.Options(o)}}
}
