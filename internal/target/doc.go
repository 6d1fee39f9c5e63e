// Package target has what all families of hooks share: the target that a user
// names, the same target once it is opened, what a program asks for when it joins,
// the handle that owns a member, and the order of what is on a hook. It attaches
// nothing.
package target
