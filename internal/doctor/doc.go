// Package doctor looks at the machine and at what libdispatcher keeps on it,
// and says what is not as it should be and which command mends it. It only
// reads: features are probed in a namespace made for that, and all else is what
// the kernel, /proc and the bpffs say.
package doctor
