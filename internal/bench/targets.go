package main

// A goal is a ratio that is aimed at: of a figure to another in the same table.
type goal struct {
	name           string
	section, table string
	row            string
	against        []string // the first of these rows that is there
	n, againstN    int
	most           float64
	why            string // it is missed, if it is
}

// goals are those of issue 6. Those of rows that are not there are left out.
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

// judge finds out how far the report is from the targets.
func (r *Report) judge() {
	r.Targets = nil
	for _, g := range goals {
		t := r.find(g.section, g.table)
		got, ok := t.get(g.row, g.n)
		if !ok {
			continue
		}
		for _, row := range g.against {
			if other, ok := t.get(row, g.againstN); ok {
				ratio := got.Median / other.Median
				target := Target{Name: g.name, Got: ratio, Most: g.most}
				if !target.Met() {
					target.Why = g.why
				}
				r.Targets = append(r.Targets, target)
				break
			}
		}
	}
}
