// Package attach is the face of the families. It opens a target, finds the target's
// family, and passes the operation on. It also has what concerns several families:
// operations by a link's id, reading many hooks, sweeping, recovering.
package attach
