// Package interop is the family of the chains that libxdp keeps on a device, as
// package libxdp reads and changes them, and the conversion of a chain to the other
// style and back.
//
// Netlink carries a dispatcher of libxdp, and anyone may replace it. Its name, its
// types and its configuration map tell it from other legacy programs, see
// [libxdp.ConfigOf].
//
// A conversion has a gap in which nothing is attached. On the way to an owned chain
// the members' slots are pinned before the device is touched. On the way back the
// dispatcher with its components is pinned before that. So a process that dies leaves
// the old chain or the new one, or dies in the gap.
package interop
