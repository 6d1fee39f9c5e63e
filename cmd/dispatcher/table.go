package main

import (
	"cmp"
	"strconv"
	"strings"
	"unicode/utf8"
)

// A cell of a table; color may be empty.
type cell struct{ text, color string }

func heads(texts ...string) []cell {
	cells := make([]cell, 0, len(texts))
	for _, t := range texts {
		cells = append(cells, cell{text: t})
	}
	return cells
}

func number(n uint32) cell {
	if n == 0 {
		return cell{text: "-"}
	}
	return cell{text: strconv.FormatUint(uint64(n), 10)}
}

func yes(b bool) cell {
	if b {
		return cell{text: "yes"}
	}
	return cell{text: "no"}
}

func orDash(s string) string { return cmp.Or(s, "-") }

// printTable writes rows to stdout.
func (a *app) printTable(rows [][]cell) error {
	var b strings.Builder
	a.table(&b, "", rows)
	return a.print(b.String())
}

// table writes rows. Columns are as wide as needed, and no spaces follow the
// last cell of a line.
func (a *app) table(b *strings.Builder, indent string, rows [][]cell) {
	var widths []int
	for _, r := range rows {
		for i, c := range r {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(c.text))
		}
	}
	for _, r := range rows {
		b.WriteString(indent)
		for i, c := range r {
			b.WriteString(a.paint(a.stdout, c.text, c.color))
			if i < len(r)-1 {
				b.WriteString(strings.Repeat(" ", widths[i]-utf8.RuneCountInString(c.text)+2))
			}
		}
		b.WriteByte('\n')
	}
}
