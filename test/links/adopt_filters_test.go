package links

import (
	"fmt"
	"io/fs"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// filtersLeft is what tc shows.
func filtersLeft(t testing.TB, s *scene.Scene) string {
	t.Helper()
	return s.NS().TC(t, "filter", "show", "dev", s.Dev(), s.Side())
}

// A filter that tc made becomes a member of TCX, which the rest of tc cannot touch.
func TestAdoptFilter(t *testing.T) {
	testenv.Need(t, testenv.FeatureTCX)
	for _, h := range []hook.Hook{hook.TCIngress, hook.TCEgress} {
		t.Run(string(h), func(t *testing.T) {
			s := scene.NewOn(t, h)
			tcx := s.SameOn("tcx" + h[2:])
			tcx.Member(t, 1)
			for n, how := range []string{2: "pref 10 handle 1 bpf da", 3: "pref 20 bpf da", 4: "pref 30 bpf da"} {
				if how != "" {
					s.Filter(t, s.Tracer(t, n), how)
				}
			}
			s.WantRun(t, 1, 2, 3, 4)
			c := s.Read(t)
			qt.Assert(t, qt.HasLen(c.Members, 3))
			ref := func(i int) hook.Ref { return hook.ProgramRef(c.Members[i].Program.ID) }
			adopt := func(entry hook.Ref, o dispatcher.AdoptOptions) (*dispatcher.Link, error) {
				o.BPFFS, o.Entry = s.BPFFS, entry
				link, err := dispatcher.Adopt(t.Context(), s.Target, o)
				if err == nil {
					t.Cleanup(func() { link.Close() })
				}
				return link, err
			}

			_, err := adopt("", dispatcher.AdoptOptions{})
			qt.Check(t, qt.ErrorIs(err, dispatcher.ErrUsage))
			qt.Check(t, qt.ErrorMatches(err, `adopt tc/.*: there are several filters: choose one, id:[0-9]+, id:[0-9]+ or id:[0-9]+`))
			_, err = adopt(ref(1), dispatcher.AdoptOptions{})
			qt.Check(t, qt.ErrorIs(err, dispatcher.ErrUsage))
			qt.Check(t, qt.ErrorMatches(err, fmt.Sprintf(`.*runs before the filters of clsact, and filter %s would be passed over; adopt that one first.*`, ref(0))))
			s.WantRun(t, 1, 2, 3, 4)

			link, err := adopt(ref(0), dispatcher.AdoptOptions{Name: "two", Persistent: true})
			qt.Assert(t, qt.IsNil(err))
			s.WantRun(t, 1, 2, 3, 4)
			qt.Check(t, qt.Equals(scene.Summary(tcx.Read(t)), "1* two*"))
			qt.Check(t, qt.HasLen(s.Read(t).Members, 2))
			qt.Check(t, qt.IsFalse(strings.Contains(filtersLeft(t, s), "pref 10 ")))
			m, err := link.Info(t.Context())
			qt.Assert(t, qt.IsNil(err))
			qt.Check(t, qt.Equals(m.Priority, 50))
			qt.Check(t, qt.IsTrue(m.Protected()))
			qt.Assert(t, qt.IsNil(link.Set(t.Context(), scene.Priority(5)))) // it is one like all others
			s.WantRun(t, 2, 1, 3, 4)
			qt.Assert(t, qt.IsNil(link.Close()))

			_, err = adopt(ref(1), dispatcher.AdoptOptions{})
			qt.Assert(t, qt.IsNil(err))
			last, err := adopt("", dispatcher.AdoptOptions{})
			qt.Assert(t, qt.IsNil(err))
			s.WantRun(t, 2, 1, 3, 4)
			qt.Check(t, qt.Equals(scene.Summary(tcx.Read(t)), "two* 1* ldt_trace_3 ldt_trace_4"))
			qt.Check(t, qt.Equals(strings.TrimSpace(filtersLeft(t, s)), ""))
			_, err = adopt("", dispatcher.AdoptOptions{})
			qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
			s.NS().TC(t, "qdisc", "del", "dev", s.Dev(), "clsact")
			s.WantRun(t, 2, 1, 3, 4)
			qt.Assert(t, qt.IsNil(last.Detach(t.Context())))
			s.WantRun(t, 2, 1, 3)
			tcx.Clear(t)
			s.WantRunSoon(t)
		})
	}
}

// Where there is no TCX, a filter that is adopted stays what it is and gets a name.
func TestFilterAdoptedInPlace(t *testing.T) {
	if testenv.Has(t, testenv.FeatureTCX) {
		t.Skip("needs a kernel without TCX: runs on 5.10 and 6.1, with make test-kernels")
	}
	s := scene.NewOn(t, hook.TCIngress)
	for n, how := range []string{2: "pref 10 handle 1 bpf da", 3: "pref 20 bpf da"} {
		if how != "" {
			s.Filter(t, s.Tracer(t, n), how)
		}
	}
	link := s.Adopt(t, dispatcher.AdoptOptions{
		Name: "two", Persistent: true, Entry: hook.ProgramRef(s.Read(t).Members[0].Program.ID),
	})
	s.WantRun(t, 2, 3)
	m, err := link.Info(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(m.Name, "two"))
	qt.Check(t, qt.IsFalse(m.Protected()))
	qt.Check(t, qt.Equals(m.Filter.Pref, 10))
	qt.Assert(t, qt.IsNil(link.Detach(t.Context())))
	s.WantRun(t, 3)
}

// A filter that would do something else on TCX than where it is stays where it is.
func TestAdoptFilterRefused(t *testing.T) {
	for name, tc := range map[string]struct {
		before  string // another filter
		how     string
		message string
	}{
		"a class":             {"", "pref 10 bpf", ".*not in direct-action mode.*"},
		"IPv4 only":           {"", "protocol ip pref 10 bpf da", ".*protocol.*"},
		"in another chain":    {"", "chain 3 pref 10 bpf da", ".*chain.*"},
		"behind another kind": {"pref 5 u32 match u32 0 0 classid 1:1", "pref 10 bpf da", ".*(pref 5|u32).*"},
	} {
		t.Run(name, func(t *testing.T) {
			if tc.before != "" {
				testenv.Need(t, testenv.FeatureTCX) // else it stays where it is
			}
			s := scene.NewOn(t, hook.TCIngress)
			if tc.before != "" {
				s.AddFilter(t, tc.before)
			}
			prog := testenv.VerdictProgram(t, "ldt_tc", testenv.TCNext, s.On())
			s.Filter(t, prog, tc.how)
			before := filtersLeft(t, s)
			err := tryAdopt(t, s, dispatcher.AdoptOptions{}, prog)
			qt.Assert(t, qt.IsNotNil(err))
			qt.Check(t, qt.ErrorMatches(err, tc.message))
			qt.Check(t, qt.Equals(filtersLeft(t, s), before))
			if testenv.Has(t, testenv.FeatureTCX) {
				qt.Check(t, qt.HasLen(s.SameOn(hook.TCXIngress).Read(t).Members, 0))
			}
		})
	}
}

// Filters of other kinds behind the one that is adopted keep their turn.
func TestAdoptFilterBeforeOthers(t *testing.T) {
	s := scene.NewOn(t, hook.TCIngress)
	s.Filter(t, s.Tracer(t, 2), "pref 10 bpf da")
	s.AddFilter(t, "pref 20 u32 match u32 0 0 classid 1:1")
	s.Filter(t, s.Tracer(t, 3), "pref 30 bpf da") // never comes to its turn
	s.WantRun(t, 2)
	s.Adopt(t, dispatcher.AdoptOptions{Entry: hook.ProgramRef(s.Read(t).Members[0].Program.ID)})
	s.WantRun(t, 2)
	qt.Check(t, qt.StringContains(filtersLeft(t, s), "pref 20 u32"))
}

// A preference has filters of one kind. A member whose priority another kind has gets the next preference; Plan says the same.
func TestFilterBesideAnotherKind(t *testing.T) {
	s := scene.NewOn(t, hook.TCIngress)
	s.AddFilter(t, "pref 50 u32 match u32 0 0 classid 1:1")
	prog := dispatcher.Program(s.Tracer(t, 1))
	o := dispatcher.Options{Name: "one", Persistent: true, BPFFS: s.BPFFS}
	plan, err := dispatcher.Plan(t.Context(), s.Target, prog, o)
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(plan.Member("one").Filter.Pref, 51))
	one, err := dispatcher.Attach(t.Context(), s.Target, prog, o)
	qt.Assert(t, qt.IsNil(err))
	defer one.Close()
	qt.Check(t, qt.Equals(s.Read(t).Member("one").Filter.Pref, 51))
	s.Clear(t)
}
