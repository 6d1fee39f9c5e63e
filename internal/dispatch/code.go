package dispatch

import (
	"crypto/sha256"

	"github.com/cilium/ebpf/asm"
)

// Code is a program as the verifier got it, so that it can become a part of a
// dispatcher. It is relocated, and its functions follow one another, the main
// function first. Jumps and calls are relative: the code works at any position.
type Code struct {
	// Name is the main function's name.
	Name string
	// Refused says why the program cannot be linked. The other fields are empty
	// then.
	Refused string
	// Maps are the ids of the program's maps. An instruction that loads a map
	// has the index into Maps in the lower half of its constant.
	Maps []uint32
	// Insns are the instructions, with functions and source lines as metadata.
	Insns asm.Instructions
	// Frame is the size of the main function's stack frame in bytes. It is not
	// stored with the code: the verifier reports it.
	Frame int
}

// A CodeHash identifies a code: the SHA-256 of its stored form.
type CodeHash [sha256.Size]byte
