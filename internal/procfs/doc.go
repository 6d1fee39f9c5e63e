// Package procfs reads what /proc says about mounts, tasks and namespaces. It
// knows nothing of BPF. What the parsers do not understand they leave out: /proc
// changes while it is read.
package procfs
