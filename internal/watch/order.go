package watch

import "slices"

// unmoved finds the entries that kept their order: of the numbers a longest
// rising row, in which those that are said to have moved anyway are left out
// where that makes it no shorter than it must be. It tells it for each.
func unmoved(order []int, suspect func(i int) bool) []bool {
	stay := make([]bool, len(order))
	row := rising(order, func(i int) bool { return !suspect(i) })
	for _, i := range row {
		stay[i] = true
	}
	// A suspect that fits in between has not moved.
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

// rising returns the indices of a longest rising row among those that are asked for.
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
