package watch

import (
	"testing"

	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
)

// An event names a process only when no other process can have done it.
func TestWho(t *testing.T) {
	const create, update, detach = unix.BPF_LINK_CREATE, unix.BPF_LINK_UPDATE, unix.BPF_LINK_DETACH
	at := func(h hook.Hook) hook.EventTarget { return hook.EventTarget{Hook: h} }
	running, pinned, slotted := &hook.Member{}, &hook.Member{Persistent: true}, &hook.Member{SlotID: 9}
	a, b := 11, 12
	bare := uint32(46) // BPF_TCX_INGRESS
	for name, test := range map[string]struct {
		event hook.Event
		calls []call
		pid   int
		call  string
	}{
		"attached":              {hook.Event{Kind: hook.EventAttached, EventTarget: at(tcx), LinkID: 5}, []call{{pid: a, cmd: create, id: 5}, {pid: b, cmd: create, id: 6}}, a, "BPF_LINK_CREATE"},
		"too early":             {hook.Event{Kind: hook.EventAttached, EventTarget: at(tcx), LinkID: 5}, []call{{pid: a, cmd: create, id: 5, at: 1}}, 0, ""},
		"nobody seen":           {hook.Event{Kind: hook.EventAttached, EventTarget: at(tcx), LinkID: 5}, []call{{pid: b, cmd: create, id: 6}}, 0, ""},
		"joined a chain":        {hook.Event{Kind: hook.EventAttached, EventTarget: at(hook.XDP), LinkID: 5, After: slotted}, []call{{pid: a, cmd: update, id: 5}}, a, "BPF_LINK_UPDATE"},
		"two changed the chain": {hook.Event{Kind: hook.EventAttached, EventTarget: at(hook.XDP), LinkID: 5, After: slotted}, []call{{pid: a, cmd: update, id: 5}, {pid: b, cmd: update, id: 5}}, 0, ""},
		"one changed it twice":  {hook.Event{Kind: hook.EventAttached, EventTarget: at(hook.XDP), LinkID: 5, After: slotted}, []call{{pid: a, cmd: update, id: 5}, {pid: a, cmd: update, id: 5}}, a, "BPF_LINK_UPDATE"},
		"slot updated":          {hook.Event{Kind: hook.EventUpdated, EventTarget: at(hook.XDP), LinkID: 5, After: slotted}, []call{{pid: a, cmd: unix.BPF_MAP_UPDATE_ELEM, id: 9}, {pid: b, cmd: update, id: 5}}, a, "BPF_MAP_UPDATE_ELEM"},
		"link updated":          {hook.Event{Kind: hook.EventUpdated, EventTarget: at(tcx), LinkID: 5}, []call{{pid: a, cmd: update, id: 5}}, a, "BPF_LINK_UPDATE"},
		"pinned":                {hook.Event{Kind: hook.EventPinned, EventTarget: at(tcx), LinkID: 5}, []call{{pid: a, cmd: unix.BPF_OBJ_PIN, id: 5, attach: 9}, {pid: b, cmd: unix.BPF_OBJ_PIN, id: 6, attach: 5}}, a, "BPF_OBJ_PIN"},
		"two pinned something":  {hook.Event{Kind: hook.EventPinned, EventTarget: at(tcx), LinkID: 5}, []call{{pid: a, cmd: unix.BPF_OBJ_PIN, id: 5}, {pid: b, cmd: unix.BPF_OBJ_PIN, id: 5}}, 0, ""},
		"detached":              {hook.Event{Kind: hook.EventLeft, EventTarget: at(tcx), LinkID: 5, Before: running}, []call{{pid: a, cmd: detach, id: 5}}, a, "BPF_LINK_DETACH"},
		"its maker ended":       {hook.Event{Kind: hook.EventLeft, EventTarget: at(tcx), LinkID: 5, Before: running}, []call{{pid: a, cmd: create, id: 5, at: 1}, {pid: a, cmd: exit}}, a, "exit"},
		"another ended":         {hook.Event{Kind: hook.EventLeft, EventTarget: at(tcx), LinkID: 5, Before: running}, []call{{pid: a, cmd: create, id: 5, at: 1}, {pid: b, cmd: exit}}, 0, ""},
		"pinned, maker ended":   {hook.Event{Kind: hook.EventLeft, EventTarget: at(tcx), LinkID: 5, Before: pinned}, []call{{pid: a, cmd: create, id: 5, at: 1}, {pid: a, cmd: exit}}, 0, ""},
		"emptied":               {hook.Event{Kind: hook.EventEmptied, EventTarget: at(hook.XDP), LinkID: 5, After: slotted, Before: running}, []call{{pid: a, cmd: unix.BPF_MAP_UPDATE_ELEM, id: 9, at: 1}, {pid: a, cmd: exit}}, a, "exit"},
		"without a link":        {hook.Event{Kind: hook.EventAttached, EventTarget: at(tcx)}, []call{{pid: a, cmd: unix.BPF_PROG_ATTACH, attach: bare}}, a, "BPF_PROG_ATTACH"},
		"twice without a link":  {hook.Event{Kind: hook.EventAttached, EventTarget: at(tcx)}, []call{{pid: a, cmd: unix.BPF_PROG_ATTACH, attach: bare}, {pid: a, cmd: unix.BPF_PROG_ATTACH, attach: bare}}, 0, ""},
		"on another hook":       {hook.Event{Kind: hook.EventAttached, EventTarget: at(tcx)}, []call{{pid: a, cmd: unix.BPF_PROG_ATTACH, attach: bare + 1}}, 0, ""},
		"by netlink":            {hook.Event{Kind: hook.EventAttached, EventTarget: at(hook.XDP)}, []call{{pid: a, cmd: unix.BPF_PROG_ATTACH, attach: bare}}, 0, ""},
		"overtaken":             {hook.Event{Kind: hook.EventOvertaken, EventTarget: at(tcx), LinkID: 5, By: &hook.Member{LinkID: 7}}, []call{{pid: a, cmd: create, id: 7}}, a, "BPF_LINK_CREATE"},
		"moved":                 {hook.Event{Kind: hook.EventMoved, EventTarget: at(tcx)}, []call{{pid: a, cmd: update, id: 5}}, 0, ""},
	} {
		t.Run(name, func(t *testing.T) {
			var c calls
			for i := range test.calls {
				if test.calls[i].at == 0 {
					test.calls[i].at = 100
				}
			}
			c.add(test.calls, false, 50)
			events := []hook.Event{test.event}
			c.explain(events)
			switch who := events[0].Who; {
			case test.pid == 0:
				qt.Check(t, qt.IsNil(who))
			default:
				qt.Assert(t, qt.IsNotNil(who))
				qt.Check(t, qt.Equals(*who, hook.EventProcess{PID: test.pid, Call: test.call}))
			}
		})
	}
}

// A call that explained an event does not explain the next one. When calls were lost,
// none of the others is certain.
func TestWhoOnce(t *testing.T) {
	var c calls
	c.add([]call{{pid: 1, cmd: unix.BPF_LINK_UPDATE, id: 5, at: 100}}, false, 50)
	first, second := []hook.Event{{Kind: hook.EventUpdated, LinkID: 5}}, []hook.Event{{Kind: hook.EventUpdated, LinkID: 5}}
	c.explain(first)
	c.forget(first)
	qt.Check(t, qt.IsNotNil(first[0].Who))
	c.add(nil, false, 60)
	c.explain(second)
	c.forget(second)
	qt.Check(t, qt.IsNil(second[0].Who))
	c.add([]call{{pid: 1, cmd: unix.BPF_LINK_UPDATE, id: 5, at: 100}}, true, 60)
	c.explain(second)
	c.forget(second)
	qt.Check(t, qt.IsNil(second[0].Who))
}
