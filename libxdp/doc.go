// Package libxdp works with the chains of libxdp (xdp-tools, xdp-loader): it
// reads them, joins them, changes them and starts them, so that programs that
// use libxdp and programs that use this package share a device, each seeing the
// other's.
//
// What libxdp attaches is a dispatcher with ten functions that do nothing, and
// each program takes the place of one of them (freplace, BPF_PROG_TYPE_EXT). The
// dispatcher is on the device by netlink: no link holds it, and anyone may
// replace it. What is known of the chain is in a map of the dispatcher's, see
// [Config]; the programs, and the links that keep them in their places, are
// pinned in <bpffs>/xdp.
//
// Each change builds a new dispatcher, puts all programs in their places, pins
// them, and takes the old dispatcher's place on the device if that is still
// there: packets meet the old chain or the new one, both whole.
//
// The code of the dispatcher is generated here; the file that libxdp loads it
// from is not needed, nor a compiler. libxdp takes it for its own: it looks at
// the name, the types and the map, not at the instructions. Since a chain has
// constants for its settings, fewer instructions are run for each packet.
//
// libxdp changes only chains whose configuration has the version that it writes
// itself. A change here leaves the version as it is.
//
// Chains of libdispatcher's own are in the package above this one. They take
// programs that are loaded already, are held by links, and need no freplace,
// which some kernels refuse.
package libxdp
