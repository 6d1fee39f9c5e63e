package target_test

import (
	"io/fs"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// entry is an Entry as a family has it.
type entry struct{ target.Entry }

// order makes an order of entries.
func order(entries ...target.Entry) (o target.Order[entry]) {
	for _, e := range entries {
		o = append(o, entry{e})
	}
	return o
}

// said returns the text and the hints of an error, as a user reads both.
func said(err error) string {
	if err == nil {
		return ""
	}
	return strings.TrimPrefix(hook.Wrap("", "", "", err).Error(), ": ")
}

var (
	early   = target.Entry{Program: 11, Link: 1, Name: "early", Priority: 10}
	late    = target.Entry{Program: 12, Link: 2, Name: "late", Priority: 90, Stays: true}
	foreign = target.Entry{Program: 13, Link: 3}
	legacy  = target.Entry{Program: 14}
	gone    = target.Entry{Program: 15, Link: 5, Name: "moved", Priority: 20, Leaving: true}
	moved   = target.Entry{Program: 15, Link: 6, Name: "moved", Priority: 95}
)

func TestOrderFind(t *testing.T) {
	o := order(early, foreign, legacy, gone, late, moved)
	for _, test := range []struct {
		ref  hook.Ref
		i    int
		text string
	}{
		{"early", 0, ""},
		{"late", 4, ""},
		{"moved", 5, ""}, // not the entry that is leaving
		{"link:3", 1, ""},
		{"link:5", 3, ""}, // by its link the leaving entry is found
		{"id:14", 2, ""},
		{"id:15", 3, ""},
		{"", -1, `there is no "" (there are: early, link:3, id:14, moved, late, moved)`},
		{"other", -1, `there is no "other" (there are: early, link:3, id:14, moved, late, moved)`},
		{"link:11", -1, `there is no "link:11" (there are: early, link:3, id:14, moved, late, moved)`},
		{"id:1", -1, `there is no "id:1" (there are: early, link:3, id:14, moved, late, moved)`},
	} {
		i, err := o.Find(test.ref)
		qt.Check(t, qt.Equals(i, test.i), qt.Commentf("%s", test.ref))
		qt.Check(t, qt.Equals(said(err), test.text))
		if test.text != "" {
			qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
		}
	}
	_, err := order().Find("early")
	qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
	qt.Check(t, qt.Equals(said(err), `there is no "early": nothing is attached`))
}

// A member that is leaving has given its name away, and an empty name is nobody's.
func TestOrderNamed(t *testing.T) {
	qt.Check(t, qt.Equals(order(foreign, early).Named("early"), 1))
	qt.Check(t, qt.Equals(order(gone).Named("moved"), -1))
	qt.Check(t, qt.Equals(order(gone, moved).Named("moved"), 1))
	qt.Check(t, qt.Equals(order(foreign, legacy).Named(""), -1))
}

func TestOrderWithout(t *testing.T) {
	o := order(early, foreign, late)
	qt.Check(t, qt.DeepEquals(o.Without(1), order(early, late)))
	qt.Check(t, qt.DeepEquals(o, order(early, foreign, late))) // it is left as it was
}

func TestOrderJoin(t *testing.T) {
	const exists = `there is a member "early" already; choose another name, or replace its program`
	for _, test := range []struct {
		about    string
		order    target.Order[entry]
		req      target.Request
		defaults hook.Settings
		i        int
		name     string
		priority int
		text     string
		is       []error
		isNot    error
	}{
		{about: "the program's name and the default priority", order: order(early, late), i: 1, name: "prog", priority: 50},
		{about: "the program's own priority", order: order(early, late), defaults: hook.Settings{Priority: 5}, i: 0, name: "prog", priority: 5},
		{about: "a priority that was asked for", order: order(early, late), req: target.Request{Settings: hook.Settings{Priority: 95}},
			defaults: hook.Settings{Priority: 5}, i: 2, name: "prog", priority: 95},
		{about: "a name", req: target.Request{Name: "mine"}, i: 0, name: "mine", priority: 50},
		{about: "without members it goes behind all", order: order(foreign, legacy), i: 2, name: "prog", priority: 50},
		{about: "before all, with a priority that fits", order: order(early, late), req: target.Request{Position: hook.Position{First: true}}, i: 0, name: "prog", priority: 10},
		{about: "behind all", order: order(early, late, foreign), req: target.Request{Position: hook.Position{Last: true}}, i: 3, name: "prog", priority: 90},
		{about: "before an entry", order: order(early, foreign, late), req: target.Request{Position: hook.Position{Before: "link:3"}}, i: 1, name: "prog", priority: 50},
		{about: "behind an entry", order: order(early, foreign, late), req: target.Request{Position: hook.Position{After: "id:13"}}, i: 2, name: "prog", priority: 50},
		{about: "an entry that is leaving has no priority", order: order(early, foreign, target.Entry{Name: "old", Priority: 15, Leaving: true}, late),
			req: target.Request{Settings: hook.Settings{Priority: 20}}, i: 1, name: "prog", priority: 20},
		{about: "the name of one that is leaving is free", order: order(gone), req: target.Request{Name: "moved"}, i: 1, name: "moved", priority: 50},
		{about: "the name of a member that leaves with its owner", order: order(early), req: target.Request{Name: "early"},
			text: exists, is: []error{fs.ErrExist, target.ErrTaken}},
		{about: "the name of a member that stays", order: order(late), req: target.Request{Name: "late"},
			text: strings.Replace(exists, "early", "late", 1), is: []error{fs.ErrExist}, isNot: target.ErrTaken},
		{about: "beside an entry that is not there", order: order(early), req: target.Request{Position: hook.Position{After: "nobody"}},
			text: `there is no "nobody" (there are: early)`, is: []error{fs.ErrNotExist}},
		{about: "a priority that does not fit the position", order: order(early, late),
			req:  target.Request{Settings: hook.Settings{Priority: 50}, Position: hook.Position{First: true}},
			text: "priority 50 does not fit there: the members before and after it have 1 and 10; give a position or a priority, not both", is: []error{hook.ErrUsage}},
	} {
		t.Run(test.about, func(t *testing.T) {
			i, name, priority, err := test.order.Join(&load.Loaded{Name: "prog", Defaults: test.defaults}, test.req)
			qt.Assert(t, qt.Equals(said(err), test.text))
			for _, is := range test.is {
				qt.Check(t, qt.ErrorIs(err, is))
			}
			if test.isNot != nil {
				qt.Check(t, qt.Not(qt.ErrorIs(err, test.isNot)))
			}
			if err == nil {
				qt.Check(t, qt.Equals(i, test.i))
				qt.Check(t, qt.Equals(name, test.name))
				qt.Check(t, qt.Equals(priority, test.priority))
			}
		})
	}
}

func TestOrderMove(t *testing.T) {
	middle := target.Entry{Program: 16, Link: 4, Name: "middle", Priority: 50}
	o := order(early, middle, foreign, late)
	for _, test := range []struct {
		about       string
		i           int
		to          hook.Position
		asked       int
		j, priority int // j is an index among the other entries
		text        string
	}{
		{about: "another priority at the same place", i: 1, asked: 60, j: 1, priority: 60},
		{about: "as high as its neighbour's", i: 1, asked: 90, j: 1, priority: 90},
		{about: "down", i: 1, asked: 91, j: 3, priority: 91},
		{about: "up", i: 1, asked: 9, j: 0, priority: 9},
		{about: "up past one", i: 3, asked: 20, j: 1, priority: 20},
		{about: "before an entry", i: 3, to: hook.Position{Before: "middle"}, j: 1, priority: 50},
		{about: "before the first", i: 3, to: hook.Position{First: true}, j: 0, priority: 10},
		{about: "behind the last", i: 0, to: hook.Position{Last: true}, j: 3, priority: 90},
		{about: "behind an entry of another tool", i: 0, to: hook.Position{After: "link:3"}, j: 2, priority: 50},
		{about: "before itself", i: 1, to: hook.Position{Before: "middle"}, text: `there is no "middle" (there are: early, link:3, late)`},
	} {
		t.Run(test.about, func(t *testing.T) {
			j, priority, err := o.Move(test.i, test.to, test.asked)
			qt.Assert(t, qt.Equals(said(err), test.text))
			if err == nil {
				qt.Check(t, qt.Equals(j, test.j))
				qt.Check(t, qt.Equals(priority, test.priority))
			}
		})
	}
}

// What is no member, and what is leaving, limits no priority.
func TestOrderFit(t *testing.T) {
	for _, test := range []struct {
		order           target.Order[entry]
		i, asked, fits  int
		refused         bool
		indexFor, lands int
	}{
		{order: order(early, late), i: 1, asked: 0, fits: 50, indexFor: 50, lands: 1},
		{order: order(early, late), i: 0, asked: 0, fits: 10, indexFor: 9, lands: 0},
		{order: order(early, late), i: 2, asked: 0, fits: 90, indexFor: 90, lands: 2},
		{order: order(early, late), i: 1, asked: 91, refused: true, indexFor: 91, lands: 2},
		{order: order(foreign, legacy, gone), i: 3, asked: 7, fits: 7, indexFor: 7, lands: 3},
		{order: order(target.Entry{Name: "pinned without a record"}), i: 0, asked: 0, fits: 50, indexFor: 1, lands: 1},
	} {
		fits, err := test.order.Fit(test.i, test.asked)
		qt.Check(t, qt.Equals(err != nil, test.refused))
		qt.Check(t, qt.Equals(fits, test.fits))
		qt.Check(t, qt.Equals(test.order.IndexFor(test.indexFor), test.lands))
	}
}

// What is named is chosen, and without a name what alone is free.
func TestOrderChoose(t *testing.T) {
	other := target.Entry{Program: 16}
	free := func(e entry) bool { return e.Link == 0 }
	for _, test := range []struct {
		o    target.Order[entry]
		ref  hook.Ref
		i    int
		text string
	}{
		{order(early, legacy), "", 1, ""},
		{order(early, legacy), "early", 0, ""},
		{order(legacy, other), "id:16", 1, ""},
		{order(early), "", -1, ""},
		{nil, "", -1, ""},
		{order(legacy, early, other), "", -1, "there are several: choose one, id:14 or id:16"},
		{order(legacy, other, early, other), "", -1, "there are several: choose one, id:14, id:16 or id:16"},
		{order(early), "id:14", -1, `there is no "id:14" (there are: early)`},
	} {
		i, err := test.o.Choose(test.ref, free, "there are several")
		qt.Check(t, qt.Equals(said(err), test.text))
		qt.Check(t, qt.Equals(i, test.i))
	}
}

// All members are detached, or what is named; what is no member only by force.
func TestOrderDetach(t *testing.T) {
	for _, test := range []struct {
		o     target.Order[entry]
		ref   hook.Ref
		force bool
		gone  string
		text  string
	}{
		{order(early, foreign, late), "", false, "early late", ""},
		{order(early, foreign, late), "late", false, "late", ""},
		{order(early, foreign), "link:3", true, "link:3", ""},
		{order(early, foreign), "", true, "early", ""},
		{order(early, foreign), "link:3", false, "", "link:3 is in the way"},
		{order(legacy, foreign), "", true, "", "id:14 is in the way"},
		{nil, "", false, "", "nothing is attached"},
		{nil, "early", false, "", `there is no "early": nothing is attached`},
	} {
		var gone []string
		refuse := func(e entry) error { return hook.Because(hook.ErrBusy, "%s is in the way", e.Entry) }
		err := test.o.Detach(test.ref, test.force, refuse, func(e entry) error { gone = append(gone, e.String()); return nil })
		qt.Check(t, qt.Equals(said(err), test.text))
		qt.Check(t, qt.Equals(strings.Join(gone, " "), test.gone))
	}
}
