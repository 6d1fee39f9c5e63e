// Package kernel is a thin layer for what the Go libraries lack: it finds network
// namespaces and cgroups, creates links at a place, describes programs, and tells
// why the kernel refused something. It also has what all changes share: retries,
// locks and steps.
package kernel
