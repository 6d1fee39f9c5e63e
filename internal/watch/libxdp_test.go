package watch

import (
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
)

// onLibxdp returns a chain of libxdp on a device. dispatcher is the id of its program:
// with another dispatcher all members have other links.
func onLibxdp(dispatcher uint32, entries ...string) hook.Chain {
	c := at(hook.XDP, "eth0", entries...)
	c.Style, c.DispatcherID = hook.StyleLibxdp, dispatcher
	for i := range c.Members {
		m := &c.Members[i]
		m.Kind, m.SlotID, m.LinkID = hook.KindLibxdp, 0, dispatcher*10+uint32(i)
	}
	return c
}

// A change of a chain of libxdp makes a new dispatcher, with new links for all
// members. Only the change is reported.
func TestDiffLibxdp(t *testing.T) {
	two := onLibxdp(1, "a:10=41*", "b:20=42*")
	for name, test := range map[string]struct {
		before, after hook.Chain
		want          []hook.EventKind
	}{
		"nothing":  {two, onLibxdp(2, "a:10=41*", "b:20=42*"), nil},
		"joined":   {two, onLibxdp(2, "a:10=41*", "c:15=43*", "b:20=42*"), []hook.EventKind{hook.EventAttached}},
		"left":     {two, onLibxdp(2, "b:20=42*"), []hook.EventKind{hook.EventLeft}},
		"set":      {two, onLibxdp(2, "a:15=41*", "b:20=42*"), []hook.EventKind{hook.EventSet}},
		"replaced": {two, onLibxdp(2, "a:10=44*", "b:20=42*"), []hook.EventKind{hook.EventUpdated}},
		"ordered":  {two, onLibxdp(2, "b:20=42*", "a:30=41*"), []hook.EventKind{hook.EventReordered}},
		"emptied":  {two, onLibxdp(2), []hook.EventKind{hook.EventLeft, hook.EventLeft}},
	} {
		var got []hook.EventKind
		for _, e := range Diff(look(test.before), look(test.after)) {
			got = append(got, e.Kind)
		}
		qt.Check(t, qt.DeepEquals(got, test.want), qt.Commentf("%s", name))
	}
}
