// Package state is what libdispatcher keeps in the kernel: the description of
// a chain, bound to its dispatcher; the slots that own the members; the pins;
// and the lock. docs/pins-and-state.md is its specification.
package state
