package main

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// A Report is the result of one run, and the content of bin/bench.json.
type Report struct {
	Version  int        `json:"version"`
	Command  string     `json:"command"`
	Date     string     `json:"date"`
	Machine  Machine    `json:"machine"`
	Sections []*Section `json:"sections"`
	Results  []Result   `json:"results,omitempty"`
}

// A Section answers one question.
type Section struct {
	Name    string   `json:"name"`
	Title   string   `json:"title"`
	About   []string `json:"about"`   // paragraphs: what is measured, and how
	Command string   `json:"command"` // runs this section alone
	Tables  []*Table `json:"tables"`
	Notes   []string `json:"notes,omitempty"` // other results
	Seconds float64  `json:"seconds"`
	Failed  string   `json:"failed,omitempty"` // why there are no figures
}

// A Table has a row for each compared thing, and a column for each size.
type Table struct {
	Name  string `json:"name"`
	Title string `json:"title"`
	Unit  string `json:"unit"`
	Axis  string `json:"axis,omitempty"` // what the columns count; empty: there is one column
	// Labels are the headings of columns that count nothing.
	Labels []string `json:"labels,omitempty"`
	Rows   []*Row   `json:"rows"`
	Plot   bool     `json:"plot,omitempty"`
}

// A Row is one of the compared things.
type Row struct {
	Name  string `json:"name"`
	About string `json:"about,omitempty"`
	Cells []Cell `json:"cells"`
}

// A Cell is a figure of the column X.
type Cell struct {
	X int `json:"x"`
	Stat
}

// A Result is the ratio that was measured for a goal.
type Result struct {
	Name string  `json:"name"`
	Got  float64 `json:"got"`
	Most float64 `json:"most"`
	Why  string  `json:"why,omitempty"` // why the goal is missed
}

// Met says whether the goal is reached.
func (r Result) Met() bool { return r.Got <= r.Most }

// table adds a table to the section.
func (s *Section) table(t Table) *Table {
	s.Tables = append(s.Tables, &t)
	return &t
}

// find returns the table of that name, or nil.
func (r *Report) find(section, table string) *Table {
	for _, s := range r.Sections {
		for _, t := range s.Tables {
			if s.Name == section && t.Name == table {
				return t
			}
		}
	}
	return nil
}

// put adds a figure.
func (t *Table) put(row string, x int, s Stat) {
	i := slices.IndexFunc(t.Rows, func(r *Row) bool { return r.Name == row })
	if i < 0 {
		i = len(t.Rows)
		t.Rows = append(t.Rows, &Row{Name: row})
	}
	t.Rows[i].Cells = append(t.Rows[i].Cells, Cell{x, s})
}

// get returns a figure if it exists.
func (t *Table) get(row string, x int) (Stat, bool) {
	if t == nil {
		return Stat{}, false
	}
	for _, r := range t.Rows {
		for _, c := range r.Cells {
			if r.Name == row && c.X == x {
				return c.Stat, true
			}
		}
	}
	return Stat{}, false
}

// columns returns the table's sizes.
func (t *Table) columns() []int {
	var xs []int
	for _, r := range t.Rows {
		for _, c := range r.Cells {
			if !slices.Contains(xs, c.X) {
				xs = append(xs, c.X)
			}
		}
	}
	slices.Sort(xs)
	return xs
}

// cells returns the table as text, the headings first.
func (t *Table) cells() [][]string {
	xs := t.columns()
	head := []string{""}
	for _, x := range xs {
		switch {
		case len(t.Labels) > 0:
			head = append(head, t.Labels[x])
		case t.Axis == "":
			head = append(head, t.Unit)
		default:
			head = append(head, strconv.Itoa(x))
		}
	}
	lines := [][]string{head}
	for _, r := range t.Rows {
		line := []string{r.Name}
		for _, x := range xs {
			s, ok := t.get(r.Name, x)
			if !ok {
				line = append(line, "")
				continue
			}
			line = append(line, s.String())
		}
		lines = append(lines, line)
	}
	return lines
}

// String returns the median, and half the distance between the quartiles.
func (s Stat) String() string {
	text := figure(s.Median)
	if s.Q3 > s.Q1 && s.Median != 0 {
		if half := 100 * (s.Q3 - s.Q1) / 2 / math.Abs(s.Median); half >= 0.5 {
			text += fmt.Sprintf(" ±%.0f%%", half)
		}
	}
	return text
}

// figure writes three significant digits, or all digits of a whole number.
func figure(v float64) string {
	switch a := math.Abs(v); {
	case v == math.Trunc(v):
		return grouped(strconv.FormatFloat(v, 'f', 0, 64))
	case a >= 100:
		return grouped(strconv.FormatFloat(v, 'f', 0, 64))
	case a >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	case a >= 1:
		return strconv.FormatFloat(v, 'f', 2, 64)
	}
	return strconv.FormatFloat(v, 'g', 3, 64)
}

// grouped puts commas into a whole number.
func grouped(digits string) string {
	sign := ""
	if strings.HasPrefix(digits, "-") {
		sign, digits = "-", digits[1:]
	}
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	return sign + digits
}

// title names the table and the unit of its figures.
func (t *Table) title() string {
	text := t.Title + ", " + t.Unit
	if t.Axis != "" {
		text += ", by " + t.Axis
	}
	return text
}

// print shows the section on a terminal.
func (s *Section) print(w io.Writer) {
	fmt.Fprintf(w, "\n%s (%s, %.0f s)\n", s.Title, s.Command, s.Seconds)
	if s.Failed != "" {
		fmt.Fprintf(w, "  no figures: %s\n", s.Failed)
	}
	for _, t := range s.Tables {
		fmt.Fprintf(w, "\n  %s\n", t.title())
		align(w, t.cells())
	}
	for _, n := range s.Notes {
		fmt.Fprintf(w, "\n  %s\n", n)
	}
}

// align prints columns: the first one aligned to the left, the others to the
// right.
func align(w io.Writer, lines [][]string) {
	widths := map[int]int{}
	for _, line := range lines {
		for i, cell := range line {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	for _, line := range lines {
		var b strings.Builder
		for i, cell := range line {
			gap := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell))
			if i == 0 {
				b.WriteString("  " + cell + gap)
			} else {
				b.WriteString("  " + gap + cell)
			}
		}
		fmt.Fprintf(w, "  %s\n", strings.TrimRight(b.String(), " "))
	}
}
