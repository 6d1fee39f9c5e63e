package main

import (
	"fmt"
	"html"
	"math"
	"strings"
)

// The size of a plot, and its margins.
const (
	plotWidth, plotHeight  = 720, 400
	plotLeft, plotTop      = 60, 44
	plotRight, plotBottom  = 190, 50
	plotAcross, plotUpward = plotWidth - plotLeft - plotRight, plotHeight - plotTop - plotBottom
)

// style has colours that are distinct on white and on black, also for colour-blind readers (Okabe and
// Ito's, without yellow).
const style = `<style>
  text { font: 12px sans-serif; fill: #24292f }
  .title { font-size: 14px; font-weight: bold }
  .grid { stroke: #d0d7de; stroke-width: 1 }
  .s { fill: none; stroke-width: 2 }
  .band { opacity: 0.15; stroke: none }
  .c0 { stroke: #0072b2; fill: #0072b2 } .c1 { stroke: #d55e00; fill: #d55e00 } .c2 { stroke: #009e73; fill: #009e73 }
  .c3 { stroke: #cc79a7; fill: #cc79a7 } .c4 { stroke: #56b4e9; fill: #56b4e9 } .c5 { stroke: #e69f00; fill: #e69f00 }
  .c6 { stroke: #7f7f7f; fill: #7f7f7f } .c7 { stroke: #8c6bb1; fill: #8c6bb1 }
  text.l { stroke: none }
  @media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .grid { stroke: #3d444d } }
</style>
`

const colours = 8

// plot draws the rows of a table as lines, with a band around each for the middle half of the
// samples.
func plot(t *Table) string {
	xs := t.columns()
	top := 0.0
	for _, r := range t.Rows {
		for _, c := range r.Cells {
			top = max(top, c.Q3)
		}
	}
	step := tick(top)
	top = math.Ceil(top/step) * step
	last := float64(xs[len(xs)-1])
	across := func(x int) float64 { return plotLeft + float64(x)/last*plotAcross }
	upward := func(y float64) float64 { return plotTop + plotUpward - y/top*plotUpward }

	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" role="img" aria-label="%s">`+"\n", plotWidth, plotHeight, html.EscapeString(t.title()))
	b.WriteString(style)
	text := func(x, y float64, anchor, class, s string) {
		fmt.Fprintf(&b, `<text x="%.1f" y="%.1f" text-anchor="%s" class="%s">%s</text>`+"\n", x, y, anchor, class, html.EscapeString(s))
	}
	text(plotLeft, 22, "start", "title", t.title())
	for y := 0.0; y <= top+step/2; y += step {
		fmt.Fprintf(&b, `<line x1="%d" x2="%d" y1="%.1f" y2="%.1f" class="grid"/>`+"\n", plotLeft, plotLeft+plotAcross, upward(y), upward(y))
		text(plotLeft-8, upward(y)+4, "end", "", figure(y))
	}
	for _, x := range xs {
		text(across(x), plotTop+plotUpward+20, "middle", "", fmt.Sprint(x))
	}
	text(plotLeft+plotAcross/2, plotHeight-10, "middle", "", t.Axis)

	var labels []label
	for i, r := range t.Rows {
		if len(r.Cells) < 2 {
			continue
		}
		var line, above, below []string
		for _, c := range r.Cells {
			line = append(line, fmt.Sprintf("%.1f,%.1f", across(c.X), upward(c.Median)))
			above = append(above, fmt.Sprintf("%.1f,%.1f", across(c.X), upward(c.Q3)))
			below = append([]string{fmt.Sprintf("%.1f,%.1f", across(c.X), upward(c.Q1))}, below...)
		}
		fmt.Fprintf(&b, `<polygon points="%s %s" class="band c%d"/>`+"\n", strings.Join(above, " "), strings.Join(below, " "), i%colours)
		fmt.Fprintf(&b, `<polyline points="%s" class="c%d s" style="fill:none"/>`+"\n", strings.Join(line, " "), i%colours)
		for _, c := range r.Cells {
			fmt.Fprintf(&b, `<circle cx="%.1f" cy="%.1f" r="3" class="c%d"/>`+"\n", across(c.X), upward(c.Median), i%colours)
		}
		end := r.Cells[len(r.Cells)-1]
		labels = append(labels, label{across(end.X) + 8, upward(end.Median) + 4, r.Name, i % colours})
	}
	for _, l := range spread(labels) {
		fmt.Fprintf(&b, `<text x="%.1f" y="%.1f" class="l c%d">%s</text>`+"\n", l.x, l.y, l.colour, html.EscapeString(l.text))
	}
	b.WriteString("</svg>\n")
	return b.String()
}

// tick returns the distance of grid lines, 1, 2 or 5 and zeros, for about four to eight
// lines up to top.
func tick(top float64) float64 {
	if top <= 0 {
		return 1
	}
	step := math.Pow(10, math.Floor(math.Log10(top)))
	for _, f := range []float64{0.1, 0.2, 0.5, 1} {
		if top/(step*f) <= 8 {
			return step * f
		}
	}
	return step
}

// A label names a line at its end.
type label struct {
	x, y   float64
	text   string
	colour int
}

// spread moves labels apart that would overlap.
func spread(labels []label) []label {
	const apart = 14
	for range 100 {
		moved := false
		for i := range labels {
			for j := range labels {
				a, b := &labels[i], &labels[j]
				if i == j || math.Abs(a.x-b.x) > 100 || math.Abs(a.y-b.y) >= apart || a.y > b.y || a.y == b.y && i > j {
					continue
				}
				a.y, b.y, moved = a.y-1, b.y+1, true
			}
		}
		if !moved {
			break
		}
	}
	return labels
}
