// Package watch reports what changes on the hooks of the machine: it looks again and
// again, and compares each look with the last one. Netlink, inotify and what the kernel
// tells of bpf(2) wake it between looks. These signs make it faster; its events are
// right without them too.
//
// [Diff] is a pure function of two looks.
package watch
