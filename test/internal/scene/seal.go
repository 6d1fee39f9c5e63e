package scene

import (
	"strings"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
)

// NewSealScene is [New] with tracers that can be sealed.
func NewSealScene(t testing.TB) *Scene {
	t.Helper()
	s := New(t)
	s.Coded = true
	return s
}

// Seal seals the chain and compares what became of the members: "1 2(reason)", reasons being patterns.
func (s *Scene) Seal(t testing.TB, want string, reasons ...string) {
	t.Helper()
	report, err := dispatcher.Seal(t.Context(), s.Target, dispatcher.SealOptions{BPFFS: s.BPFFS})
	qt.Assert(t, qt.IsNil(err))
	WantSealing(t, report, want, reasons...)
	var sealed []string
	for _, r := range report {
		if r.Sealed {
			sealed = append(sealed, r.Member)
		}
	}
	s.WantSealed(t, sealed...)
}

// WantSealing compares a report: the members in order, with an exclamation mark those that stay in their slots, for
// the reasons given in order.
func WantSealing(t testing.TB, report []hook.Sealing, want string, reasons ...string) {
	t.Helper()
	var words, why []string
	for _, r := range report {
		word := r.Member
		if !r.Sealed {
			word += "!"
			why = append(why, r.Reason)
		}
		qt.Check(t, qt.Equals(r.Sealed, r.Reason == ""), qt.Commentf("%+v", r))
		words = append(words, word)
	}
	qt.Assert(t, qt.Equals(strings.Join(words, " "), want), qt.Commentf("%q", why))
	qt.Assert(t, qt.HasLen(why, len(reasons)))
	for i, reason := range reasons {
		qt.Check(t, qt.Matches(why[i], reason))
	}
}

// Unseal makes all members run from their slots again.
func (s *Scene) Unseal(t testing.TB) {
	t.Helper()
	qt.Assert(t, qt.IsNil(dispatcher.Unseal(t.Context(), s.Target, dispatcher.ReadOptions{BPFFS: s.BPFFS})))
	s.WantSealed(t)
}

// WantSealed compares which members are linked into the dispatcher, by what Read says.
func (s *Scene) WantSealed(t testing.TB, names ...string) {
	t.Helper()
	qt.Assert(t, qt.DeepEquals(SealedNames(s.Read(t)), names))
}

// SealedNames are the members that are linked into the dispatcher.
func SealedNames(c *hook.Chain) (names []string) {
	for _, m := range c.Members {
		if m.Sealed {
			names = append(names, m.Name)
		}
	}
	return names
}
