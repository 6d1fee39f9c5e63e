// Package holders finds what keeps BPF objects alive: the processes that have
// a link, a program or a map open, its pins, and the objects in the kernel that
// refer to it. It looks into all pid, mount and network namespaces.
//
//	f := holders.Open(holders.Options{})
//	defer f.Close()
//	view, err := f.Look(hook.HolderLink)
//	...
//	h, err := view.Of(hook.HolderRef{Kind: hook.HolderLink, ID: 12})
//
// Open files are found by BPF iterators, or through /proc where the kernel has no
// iterators; the answers are the same. But only iterators show the references that
// the kernel itself counts. By these the answer is known to be complete, or how
// much of it is missing.
//
// The calling process does not count: neither what this package opens, nor, unless
// [Options.Self] is set, what else the process has open.
//
// # What the kernel counts
//
// Each open file and each inode of a bpffs takes one reference. Descriptors that
// came by dup, fork or a unix socket belong to the same open file. A link has no
// other references. Programs and maps are also held by other objects, see [hook.HolderObject].
// Open files without a descriptor are not found: in the queue of a unix socket, or
// registered in an io_uring.
package holders
