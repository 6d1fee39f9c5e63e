// Package interop has the family of libxdp's chains, which package libxdp reads and
// changes. It also converts a chain to the other style and back.
//
// Netlink carries a dispatcher of libxdp, and anyone may replace it. The
// dispatcher's name, types and configuration map tell it from other legacy programs,
// see [libxdp.ConfigOf].
//
// A conversion has a gap in which nothing is attached. On the way to an owned chain
// the members' slots are pinned before the device is touched. On the way back
// libxdp's dispatcher and its components are pinned before the device is touched. So
// a process that dies before or after the gap leaves the old chain or the new one. A
// process that dies in the gap leaves the device empty.
package interop
