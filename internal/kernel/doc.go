// Package kernel is a thin layer over what the Go libraries lack: network
// namespaces, bpffs mounts, and telling why the kernel said no.
package kernel
