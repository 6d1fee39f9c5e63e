package dispatch

import "github.com/libdispatcher/dispatcher/hook"

// An Entry is what counts of a program on a hook when a place is looked for.
type Entry struct {
	// Ranked entries have a priority: they are members. Others keep the place
	// that they have, wherever it is.
	Ranked   bool
	Priority int
}

// Place returns the index at which a newcomer of that priority goes: just
// behind the last member of lower or equal priority; with none, just before the
// first member; with no members at all, at the end.
func Place(entries []Entry, priority int) int {
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

// Settle returns where a newcomer goes, and its priority: to the place that is
// asked for, with a priority that fits there, or without one where the priority
// puts it. asked is 0 when any priority will do, and byDefault the one for that.
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
		return Place(entries, asked), asked, nil
	}
	if err != nil {
		return 0, 0, err
	}
	priority, err = Fit(entries, i, asked)
	return i, priority, err
}

// Fit returns the priority of a newcomer that goes to index i: the one that was
// asked for, or for 0 the one nearest to the default that keeps the members in
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
	case asked == 0 && lowest > highest: // others have put them out of order
		return lowest, nil
	case asked == 0:
		return min(max(hook.DefaultPriority, lowest), highest), nil
	case asked < lowest || asked > highest:
		return 0, hook.Because(hook.ErrUsage, "priority %d does not fit there: the members before and after it have %d and %d; give the place or the priority", asked, lowest, highest)
	}
	return asked, nil
}

// Stays tells whether the entry at i may keep its place with another priority:
// no member before it has a higher one and none after it a lower one.
func Stays(entries []Entry, i, priority int) bool {
	for j, e := range entries {
		if e.Ranked && (j < i && e.Priority > priority || j > i && e.Priority < priority) {
			return false
		}
	}
	return true
}
