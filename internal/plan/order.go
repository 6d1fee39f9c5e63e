package plan

import (
	"slices"
	"strings"

	"github.com/libdispatcher/dispatcher/hook"
)

// An edge says that one member runs before another.
type edge struct {
	first, then string
	by          string // which of the two asks for it, and gives way
}

// order returns the priorities of the wanted members, lowered and raised as far as before and after
// need it, and the members for which that is impossible.
func order(wants []*Want, c *hook.Chain) (priorities map[string]int, failed map[string]error) {
	priorities, failed = map[string]int{}, map[string]error{}
	for i := range c.Members {
		if m := &c.Members[i]; m.Kind == hook.KindMember {
			priorities[m.Name] = m.Priority
		}
	}
	for _, w := range wants {
		if m := member(c, w.Name); m != nil && m.Owner != w.Owner {
			continue // another's has the name, and stays
		}
		s, _ := w.Settings()
		priorities[w.Name] = s.Priority
	}
	var edges []edge
	for _, w := range wants {
		for _, other := range w.Order.Before {
			edges = append(edges, edge{w.Name, other, w.Name})
		}
		for _, other := range w.Order.After {
			edges = append(edges, edge{other, w.Name, w.Name})
		}
	}
	// Who is not there asks for nothing.
	edges = slices.DeleteFunc(edges, func(e edge) bool { return priorities[e.first] == 0 || priorities[e.then] == 0 })
	for _, w := range wants {
		if circle := circle(edges, []string{w.Name}); circle != nil {
			failed[w.Name] = hook.Because(hook.ErrUsage, "before and after go in a circle: %s", strings.Join(circle, ", then "))
		}
	}
	edges = slices.DeleteFunc(edges, func(e edge) bool { return failed[e.by] != nil })
	// Each round settles at least one member; those that are pushed to and fro never settle.
	for range 2*len(wants) + 1 {
		for _, e := range edges {
			switch a, b := priorities[e.first], priorities[e.then]; {
			case a < b:
			case e.by == e.first:
				priorities[e.first] = b - 1
			default:
				priorities[e.then] = a + 1
			}
		}
	}
	for _, e := range edges {
		switch a, b := priorities[e.first], priorities[e.then]; {
		case failed[e.by] != nil:
		case a >= b:
			failed[e.by] = hook.Because(hook.ErrUsage, "no priority fits all that it is to be before and after (%q has %d, %q has %d)", e.first, a, e.then, b)
		case priorities[e.by] < hook.MinPriority:
			failed[e.by] = hook.Because(hook.ErrUsage, "%q has priority %d, and no priority is before that", e.then, b)
		case priorities[e.by] > hook.MaxPriority:
			failed[e.by] = hook.Because(hook.ErrUsage, "%q has priority %d, and no priority is after that", e.first, a)
		}
	}
	return priorities, failed
}

// circle returns the way from the last of the names back to the first; nil if there is none.
func circle(edges []edge, way []string) []string {
	for _, e := range edges {
		switch {
		case e.first != way[len(way)-1]:
		case e.then == way[0]:
			return append(way, e.then)
		case !slices.Contains(way, e.then):
			if found := circle(edges, append(slices.Clone(way), e.then)); found != nil {
				return found
			}
		}
	}
	return nil
}
