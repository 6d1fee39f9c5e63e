// Package libxdp works with the chains of libxdp (xdp-tools, xdp-loader). It
// reads, joins, changes and starts them, so that programs that use libxdp and
// programs that use this package can share a device, and each sees the other's
// members.
//
// libxdp attaches a dispatcher with ten functions that do nothing, and each
// program replaces one of these functions (freplace, BPF_PROG_TYPE_EXT). Netlink
// attaches the dispatcher: no link holds it, and anyone may replace it. The
// chain's settings are in a map of the dispatcher, see [Config]. The programs,
// and the links that keep them attached, are pinned in <bpffs>/xdp.
//
// Each change builds a new dispatcher, attaches all programs to it, pins them,
// and replaces the old dispatcher if it is still on the device. Packets meet the
// old chain or the new one, each complete.
//
// This package generates the dispatcher's code, so it needs neither libxdp's
// object file nor a compiler. libxdp recognizes the dispatcher as its own,
// because it checks the name, the types and the map, not the instructions. Since
// a chain's settings are constants in the code, a packet needs fewer
// instructions.
//
// libxdp changes only chains with the configuration version that it writes
// itself. A change by this package keeps the version.
//
// The package above this one has libdispatcher's own chains. They accept
// programs that are already loaded, links hold them, and they need no freplace,
// which some kernels refuse.
package libxdp
