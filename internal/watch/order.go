package watch

import "github.com/libdispatcher/dispatcher/internal/dispatch"

// unmoved tells for each entry whether it kept its order. The entries that did are a
// longest rising subsequence of the numbers without the suspects, which seem to have
// moved anyway, and then the suspects that fit into it.
func unmoved(order []int, suspect func(i int) bool) []bool {
	stay := make([]bool, len(order))
	var sure, numbers []int
	for i, n := range order {
		if !suspect(i) {
			sure, numbers = append(sure, i), append(numbers, n)
		}
	}
	for _, i := range dispatch.Rising(numbers) {
		stay[sure[i]] = true
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
