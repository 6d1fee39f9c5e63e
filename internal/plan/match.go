package plan

import (
	"path"
	"slices"

	"github.com/libdispatcher/dispatcher/declare"
)

// A Device is what a Match looks at.
type Device struct {
	Name     string
	AltNames []string
	Driver   string // needed only if the match asks for one
	Kind     string // empty for one without
	Loopback bool
	Upper    bool // another device is on top of it
}

// Matches tells whether a device matches in all that the match asks for.
func Matches(m *declare.Match, d *Device) bool {
	kind := d.Kind
	switch {
	case d.Loopback:
		kind = "loopback"
	case kind == "":
		kind = "physical"
	}
	return oneOf(m.Names, append([]string{d.Name}, d.AltNames...)...) && oneOf(m.Driver, d.Driver) && oneOf(m.Kind, kind) && (m.Role == "" || !d.Upper)
}

// oneOf tells whether one of the words matches one of the patterns; without patterns all do.
func oneOf(patterns []string, words ...string) bool {
	return len(patterns) == 0 || slices.ContainsFunc(patterns, func(p string) bool {
		return slices.ContainsFunc(words, func(w string) bool {
			ok, _ := path.Match(p, w)
			return ok
		})
	})
}
