// Package links is the family of the hooks where each member has a link of its own
// and the kernel keeps the order: TCX and cgroups. The package reads the order, names
// the members, moves them with stand-ins, and deals with what is left of links.
package links
