// Package state has what libdispatcher keeps in the kernel: the description of a
// chain, which is bound to its dispatcher; the slots of its members; the records of
// members with links of their own; the pins and their lock. docs/pins-and-state.md is
// the specification.
package state
