// Package dispatcher attaches BPF programs to hooks that several programs
// share, so that each stays attached for as long as its owner wants and none
// can be thrown out by the others.
//
// On XDP, which has room for one program, a generated dispatcher holds the
// hook through a bpf_link and runs a chain of members in order. [Attach] puts
// any XDP program into the chain:
//
//	link, err := dispatcher.Attach(ctx, dispatcher.XDP("eth0"), dispatcher.Program(prog), dispatcher.Options{})
//	if err != nil { ... }
//	defer link.Close()
//
// The [Link] owns the member. Close it, or die, and the member leaves, within
// milliseconds; with [Options.Persistent] or [Link.Pin] the member is pinned in
// a bpffs and stays. Programs that do not use this library cannot replace what is
// attached; a process with CAP_SYS_ADMIN can always detach it.
//
// The state is in the kernel alone: there is no daemon, no database and no
// file. See docs/architecture.md and docs/pins-and-state.md.
//
// Everything here needs CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON and CAP_SYS_ADMIN
// (finding objects by id), and Linux 5.10. Before 5.11 BPF memory counts
// towards RLIMIT_MEMLOCK: call rlimit.RemoveMemlock of cilium/ebpf there.
package dispatcher
