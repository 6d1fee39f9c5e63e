// Package hook holds the plain data of libdispatcher: hooks, verdicts, the
// options of a member, what a chain looks like, and the errors. It does no
// I/O and imports only the standard library, so that any package may use it.
//
// The JSON tags are those of the command's output, see docs/json.md.
package hook
