// Package scan finds what is attached on the whole machine, by all tools. It looks
// at every network namespace, every device and every cgroup: at named namespaces,
// at namespaces of processes and threads, and at namespaces that only a mount or a
// descriptor holds. It only reads.
//
// Package attach reads the hooks that can have members. This package reads the
// hooks that are only shown: netkit, netfilter, flow dissectors, socket lookup, and
// LSM programs of cgroups.
//
// BPF_PROG_QUERY does not tell the links of a cgroup's programs. They are matched by
// cgroup, attach type and program. When a program has several entries, it cannot be
// told which of them has the link.
//
// Things change during a scan. An entry that comes or goes meanwhile may be missing,
// but does not spoil the rest. What cannot be read is an entry with an error.
//
// A scan does not find a namespace that only a socket or a link keeps (it lists the
// links), actions of tc that no filter uses, and lsm_cgroup programs without a link.
package scan
