package libxdp

import (
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/go-quicktest/qt"
)

// The order is libxdp's, because libxdp will sort the same programs again.
func TestOrder(t *testing.T) {
	inOrder := []rank{
		{Priority: 0, Name: "z", Loaded: true, Tag: "ff", LoadTime: 9},
		{Priority: 1, Name: "A"},
		{Priority: 1, Name: "a"},
		{Priority: 1, Name: "a_"},
		{Priority: 1, Name: "b"},
		{Priority: 50, Name: "a", Loaded: true, Tag: "00", LoadTime: 5, Instructions: 9}, // loaded: the length does not count
		{Priority: 50, Name: "a", Loaded: true, Tag: "00", LoadTime: 6},
		{Priority: 50, Name: "a", Loaded: true, Tag: "0a", LoadTime: 1},
		{Priority: 50, Name: "a", Instructions: 2},
		{Priority: 50, Name: "a", Instructions: 10},
		{Priority: 1 << 31, Name: "a"},
		{Priority: 1<<32 - 1, Name: ""},
	}
	for range 100 {
		got := slices.Clone(inOrder)
		rand.Shuffle(len(got), func(i, j int) { got[i], got[j] = got[j], got[i] })
		slices.SortFunc(got, rank.compare)
		qt.Assert(t, qt.DeepEquals(got, inOrder))
	}
	for _, a := range inOrder {
		qt.Check(t, qt.Equals(a.compare(a), 0))
	}
}
