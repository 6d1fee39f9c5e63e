package libxdp

import (
	"cmp"
	"strings"
)

// A rank decides a program's position in a chain. Other tools read and change
// the same chains, so the order is exactly libxdp's.
type rank struct {
	Priority     uint32
	Name         string // whole name of the function
	Loaded       bool
	Instructions int    // of a program that is not loaded
	Tag          string // of a loaded program, hex
	LoadTime     uint64 // of a loaded program, in nanoseconds after boot
}

// compare is negative when a runs before b, and 0 when nothing distinguishes
// them.
func (a rank) compare(b rank) int {
	if a.Loaded && b.Loaded {
		a.Instructions, b.Instructions = 0, 0
	}
	return cmp.Or(
		cmp.Compare(a.Priority, b.Priority),
		strings.Compare(a.Name, b.Name),
		-cmp.Compare(toByte(a.Loaded), toByte(b.Loaded)),
		cmp.Compare(a.Instructions, b.Instructions),
		strings.Compare(a.Tag, b.Tag),
		cmp.Compare(a.LoadTime, b.LoadTime),
	)
}
