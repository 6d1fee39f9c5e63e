// Package dispatch turns a plan into a program: the order of the members, and
// the instructions of the dispatcher that runs them. It is pure: no I/O, no
// system calls, the same plan always gives the same instructions.
package dispatch
