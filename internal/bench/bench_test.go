package main

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"
)

func TestStatOf(t *testing.T) {
	qt.Check(t, qt.Equals(statOf([]float64{4, 1, 3, 2, 5}), Stat{Median: 3, Q1: 2, Q3: 4, Min: 1, Max: 5, Count: 5}))
	qt.Check(t, qt.Equals(statOf([]float64{2, 1}).Median, 1.5))
	qt.Check(t, qt.Equals(statOf(nil), Stat{}))
}

func TestFigures(t *testing.T) {
	for v, want := range map[float64]string{
		0: "0", 12: "12", 1234567: "1,234,567", -1234: "-1,234", 0.12345: "0.123", 1.2345: "1.23", 12.345: "12.3", 123.45: "123", 1234.5: "1,234",
	} {
		qt.Check(t, qt.Equals(figure(v), want))
	}
	qt.Check(t, qt.Equals(Stat{Median: 10, Q1: 9.5, Q3: 10.5}.String(), "10 ±5%"))
	qt.Check(t, qt.Equals(exactly(10).String(), "10"))
}

func example() *Table {
	t := &Table{Title: "A <title>", Unit: "ns", Axis: "members"}
	for x := 1; x <= 4; x *= 2 {
		t.put("one", x, Stat{Median: float64(10 * x), Q1: float64(9 * x), Q3: float64(11 * x)})
		t.put("other & more", x, exactly(float64(10*x)))
	}
	t.put("alone", 1, exactly(3))
	return t
}

func TestTable(t *testing.T) {
	var b strings.Builder
	align(&b, example().cells())
	qt.Check(t, qt.Equals(b.String(), ""+
		"                        1        2        4\n"+
		"    one           10 ±10%  20 ±10%  40 ±10%\n"+
		"    other & more       10       20       40\n"+
		"    alone               3\n"), qt.Commentf("%s", b.String()))
}

// A plot is XML, and its labels do not overlap.
func TestPlot(t *testing.T) {
	d := xml.NewDecoder(strings.NewReader(plot(example())))
	for {
		_, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		qt.Assert(t, qt.IsNil(err))
	}
	labels := spread([]label{{y: 100}, {y: 101}, {y: 100}, {y: 300}})
	for i, a := range labels {
		for _, b := range labels[:i] {
			qt.Check(t, qt.IsTrue(a.y-b.y >= 14 || b.y-a.y >= 14), qt.Commentf("%v", labels))
		}
	}
}

func TestWrap(t *testing.T) {
	for line := range strings.Lines(wrap(strings.Repeat("some words ", 100))) {
		qt.Check(t, qt.IsTrue(len(line) <= 121), qt.Commentf("%s", line))
	}
	qt.Check(t, qt.Equals(wrap(" a  b "), "a b\n\n"))
}

// A chain that executes one instruction more for each member is reported. A chain within the measuring
// error is not.
func TestCompareCounts(t *testing.T) {
	ten := func(count float64) counts { return counts{"empty": {"slots": {10: count}}} }
	want := expected{Instructions: ten(263)}
	for _, tc := range []struct {
		got   counts
		grown []string
		less  int
	}{
		{ten(264), nil, 0},
		{ten(200), nil, 1},
		{ten(273), []string{"empty members, slots, 10: 273 instructions, expected 263"}, 0},
		{nil, []string{"empty members, slots, 10: not measured"}, 0},
	} {
		grown, less := compareCounts(want, tc.got)
		qt.Check(t, qt.DeepEquals(grown, tc.grown))
		qt.Check(t, qt.Equals(less, tc.less))
	}
	got := ten(273)
	keepLess(got, ten(264))
	qt.Check(t, qt.DeepEquals(got, ten(264)))
}

// The expected counts belong to existing chains.
func TestExpected(t *testing.T) {
	var e expected
	qt.Assert(t, qt.IsNil(json.Unmarshal(expectedJSON, &e)))
	qt.Check(t, qt.IsTrue(len(e.Instructions["empty"]["slots"]) == len(merges) && len(e.Instructions["work"]["sealed"]) == len(merges)))
	qt.Check(t, qt.IsTrue(len(e.Ratios) > 0))
}

func TestJudge(t *testing.T) {
	r := &Report{Sections: []*Section{{Name: "packet", Tables: []*Table{{Name: "empty"}}}}}
	r.Sections[0].Tables[0].put("slots", 10, exactly(30))
	r.Sections[0].Tables[0].put("libxdp's shape", 10, exactly(20))
	r.judge()
	qt.Assert(t, qt.HasLen(r.Results, 1))
	qt.Check(t, qt.Equals(r.Results[0].Got, 1.5))
	qt.Check(t, qt.IsFalse(r.Results[0].Met()))
	qt.Check(t, qt.Not(qt.Equals(r.Results[0].Why, "")))
}
