// Package interop is the family of the chains that libxdp keeps on a device, as
// package libxdp reads and changes them, and the conversion of a chain to the other
// style and back.
package interop
