package main

// A goal is a ratio to reach, between two figures of the same table.
type goal struct {
	name           string
	section, table string
	row            string
	against        []string // the first of these rows that exists
	n, againstN    int
	most           float64
	why            string // why the goal is missed, if it is
}

// goals are the ratios that the project aims at. A goal with a row that is missing is left out.
var goals = []goal{
	{"10 open slots, instructions, to libxdp's", "instructions", "empty", "slots", []string{"libxdp", "libxdp's shape"}, 10, 10, 1, whySlots},
	{"10 open slots, time, to libxdp's shape", "packet", "empty", "slots", []string{"libxdp's shape"}, 10, 10, 1.1, whySlots},
	{"10 sealed members, time, to hand-merged C", "packet", "empty", "sealed", []string{"merged"}, 10, 10, 1.05, ""},
	{"10 sealed members that work, time, to hand-merged C", "packet", "work", "sealed", []string{"merged"}, 10, 10, 1.05, ""},
	{"10 sealed members, time, to libxdp's shape", "packet", "empty", "sealed", []string{"libxdp's shape"}, 10, 10, 0.85, ""},
	{"10 sealed members, instructions, to libxdp's", "instructions", "empty", "sealed", []string{"libxdp", "libxdp's shape"}, 10, 10, 0.7, ""},
	{"1 sealed member, time, to the program alone", "packet", "empty", "sealed", []string{alone}, 1, 1, 1.05, ""},
	{"1 sealed member that works, time, to the program alone", "packet", "work", "sealed", []string{alone}, 1, 1, 1.05, ""},
}

const whySlots = "a slot is entered by a call and by a tail call, which counts itself; see What was tried"

// judge finds out how far the report is from the goals.
func (r *Report) judge() {
	r.Results = nil
	for _, g := range goals {
		t := r.find(g.section, g.table)
		got, ok := t.get(g.row, g.n)
		if !ok {
			continue
		}
		for _, row := range g.against {
			if other, ok := t.get(row, g.againstN); ok {
				ratio := got.Median / other.Median
				result := Result{Name: g.name, Got: ratio, Most: g.most}
				if !result.Met() {
					result.Why = g.why
				}
				r.Results = append(r.Results, result)
				break
			}
		}
	}
}
