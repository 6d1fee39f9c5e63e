package dispatcher

import (
	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/internal/load"
)

// A Source is where a program comes from: [Program], [ProgramID],
// [ProgramPin], [File] or [Spec] make one.
type Source struct{ load.Source }

// source is what there is to load: of the zero value, nothing.
func (s Source) source() load.Source {
	if s.Source == nil {
		return load.Program{}
	}
	return s.Source
}

// Program is a program that the caller has loaded and goes on to own; it may
// be closed as soon as the call that takes the source has returned.
//
// It must be an XDP program of the same kind as the members that are there
// already, see [ErrIncompatible]: the same expected attach type (BPF_XDP is
// what cilium/ebpf and libbpf set for SEC("xdp")), and with or without frags.
func Program(prog *ebpf.Program) Source { return Source{load.Program{Program: prog}} }

// ProgramID is a loaded program, by its id.
func ProgramID(id ebpf.ProgramID) Source { return Source{load.ID(id)} }

// ProgramPin is a program pinned in a bpffs, by its path.
func ProgramPin(path string) Source { return Source{load.Pin(path)} }

// LoadOptions say how to load a program from an object file or a spec.
// The zero value loads the only XDP program there is.
type LoadOptions = load.Options

// File is a program in an object file. It is loaded such that it fits the
// chain, and its maps are pinned beside a persistent member. Priority and
// continue set come from the metadata that programs for libxdp carry
// (.xdp_run_config), unless the [Options] say otherwise.
func File(path string, o LoadOptions) Source { return Source{load.File{Path: path, Options: o}} }

// Spec is a program in a collection that the caller has read. The collection
// is not changed.
func Spec(spec *ebpf.CollectionSpec, o LoadOptions) Source {
	return Source{load.Spec{Collection: spec, Options: o}}
}

// VerifierRefusal is the error, for errors.As, of a program that the kernel's
// verifier refused. Its text is the cause in one line; the whole log is in it.
type VerifierRefusal = load.RefusedError
