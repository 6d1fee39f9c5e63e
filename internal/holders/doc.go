// Package holders finds what keeps BPF objects alive: the processes that have
// a link, a program or a map open, the files that it is pinned as, and the
// objects in the kernel that refer to it. It looks into all pid, mount and
// network namespaces.
//
//	f := holders.Open(holders.Options{})
//	defer f.Close()
//	view, err := f.Look(holders.Link)
//	...
//	h, err := view.Of(holders.Ref{Kind: holders.Link, ID: 12})
//
// Open files are found by BPF iterators, or by /proc where the kernel has none;
// the answers are the same. What only iterators can do is to compare with the
// references that the kernel itself counts, so that the answer is known to be
// complete, or how much of it is missing.
//
// This process does not count: neither what the package opens nor other
// descriptors that are open in it, unless [Options.Self] is set.
//
// # What the kernel counts
//
// Each open file and each inode of a bpffs takes one reference; descriptors
// that came by dup, fork or through a unix socket are the same open file. To a
// link nothing else refers. Programs and maps are held by other objects as
// well, see [Object]. Not to be found are open files without a descriptor: on
// the way through a unix socket, or registered in an io_uring.
package holders
