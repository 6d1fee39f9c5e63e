// Package doctor looks at the machine and at what libdispatcher keeps on it. It
// says what is wrong and which command mends it. It changes nothing: it probes
// features in a new network namespace, and reads all else from the kernel, /proc and
// the bpffs.
package doctor
