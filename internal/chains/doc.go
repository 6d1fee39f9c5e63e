// Package chains is the family of XDP: members are slots behind a dispatcher, and one
// link, the root link, holds the dispatcher. The package reads devices, joins,
// changes, adopts, seals and counts chains, and deals with what is left of them. It
// knows nothing of TCX, and does not change chains of libxdp.
//
// A change reads the chain, computes the new one, builds its dispatcher, swaps the
// dispatcher in if no other process changed the chain meanwhile, pins, and unpins. A
// process that dies between two steps leaves the old chain or the new one, both
// whole, and at most a pin that the next change removes. The exception is adoption
// with its gap.
package chains
