// Package scan finds what is attached on the whole machine: in every network
// namespace, on every device and every cgroup. It only reads.
//
// The hooks that programs can be attached to are read by internal/attach. What
// is only shown is read here: netkit, netfilter, flow dissectors, socket
// lookup, and LSM programs of cgroups.
//
// Nothing stands still meanwhile. What comes or goes during a scan may be
// missing, but does not spoil the rest; what could not be read is an entry with
// an error.
package scan
