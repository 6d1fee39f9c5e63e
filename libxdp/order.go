package libxdp

import (
	"cmp"
	"strings"
)

// A rank is what decides the place of a program in a chain. Since others read
// and change the same chains, the order is exactly libxdp's.
type rank struct {
	Priority     uint32
	Name         string // of the function, whole
	Loaded       bool
	Instructions int    // of a program that is not loaded
	Tag          string // of a loaded one, hex
	LoadTime     uint64 // of a loaded one, in nanoseconds after boot
}

// compare is negative when a runs before b, 0 when nothing tells them apart.
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
