package dispatch

import (
	"crypto/sha256"

	"github.com/cilium/ebpf/asm"
)

// Code is a program as the verifier got it: relocated, its functions one after
// the other and its main function first, so that it can be made a part of a
// dispatcher. Jumps and calls are relative; nothing in it depends on where it
// stands.
type Code struct {
	// Name is the main function's.
	Name string
	// Refused says why the program cannot be linked; the rest is empty then.
	Refused string
	// Maps are the ids of its maps. An instruction that loads a map has the
	// index in here in the lower half of its constant.
	Maps []uint32
	// Insns have their functions and source lines as metadata.
	Insns asm.Instructions
	// Frame is what its main function takes of the stack, in bytes. It is not kept
	// with the rest: the verifier tells it.
	Frame int
}

// A CodeHash tells codes apart: SHA-256 of what is kept of one.
type CodeHash [sha256.Size]byte
