// Package explain runs packets through the programs on a hook without sending them
// (BPF_PROG_TEST_RUN), and tells what each program did with each packet.
package explain
