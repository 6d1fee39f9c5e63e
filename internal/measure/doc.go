// Package measure reports how often the programs on hooks run, which verdicts
// they give and how long they take. On owned chains a counting dispatcher
// counts, see attach.Count. Elsewhere it reads the kernel's run statistics of
// programs.
//
// # Owned chains
//
// Nothing in the plain dispatcher counts. A watcher loads two dispatchers, see
// package dispatch. It puts the counting one into the watch, a prog array of one
// entry, and swaps the other one in like any change. It alone has a descriptor of
// the watch. So:
//
//   - Everybody still finds the chain and can change it. A change builds a plain
//     dispatcher, as always. The watcher sees within 100 ms that the link has another
//     program, and watches that; on a chain that netlink carries it sees this at the
//     end of its interval. The sample says that a part of its time was not counted
//     (Interrupted).
//   - When the watcher ends, it closes the watch and swaps the plain dispatcher in.
//     When it is killed, the kernel empties the watch, as it empties slots, and the
//     plain code behind the call runs. The next change of the chain swaps the plain
//     dispatcher in. So does each locked operation if the chain is pinned, the next
//     watcher, and recover. The doctor reports it.
//   - The watcher holds neither the link nor a slot, so watching keeps nothing
//     attached.
//   - Several processes may watch. A later one finds the watch in the description,
//     opens it and reads the same counters. The watch goes with the last of them.
//   - The call into the watch is one of the 33 tail calls that the kernel allows for
//     a packet, so 32 members can be counted. A member that makes tail calls itself
//     has one less while the chain is watched.
//
// A member's time runs from the end of the member before it to its own end, by
// bpf_ktime_get_ns. A program that reads the clock 64 times measures the clock's own
// part, which is shown. Rates use the time between two readings. Package dispatch
// has the cost.
//
// # Other programs
//
// The kernel's run statistics (BPF_ENABLE_STATS, Linux 5.8) end with their
// descriptor. They tell how often a program ran, and for how long. The kernel keeps
// them for each program, not for each attachment. It keeps none for programs that
// are tail-called, or that freplace puts into a dispatcher of libxdp: of such a chain
// only the whole is known.
package measure
