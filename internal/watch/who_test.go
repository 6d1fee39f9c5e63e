package watch

import (
	"testing"

	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
)

// Who did it is said only when it can have been nobody else.
func TestWho(t *testing.T) {
	const create, update, detach = unix.BPF_LINK_CREATE, unix.BPF_LINK_UPDATE, unix.BPF_LINK_DETACH
	at := func(h hook.Hook) Place { return Place{Hook: h} }
	running, pinned := &hook.Member{}, &hook.Member{Persistent: true}
	a, b := 11, 12
	bare := uint32(46) // BPF_TCX_INGRESS
	for name, test := range map[string]struct {
		event Event
		calls []call
		pid   int
		call  string
	}{
		"attached":              {Event{Kind: Attached, Place: at(tcx), LinkID: 5}, []call{{pid: a, cmd: create, id: 5}, {pid: b, cmd: create, id: 6}}, a, "BPF_LINK_CREATE"},
		"too early":             {Event{Kind: Attached, Place: at(tcx), LinkID: 5}, []call{{pid: a, cmd: create, id: 5, at: 1}}, 0, ""},
		"nobody seen":           {Event{Kind: Attached, Place: at(tcx), LinkID: 5}, []call{{pid: b, cmd: create, id: 6}}, 0, ""},
		"joined a chain":        {Event{Kind: Attached, Place: at(hook.XDP), LinkID: 5, slot: 9}, []call{{pid: a, cmd: update, id: 5}}, a, "BPF_LINK_UPDATE"},
		"two changed the chain": {Event{Kind: Attached, Place: at(hook.XDP), LinkID: 5, slot: 9}, []call{{pid: a, cmd: update, id: 5}, {pid: b, cmd: update, id: 5}}, 0, ""},
		"one changed it twice":  {Event{Kind: Attached, Place: at(hook.XDP), LinkID: 5, slot: 9}, []call{{pid: a, cmd: update, id: 5}, {pid: a, cmd: update, id: 5}}, a, "BPF_LINK_UPDATE"},
		"slot updated":          {Event{Kind: Updated, Place: at(hook.XDP), LinkID: 5, slot: 9}, []call{{pid: a, cmd: unix.BPF_MAP_UPDATE_ELEM, id: 9}, {pid: b, cmd: update, id: 5}}, a, "BPF_MAP_UPDATE_ELEM"},
		"link updated":          {Event{Kind: Updated, Place: at(tcx), LinkID: 5}, []call{{pid: a, cmd: update, id: 5}}, a, "BPF_LINK_UPDATE"},
		"pinned":                {Event{Kind: Pinned, Place: at(tcx), LinkID: 5}, []call{{pid: a, cmd: unix.BPF_OBJ_PIN}, {pid: a, cmd: unix.BPF_OBJ_PIN}}, a, "BPF_OBJ_PIN"},
		"two pinned something":  {Event{Kind: Pinned, Place: at(tcx), LinkID: 5}, []call{{pid: a, cmd: unix.BPF_OBJ_PIN}, {pid: b, cmd: unix.BPF_OBJ_PIN}}, 0, ""},
		"detached":              {Event{Kind: Left, Place: at(tcx), LinkID: 5, Before: running}, []call{{pid: a, cmd: detach, id: 5}}, a, "BPF_LINK_DETACH"},
		"its maker ended":       {Event{Kind: Left, Place: at(tcx), LinkID: 5, Before: running}, []call{{pid: a, cmd: create, id: 5, at: 1}, {pid: a, cmd: exit}}, a, "exit"},
		"another ended":         {Event{Kind: Left, Place: at(tcx), LinkID: 5, Before: running}, []call{{pid: a, cmd: create, id: 5, at: 1}, {pid: b, cmd: exit}}, 0, ""},
		"pinned, maker ended":   {Event{Kind: Left, Place: at(tcx), LinkID: 5, Before: pinned}, []call{{pid: a, cmd: create, id: 5, at: 1}, {pid: a, cmd: exit}}, 0, ""},
		"emptied":               {Event{Kind: Emptied, Place: at(hook.XDP), LinkID: 5, slot: 9, Before: running}, []call{{pid: a, cmd: unix.BPF_MAP_UPDATE_ELEM, id: 9, at: 1}, {pid: a, cmd: exit}}, a, "exit"},
		"without a link":        {Event{Kind: Attached, Place: at(tcx)}, []call{{pid: a, cmd: unix.BPF_PROG_ATTACH, attach: bare}}, a, "BPF_PROG_ATTACH"},
		"twice without a link":  {Event{Kind: Attached, Place: at(tcx)}, []call{{pid: a, cmd: unix.BPF_PROG_ATTACH, attach: bare}, {pid: a, cmd: unix.BPF_PROG_ATTACH, attach: bare}}, 0, ""},
		"on another hook":       {Event{Kind: Attached, Place: at(tcx)}, []call{{pid: a, cmd: unix.BPF_PROG_ATTACH, attach: bare + 1}}, 0, ""},
		"by netlink":            {Event{Kind: Attached, Place: at(hook.XDP)}, []call{{pid: a, cmd: unix.BPF_PROG_ATTACH, attach: bare}}, 0, ""},
		"overtaken":             {Event{Kind: Overtaken, Place: at(tcx), LinkID: 5, By: &hook.Member{LinkID: 7}}, []call{{pid: a, cmd: create, id: 7}}, a, "BPF_LINK_CREATE"},
		"moved":                 {Event{Kind: Moved, Place: at(tcx)}, []call{{pid: a, cmd: update, id: 5}}, 0, ""},
	} {
		t.Run(name, func(t *testing.T) {
			var c calls
			for i := range test.calls {
				if test.calls[i].at == 0 {
					test.calls[i].at = 100
				}
			}
			c.add(test.calls, false, 50)
			events := []Event{test.event}
			c.explain(events)
			switch who := events[0].Who; {
			case test.pid == 0:
				qt.Check(t, qt.IsNil(who))
			default:
				qt.Assert(t, qt.IsNotNil(who))
				qt.Check(t, qt.Equals(*who, Process{PID: test.pid, Call: test.call}))
			}
		})
	}
}

// A call that explained an event does not explain the next one; and when some were
// lost none of the others is certain.
func TestWhoOnce(t *testing.T) {
	var c calls
	c.add([]call{{pid: 1, cmd: unix.BPF_LINK_UPDATE, id: 5, at: 100}}, false, 50)
	first, second := []Event{{Kind: Updated, LinkID: 5}}, []Event{{Kind: Updated, LinkID: 5}}
	c.explain(first)
	qt.Check(t, qt.IsNotNil(first[0].Who))
	c.add(nil, false, 60)
	c.explain(second)
	qt.Check(t, qt.IsNil(second[0].Who))
	c.add([]call{{pid: 1, cmd: unix.BPF_LINK_UPDATE, id: 5, at: 100}}, true, 60)
	c.explain(second)
	qt.Check(t, qt.IsNil(second[0].Who))
}
