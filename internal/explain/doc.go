// Package explain runs packets through the programs on a hook without sending them
// (BPF_PROG_TEST_RUN), and tells what each program did with each packet.
//
// It reads the hook as List does and opens the programs by their ids. The kernel runs
// the programs one after the other, each on the packet as the one before it left it.
// Go code does what the dispatcher would do in between: continue sets, empty slots
// and closed doors. A test runs the whole dispatcher on the same packets and compares
// verdicts and bytes.
//
// An Explainer holds the programs, not the slots, so it keeps no member in a chain.
// It runs in the network namespace of the device and tells the kernel the device and
// the queue (Linux 5.15 for XDP). It hands on what programs leave for each other:
// metadata, the mark and priority, cb. It does not run the whole chain beside that to
// compare, because the maps are the real ones and would count twice. The members of
// libxdp are freplace programs, which the kernel runs only as a part of their
// dispatcher: there the dispatcher runs as one step.
package explain
