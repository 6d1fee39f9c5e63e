package dispatch

import (
	"slices"

	"github.com/libdispatcher/dispatcher/hook"
)

// An Entry is a program on a hook, as far as the order is concerned.
type Entry struct {
	// Ranked entries have a priority: they are members. Other entries stay
	// where they are.
	Ranked   bool
	Priority int
}

// IndexFor returns the index for a new member of that priority: after the last
// member of lower or equal priority; without one, before the first member;
// without members, at the end.
func IndexFor(entries []Entry, priority int) int {
	first, behind := len(entries), -1
	for i, e := range entries {
		if !e.Ranked {
			continue
		}
		first = min(first, i)
		if e.Priority <= priority {
			behind = i
		}
	}
	if behind >= 0 {
		return behind + 1
	}
	return first
}

// Settle returns the index and the priority of a new member. A position decides
// the index, and the priority must fit there; without a position the priority
// decides. asked is 0 when any priority will do; byDefault is the priority for
// an index without position.
func Settle(entries []Entry, at hook.Position, find func(hook.Ref) (int, error), asked, byDefault int) (i, priority int, err error) {
	switch {
	case at.First:
		i = 0
	case at.Last:
		i = len(entries)
	case at.Before != "":
		i, err = find(at.Before)
	case at.After != "":
		i, err = find(at.After)
		i++
	default:
		if asked == 0 {
			asked = byDefault
		}
		return IndexFor(entries, asked), asked, nil
	}
	if err != nil {
		return 0, 0, err
	}
	priority, err = Fit(entries, i, asked)
	return i, priority, err
}

// Fit returns the priority of a new member at index i: the priority that was
// asked for or, for 0, the one nearest to the default that keeps the members in
// order of their priorities.
func Fit(entries []Entry, i, asked int) (int, error) {
	lowest, highest := hook.MinPriority, hook.MaxPriority
	for j, e := range entries {
		switch {
		case !e.Ranked:
		case j < i:
			lowest = max(lowest, e.Priority)
		default:
			highest = min(highest, e.Priority)
		}
	}
	switch {
	case asked == 0 && lowest > highest: // another tool put them out of order
		return lowest, nil
	case asked == 0:
		return min(max(hook.DefaultPriority, lowest), highest), nil
	case asked < lowest || asked > highest:
		return 0, hook.Because(hook.ErrUsage, "priority %d does not fit there: the members before and after it have %d and %d; give a position or a priority, not both", asked, lowest, highest)
	}
	return asked, nil
}

// Stays tells whether the entry at i can stay there with another priority: no
// member before it has a higher priority and no member after it a lower one.
func Stays(entries []Entry, i, priority int) bool {
	for j, e := range entries {
		if e.Ranked && (j < i && e.Priority > priority || j > i && e.Priority < priority) {
			return false
		}
	}
	return true
}

// Rising returns the indices of a longest part of the numbers, in their order, in which
// none is lower than the one before it.
func Rising(numbers []int) []int {
	length, before := make([]int, len(numbers)), make([]int, len(numbers))
	last := -1
	for i, n := range numbers {
		length[i], before[i] = 1, -1
		for j := range i {
			if numbers[j] <= n && length[j] >= length[i] {
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
