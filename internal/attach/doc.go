// Package attach is the face of the families: it opens a target, finds the family
// that has it, and passes the operation on. What concerns several families stands
// here too: operations by a link's id, reading many hooks, sweeping, recovering.
package attach
