package main

import (
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
)

// expectedFile is the file that -update writes.
const expectedFile = "internal/bench/expected.json"

//go:embed expected.json
var expectedJSON []byte

// expected has the upper bounds.
type expected struct {
	// Instructions are the instructions beyond one program alone, by kind of member, row and number
	// of members.
	Instructions counts       `json:"instructions"`
	Ratios       []ratioBound `json:"ratios"`
}

// A ratioBound is for the ratio of two chains' times, with equal numbers of members. The bound exceeds the
// measured ratio by several times the noise of a busy machine with two CPUs.
type ratioBound struct {
	Kind    string  `json:"kind"`
	Row     string  `json:"row"`
	To      string  `json:"to"`
	Members int     `json:"members"`
	Most    float64 `json:"most"`
}

// checkedRows are this project's own rows.
var checkedRows = []string{"slots", "sealed", "libxdp's protocol, from here"}

// check compares with the expected counts and ratios. With update it writes the counts that it
// measures.
func (b *bench) check(update bool) error {
	var want expected
	if err := json.Unmarshal(expectedJSON, &want); err != nil {
		return fmt.Errorf("%s: %w", expectedFile, err)
	}
	b.section = "instructions"
	b.progress("")
	r, err := countedReport(b.ctx, b.matrix)
	b.clear()
	if err != nil {
		return err
	}
	if update {
		want.Instructions = ownCounts(r)
		content, err := json.MarshalIndent(want, "", "\t")
		if err != nil {
			return err
		}
		return os.WriteFile(expectedFile, append(content, '\n'), 0o644)
	}
	got := ownCounts(r)
	if grown, _ := compareCounts(want, got); len(grown) > 0 {
		// A second run, because the machine's timer may have disturbed the
		// first.
		b.progress("again")
		r, err := countedReport(b.ctx, b.matrix)
		b.clear()
		if err != nil {
			return err
		}
		keepLess(got, ownCounts(r))
	}
	grown, less := compareCounts(want, got)
	fmt.Printf("instructions of %d chains: %d have more than expected, %d have less\n", countOf(got), len(grown), less)
	if less > 0 {
		fmt.Println("  less is good: write it down with bench check -update")
	}
	if len(grown) > 0 {
		err = fmt.Errorf("chains have become more costly (if that is meant: bench check -update):\n  %s", strings.Join(grown, "\n  "))
	}
	return errors.Join(err, b.checkRatios(want.Ratios))
}

type counts = map[string]map[string]map[int]float64

func countOf(c counts) int {
	n := 0
	for _, rows := range c {
		for _, columns := range rows {
			n += len(columns)
		}
	}
	return n
}

// keepLess takes the smaller of two counts.
func keepLess(counts, others counts) {
	for kind, rows := range counts {
		for row, columns := range rows {
			for n, count := range columns {
				if other, ok := others[kind][row][n]; ok {
					columns[n] = min(count, other)
				}
			}
		}
	}
}

// ownCounts returns the counts of this project's rows.
func ownCounts(r *Report) counts {
	counts := counts{}
	for _, t := range r.Sections[0].Tables {
		counts[t.Name] = map[string]map[int]float64{}
		for _, row := range checkedRows {
			for _, x := range t.columns() {
				if s, ok := t.get(row, x); ok {
					if counts[t.Name][row] == nil {
						counts[t.Name][row] = map[int]float64{}
					}
					counts[t.Name][row][x] = s.Median
				}
			}
		}
	}
	return counts
}

// slack is the tolerated difference of two runs: the kernel's figures have no fractions, and a timer tick may add to
// one.
func slack(count float64) float64 { return 2 + count/200 }

// compareCounts returns the chains with more instructions than expected, and the
// number of chains with less.
func compareCounts(want expected, got counts) (grown []string, less int) {
	for kind, rows := range want.Instructions {
		for row, columns := range rows {
			for n, most := range columns {
				count, ok := got[kind][row][n]
				switch {
				case !ok:
					grown = append(grown, fmt.Sprintf("%s members, %s, %d: not measured", kind, row, n))
				case count > most+slack(most):
					grown = append(grown, fmt.Sprintf("%s members, %s, %d: %.0f instructions, expected %.0f", kind, row, n, count, most))
				case count < most-slack(most):
					less++
				}
			}
		}
	}
	slices.Sort(grown)
	return grown, less
}

// checkRatios measures times in turns, and compares the medians of their
// ratios.
func (b *bench) checkRatios(bounds []ratioBound) error {
	const rounds = 40
	b.section = "ratios"
	var over []string
	for _, kind := range kinds {
		w := newWorkshop(b.scope)
		onOneCPU(b.scope, func() {
			for _, bound := range bounds {
				if bound.Kind != kind {
					continue
				}
				b.progress("%s, %s to %s", kind, bound.Row, bound.To)
				row, to := w.chain(bound.Row, kind, bound.Members), w.chain(bound.To, kind, bound.Members)
				runner := newRunner(b.scope, to)
				repeat := runner.repeats(to)
				var all []float64
				for range rounds {
					all = append(all, runner.perRun(row, repeat)/runner.perRun(to, repeat))
				}
				s := statOf(all)
				b.clear()
				fmt.Printf("time: %s members, %d %s to %s: %s, at most %.2f\n", kind, bound.Members, bound.Row, bound.To, s, bound.Most)
				if s.Median > bound.Most {
					over = append(over, fmt.Sprintf("%s members, %d %s to %s: %.3f, at most %.2f", kind, bound.Members, bound.Row, bound.To, s.Median, bound.Most))
				}
			}
		})
	}
	if len(over) > 0 {
		return fmt.Errorf("chains have become slower:\n  %s", strings.Join(over, "\n  "))
	}
	return nil
}
