package dispatch_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
)

// lists calls fn with every list of at most n entries: ranked ones with priorities from 1 to top, and
// unranked ones.
func lists(n, top int, fn func([]dispatch.Entry)) {
	var grow func([]dispatch.Entry)
	grow = func(list []dispatch.Entry) {
		fn(list)
		if len(list) == n {
			return
		}
		grow(append(list[:len(list):len(list)], dispatch.Entry{}))
		for p := 1; p <= top; p++ {
			grow(append(list[:len(list):len(list)], dispatch.Entry{Ranked: true, Priority: p}))
		}
	}
	grow(nil)
}

// text writes a list: a dash is an entry without a rank.
func text(list []dispatch.Entry) string {
	var words []string
	for _, e := range list {
		if e.Ranked {
			words = append(words, fmt.Sprint(e.Priority))
		} else {
			words = append(words, "-")
		}
	}
	return "[" + strings.Join(words, " ") + "]"
}

// inserted returns the list with a member at i.
func inserted(list []dispatch.Entry, i, priority int) []dispatch.Entry {
	longer := append(list[:i:i], dispatch.Entry{Ranked: true, Priority: priority})
	return append(longer, list[i:]...)
}

// inOrder tells whether no member comes before one of lower priority.
func inOrder(list []dispatch.Entry) bool {
	highest := 0
	for _, e := range list {
		if e.Ranked && e.Priority < highest {
			return false
		}
		if e.Ranked {
			highest = e.Priority
		}
	}
	return true
}

// Where a new member goes, independently of the code: of the indexes that keep the members in order it is the first one
// behind all equals; without a member of lower or equal priority, the last one before all members; on a hook that is
// empty or has only foreign programs, the end.
func TestIndexFor(t *testing.T) {
	lists(5, 3, func(list []dispatch.Entry) {
		members := 0
		for _, e := range list {
			if e.Ranked {
				members++
			}
		}
		for priority := 1; priority <= 3; priority++ {
			got := dispatch.IndexFor(list, priority)
			var want int
			switch behind := lastUpTo(list, priority); {
			case members == 0:
				want = len(list)
			case behind >= 0:
				want = behind + 1
			default:
				for !list[want].Ranked {
					want++
				}
			}
			if got != want {
				t.Errorf("%d into %s goes to %d, not to %d", priority, text(list), got, want)
			}
			if inOrder(list) && !inOrder(inserted(list, got, priority)) {
				t.Errorf("%d into %s goes to %d, which is not in order", priority, text(list), got)
			}
			if got < len(list) && list[got].Ranked && list[got].Priority <= priority && inOrder(list) {
				t.Errorf("%d into %s goes to %d, before an equal", priority, text(list), got)
			}
		}
	})
}

// lastUpTo returns the index of the last member of at most that priority, or -1.
func lastUpTo(list []dispatch.Entry, priority int) int {
	for i := len(list) - 1; i >= 0; i-- {
		if list[i].Ranked && list[i].Priority <= priority {
			return i
		}
	}
	return -1
}

// A position alone gets the priority nearest to the default that keeps the order. A position with a priority is
// accepted exactly when the priority keeps the order.
func TestFit(t *testing.T) {
	// Priorities on both sides of the default.
	around := func(list []dispatch.Entry) []dispatch.Entry {
		moved := append([]dispatch.Entry(nil), list...)
		for i := range moved {
			if moved[i].Ranked {
				moved[i].Priority = []int{0, 49, 50, 52}[moved[i].Priority]
			}
		}
		return moved
	}
	lists(4, 3, func(list []dispatch.Entry) {
		list = around(list)
		for i := range len(list) + 1 {
			fitting := map[int]bool{}
			for p := 47; p <= 54; p++ {
				if betweenNeighbours(list, i, p) {
					fitting[p] = true
				}
				got, err := dispatch.Fit(list, i, p)
				switch {
				case fitting[p] && (err != nil || got != p):
					t.Errorf("%d at %d of %s: got %d, %v", p, i, text(list), got, err)
				case !fitting[p] && !errors.Is(err, hook.ErrUsage):
					t.Errorf("%d at %d of %s is taken: %d, %v", p, i, text(list), got, err)
				}
			}
			got, err := dispatch.Fit(list, i, 0)
			if err != nil {
				t.Errorf("any at %d of %s: %v", i, text(list), err)
				continue
			}
			if len(fitting) == 0 { // others have put them out of order: the new member must not come before members of lower priority
				if got < hook.MinPriority || got > hook.MaxPriority {
					t.Errorf("any at %d of %s: got %d", i, text(list), got)
				}
				continue
			}
			for p := range fitting {
				if distance(p) < distance(got) {
					t.Errorf("any at %d of %s: got %d, and %d is nearer to the default", i, text(list), got, p)
				}
			}
			if !fitting[got] {
				t.Errorf("any at %d of %s: got %d, which does not fit", i, text(list), got)
			}
		}
	})
}

func distance(priority int) int {
	return max(priority-hook.DefaultPriority, hook.DefaultPriority-priority)
}

// betweenNeighbours tells whether a member of that priority at i has no higher priority before it and no lower one
// after it.
func betweenNeighbours(list []dispatch.Entry, i, priority int) bool {
	for j, e := range list {
		if e.Ranked && (j < i && e.Priority > priority || j >= i && e.Priority < priority) {
			return false
		}
	}
	return true
}

// The ends of the range of priorities need no special care.
func TestFitAtTheEnds(t *testing.T) {
	for _, tc := range []struct {
		list []dispatch.Entry
		i    int
		want int
	}{
		{nil, 0, 50},
		{[]dispatch.Entry{{Ranked: true, Priority: hook.MinPriority}}, 0, hook.MinPriority},
		{[]dispatch.Entry{{Ranked: true, Priority: hook.MaxPriority}}, 1, hook.MaxPriority},
		{[]dispatch.Entry{{Ranked: true, Priority: hook.MinPriority}}, 1, 50},
		{[]dispatch.Entry{{Ranked: true, Priority: hook.MaxPriority}}, 0, 50},
	} {
		got, err := dispatch.Fit(tc.list, tc.i, 0)
		qt.Check(t, qt.IsNil(err))
		qt.Check(t, qt.Equals(got, tc.want), qt.Commentf("at %d of %s", tc.i, text(tc.list)))
	}
	_, err := dispatch.Fit([]dispatch.Entry{{Ranked: true, Priority: 10}, {Ranked: true, Priority: 20}}, 1, 30)
	qt.Check(t, qt.ErrorMatches(err, "priority 30 does not fit there: the members before and after it have 10 and 20; .*"))
}

// A member may stay with another priority exactly when the list is as much in order as its other members are.
func TestStays(t *testing.T) {
	lists(5, 3, func(list []dispatch.Entry) {
		for i, e := range list {
			if !e.Ranked {
				continue
			}
			others := append(list[:i:i], list[i+1:]...)
			for priority := 1; priority <= 3; priority++ {
				got, want := dispatch.Stays(list, i, priority), betweenNeighbours(others, i, priority)
				if got != want {
					t.Errorf("%d at %d of %s stays: %v", priority, i, text(list), got)
				}
				if inOrder(others) && got != inOrder(inserted(others, i, priority)) {
					t.Errorf("%d at %d of %s stays: %v, and it is not so", priority, i, text(list), got)
				}
			}
		}
	})
}

// A position decides the index, or else the priority does. A reference that names no member is an error.
func TestSettle(t *testing.T) {
	missing := errors.New("not there")
	lists(4, 2, func(list []dispatch.Entry) {
		for target := -1; target < len(list); target++ {
			find := func(hook.Ref) (int, error) {
				if target < 0 {
					return -1, missing
				}
				return target, nil
			}
			for _, asked := range []int{0, 1, 2, 70} {
				for position, at := range map[hook.Position]int{
					{First: true}:   0,
					{Last: true}:    len(list),
					{Before: "any"}: target,
					{After: "any"}:  target + 1,
				} {
					i, priority, err := dispatch.Settle(list, position, find, asked, 60)
					where := fmt.Sprintf("%+v with %d, %d in %s", position, asked, target, text(list))
					if target < 0 && (position.Before != "" || position.After != "") {
						qt.Check(t, qt.ErrorIs(err, missing), qt.Commentf("%s", where))
						continue
					}
					want, fits := dispatch.Fit(list, at, asked)
					if fits != nil {
						qt.Check(t, qt.ErrorIs(err, hook.ErrUsage), qt.Commentf("%s", where))
						continue
					}
					if err != nil || i != at || priority != want {
						t.Errorf("%s: %d with priority %d, %v", where, i, priority, err)
					}
				}
				i, priority, err := dispatch.Settle(list, hook.Position{}, nil, asked, 60)
				want := asked
				if asked == 0 {
					want = 60
				}
				if err != nil || priority != want || i != dispatch.IndexFor(list, want) {
					t.Errorf("%d into %s: %d with priority %d, %v", asked, text(list), i, priority, err)
				}
			}
		}
	})
}
