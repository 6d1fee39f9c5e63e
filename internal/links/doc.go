// Package links is the family of the hooks where each member has a link of its own
// and the kernel keeps the order: TCX and cgroups. The order, the members' names,
// moves with their stand-ins, and what is left of links live here.
package links
