// Package kernel is a thin layer over what the Go libraries lack: network
// namespaces, bpffs mounts, and telling why the kernel said no. It also has what
// all changes share: tries, locks, steps.
package kernel
