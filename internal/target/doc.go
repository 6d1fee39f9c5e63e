// Package target has what all families of hooks share: the target that a user
// names, the opened target, the request of a program that joins, the handle that
// owns a member, and the order of what is on a hook. It attaches nothing.
package target
