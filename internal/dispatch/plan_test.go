package dispatch_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
)

// names lists the slots in run order, each with its priority.
func names(p *dispatch.Plan) string {
	var words []string
	for _, s := range p.Slots {
		words = append(words, fmt.Sprintf("%s:%d", s.Name, s.Priority))
	}
	return strings.Join(words, " ")
}

// plan inserts slots, written as [names] writes them, in that order.
func plan(t testing.TB, slots string) *dispatch.Plan {
	t.Helper()
	p := &dispatch.Plan{Shape: dispatch.Plain}
	for i, word := range strings.Fields(slots) {
		name, priority, _ := strings.Cut(word, ":")
		s := dispatch.Slot{MapID: uint32(i + 1), Name: name}
		_, err := fmt.Sscan(priority, &s.Priority)
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.IsNil(p.Insert(s, hook.Position{}, 0)))
	}
	return p
}

// Lower priorities run first, and of equals the one that came first. Programs
// that know nothing of each other rely on that order.
func TestInsert(t *testing.T) {
	for _, tc := range []struct{ arrivals, order string }{
		{"", ""},
		{"a:50", "a:50"},
		{"a:50 b:50 c:50", "a:50 b:50 c:50"},
		{"a:3 b:2 c:1", "c:1 b:2 a:3"},
		{"a:50 b:10 c:50 d:10 e:90 f:50", "b:10 d:10 a:50 c:50 f:50 e:90"},
		{"a:65535 b:1 c:65535", "b:1 a:65535 c:65535"},
	} {
		p := plan(t, tc.arrivals)
		qt.Check(t, qt.Equals(names(p), tc.order), qt.Commentf("%s", tc.arrivals))
		for i, s := range p.Slots {
			qt.Check(t, qt.Equals(p.Index(s.MapID), i))
			qt.Check(t, qt.Equals(p.Named(s.Name), i))
		}
	}
}

func TestRemove(t *testing.T) {
	p := plan(t, "a:1 b:2 c:3")
	qt.Assert(t, qt.Equals(p.Named("none"), -1))
	qt.Assert(t, qt.Equals(p.Index(99), -1))
	p.Remove(1)
	qt.Assert(t, qt.Equals(names(p), "a:1 c:3"))
	qt.Assert(t, qt.Equals(p.Named("b"), -1))
	p.Remove(1)
	p.Remove(0)
	qt.Assert(t, qt.Equals(names(p), ""))
}

// A member that changes anything but its priority must keep its index.
func TestSet(t *testing.T) {
	for _, tc := range []struct {
		member   string
		priority int
		order    string
	}{
		{"b", 50, "a:50 b:50 c:50 d:90"},
		{"b", 10, "b:10 a:50 c:50 d:90"},
		{"b", 90, "a:50 c:50 d:90 b:90"},
		{"d", 50, "a:50 b:50 c:50 d:50"},
		{"d", 91, "a:50 b:50 c:50 d:91"},
		{"a", 51, "b:50 c:50 a:51 d:90"},
	} {
		p := plan(t, "a:50 b:50 c:50 d:90")
		settings := hook.Settings{Priority: tc.priority, ContinueOn: hook.Never, OnMissing: hook.MissingDrop}
		p.Set(p.Named(tc.member), settings)
		qt.Check(t, qt.Equals(names(p), tc.order), qt.Commentf("%s to %d", tc.member, tc.priority))
		qt.Check(t, qt.Equals(p.Slots[p.Named(tc.member)].Settings, settings))
	}
}

// A refused insert leaves the plan unchanged.
func TestInsertRefuses(t *testing.T) {
	p := plan(t, "a:50 b:50")
	qt.Assert(t, qt.ErrorMatches(p.Insert(dispatch.Slot{MapID: 9, Name: "b"}, hook.Position{}, 0), `there is a member "b" already`))
	qt.Assert(t, qt.Equals(names(p), "a:50 b:50"))

	for i := len(p.Slots); i < hook.MaxMembers; i++ {
		qt.Assert(t, qt.IsNil(p.Insert(dispatch.Slot{MapID: uint32(100 + i), Name: fmt.Sprint(i)}, hook.Position{}, 0)))
	}
	err := p.Insert(dispatch.Slot{MapID: 999, Name: "one too many"}, hook.Position{}, 0)
	qt.Assert(t, qt.ErrorIs(err, hook.ErrChainFull))
	qt.Assert(t, qt.HasLen(p.Slots, hook.MaxMembers))
	p.Remove(0)
	qt.Assert(t, qt.IsNil(p.Insert(dispatch.Slot{MapID: 999, Name: "now it fits"}, hook.Position{}, 0)))
}

func TestShapeString(t *testing.T) {
	qt.Assert(t, qt.Equals(dispatch.Plain.String(), "attach type BPF_XDP, without frags"))
	qt.Assert(t, qt.Equals(dispatch.Shape{Frags: true}.String(), "no expected attach type, with frags"))
}
