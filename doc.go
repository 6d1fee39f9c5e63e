// Package dispatcher attaches BPF programs to hooks that several programs
// share, so that each stays attached for as long as its owner wants and none
// can be thrown out by the others: XDP and TC of network devices, and the hooks
// of cgroups.
//
// [Attach] puts a program on a hook, beside those that are there:
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
// XDP has room for one program only: there a generated dispatcher holds the hook
// through a bpf_link and runs a chain of members in order. On TCX (tcx/ingress,
// tcx/egress, Linux 6.6) and on cgroups (cgroup_skb/egress, cgroup/connect4, ...)
// each member has a link of its own, and the kernel runs them in order:
//
//	dispatcher.On(hook.TCXIngress, "eth0")
//	dispatcher.On(hook.CgroupConnect4, "/sys/fs/cgroup/system.slice")
//
// On tc/ingress and tc/egress, for kernels without TCX, a member is a filter of
// the clsact qdisc, which nobody owns.
//
// [List] shows what any tool has attached on the machine, [Explain] what the programs
// on a hook do to a packet, and [Measure] how often they run, for how long, and on XDP
// chains with which verdicts. [Seal] makes an XDP chain faster.
//
// The state is in the kernel alone: there is no daemon, no database and no
// file. See docs/architecture.md and docs/pins-and-state.md.
//
// Everything here needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON, what looks at more than
// pinned members CAP_SYS_ADMIN (finding objects by id; docs/architecture.md has a table),
// and Linux 5.10; [Features] tells what needs more. Before
// 5.11 BPF memory counts towards RLIMIT_MEMLOCK: call rlimit.RemoveMemlock of
// cilium/ebpf there.
package dispatcher
