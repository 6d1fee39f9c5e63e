// Package chains is the family of XDP: members are slots behind a dispatcher, which
// one link holds. Reading a device, joining, changing, adopting, sealing, counting,
// and what is left of a chain live here. Nothing here knows TCX or libxdp's way.
//
// A change reads the chain, computes the new one, builds its dispatcher, swaps it in
// where nobody has changed anything meanwhile, pins, and unpins. A process that dies
// between two steps leaves the old chain or the new one, both whole, and at most a
// pin that the next change removes. The exception is adoption with its gap.
package chains
