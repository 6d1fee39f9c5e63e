// Package watch tells what changes on the hooks of the machine: it looks again
// and again, and compares two looks. What wakes it between two looks, netlink,
// inotify and what the kernel tells of bpf(2), makes it quicker; it is right
// without that as well.
//
// [Diff] is pure.
package watch
