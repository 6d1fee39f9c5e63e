// Package attach puts programs on hooks and takes them off: one file for each
// hook's way of carrying a chain, and what they have in common.
//
// Every change goes the same way: take the lock, read what is there, compute
// the new plan, build everything, swap it in where nobody has changed anything
// meanwhile, pin, unpin. A process that dies between two steps leaves the old
// chain or the new one, both whole, and at most a pin that the next change
// removes. The exception is adoption with its gap, see Adopt.
package attach
