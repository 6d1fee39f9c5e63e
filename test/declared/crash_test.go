package declared

import (
	"testing"

	"github.com/go-quicktest/qt"
)

// A process that applies may be killed between any two steps: what runs goes on, and the next one finishes the work.
func TestKilled(t *testing.T) {
	s := newStage(t)
	old := s.filter("changed")
	gone := s.other("gone")
	changed := s.filter("changed", "7000")
	changed.Order.Priority = 20
	before, after := s.order(old, gone), s.order(changed, s.filter("new", "7001"))
	after.Prune = true
	for _, step := range []string{"apply: attach", "apply: change", "apply: replaced", "apply: detach", "apply: seal"} {
		t.Run(step, func(t *testing.T) {
			before.Prune = true
			_, err := before.run(t.Context())
			qt.Assert(t, qt.IsNil(err))
			dying := after
			dying.DieAt = step
			p := s.start(t, dying)
			p.Send("")
			qt.Assert(t, qt.ErrorMatches(p.Wait(), "(?s).*signal: killed.*"))
			qt.Check(t, qt.IsTrue(s.drops(t, 7000)))
			_, err = after.run(t.Context())
			qt.Assert(t, qt.IsNil(err))
			s.WantChain(t, "changed* new*")
			qt.Check(t, qt.IsTrue(s.drops(t, 7000)))
			qt.Check(t, qt.IsTrue(s.drops(t, 7001)))
			s.again(t, after)
		})
	}
	s.Clear(t)
}

// Several who apply the same at once end with the same, and nothing twice.
func TestAtOnce(t *testing.T) {
	s := newStage(t)
	first := s.order(s.filter("a"), s.other("b"))
	second := s.order(s.filter("a", "7001"), s.other("b"), s.filter("c", "7002"))
	for _, o := range []struct {
		order
		chain string
	}{{first, "a* b*"}, {second, "a* b* c*"}} {
		one, two := s.start(t, o.order), s.start(t, o.order)
		one.Send("")
		two.Send("")
		qt.Check(t, qt.Not(qt.StringContains(one.Expect(t, "report"), "apply xdp")))
		qt.Check(t, qt.Not(qt.StringContains(two.Expect(t, "report"), "apply xdp")))
		qt.Check(t, qt.IsNil(one.Wait()))
		qt.Check(t, qt.IsNil(two.Wait()))
		chain := s.Read(t)
		qt.Check(t, qt.HasLen(chain.Members, len(o.Attachments)))
		s.again(t, o.order)
	}
	qt.Check(t, qt.IsTrue(s.drops(t, 7001)))
	s.Clear(t)
}
