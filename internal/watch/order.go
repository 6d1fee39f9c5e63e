package watch

import "slices"

// unmoved tells for each entry whether it kept its order. The entries that did are a
// longest rising subsequence of the numbers without the suspects, which seem to have
// moved anyway, and then the suspects that fit into it.
func unmoved(order []int, suspect func(i int) bool) []bool {
	stay := make([]bool, len(order))
	row := rising(order, func(i int) bool { return !suspect(i) })
	for _, i := range row {
		stay[i] = true
	}
	// A suspect that fits between the others has not moved.
	for i := range order {
		if !suspect(i) {
			continue
		}
		fits := true
		for j := range order {
			if stay[j] && (j < i) != (order[j] < order[i]) {
				fits = false
			}
		}
		stay[i] = fits
	}
	return stay
}

// rising returns the indices of a longest rising subsequence of the numbers that of
// chooses.
func rising(order []int, of func(int) bool) []int {
	length, before := make([]int, len(order)), make([]int, len(order))
	last := -1
	for i := range order {
		if !of(i) {
			continue
		}
		length[i], before[i] = 1, -1
		for j := range i {
			if of(j) && order[j] < order[i] && length[j] >= length[i] {
				length[i], before[i] = length[j]+1, j
			}
		}
		if last < 0 || length[i] > length[last] {
			last = i
		}
	}
	var row []int
	for i := last; i >= 0; i = before[i] {
		row = append(row, i)
	}
	slices.Reverse(row)
	return row
}
