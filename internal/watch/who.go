package watch

import (
	"slices"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// A call is a successful call of bpf(2), or the end of a process.
type call struct {
	pid    int
	comm   string
	cmd    uint32
	id     uint32 // id of the link or slot that the call was about
	attach uint32 // attach type, for calls that name a hook; of a pin, the id if it is of a slot
	at     uint64 // time by the kernel's clock
	used   bool   // the call explains an event
}

// A subject is the link or slot that a call was about.
type subject struct{ link, slot uint32 }

// slotOf returns the slot of the member of a chain that an event is about, or 0.
func slotOf(e *hook.Event) uint32 {
	switch {
	case e.After != nil:
		return e.After.SlotID
	case e.Before != nil:
		return e.Before.SlotID
	}
	return 0
}

// kernelClock returns the time as bpf_ktime_get_ns does.
func kernelClock() uint64 {
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &now)
	return uint64(now.Nano())
}

// calls are those that may explain the events of a look.
type calls struct {
	list   []call
	makers map[subject]int // the processes that made a link or first filled a slot
	since  uint64          // the beginning of the last look
}

// add takes the calls that were traced since the last time. It drops calls from before
// since, the beginning of the last look, because that look has shown their effect; but
// the end of a process takes effect later. When calls were lost, none of the others is
// certain to be the cause.
func (c *calls) add(news []call, lost bool, since uint64) {
	c.since = since
	c.list = slices.DeleteFunc(c.list, func(x call) bool { return x.used || x.at+uint64(recent) < since })
	c.list = append(c.list, news...)
	if lost {
		c.list, c.makers = nil, nil
	}
	if c.makers == nil || len(c.makers) > most {
		c.makers = map[subject]int{}
	}
	for _, x := range news {
		s := subject{slot: x.id}
		switch x.cmd {
		case unix.BPF_LINK_CREATE:
			c.makers[subject{link: x.id}] = x.pid
		case unix.BPF_MAP_UPDATE_ELEM:
			if _, known := c.makers[s]; !known {
				c.makers[s] = x.pid
			}
		}
	}
}

// explain sets the process that caused each event, where that is certain.
func (c *calls) explain(events []hook.Event) {
	for i := range events {
		if e := &events[i]; e.Who == nil {
			e.Who = c.who(e, events)
		}
	}
}

// forget drops the makers of what has left: a link or slot that is gone does not come back.
func (c *calls) forget(events []hook.Event) {
	for _, e := range events {
		if e.Kind == hook.EventLeft || e.Kind == hook.EventEmptied || e.Kind == hook.EventDefunct {
			delete(c.makers, subject{slot: slotOf(&e)})
			if e.Hook != hook.XDP {
				delete(c.makers, subject{link: e.LinkID})
			}
		}
	}
}

func (c *calls) who(e *hook.Event, all []hook.Event) *hook.EventProcess {
	const create, update, detach = unix.BPF_LINK_CREATE, unix.BPF_LINK_UPDATE, unix.BPF_LINK_DETACH
	link, xdp := e.LinkID, e.Hook == hook.XDP
	switch e.Kind {
	case hook.EventAttached, hook.EventAdopted, hook.EventSet, hook.EventReordered:
		switch {
		case link != 0 && xdp:
			return c.one(c.about(link, create, update))
		case link != 0:
			return c.one(c.about(link, create))
		}
		return c.bare(e, all, unix.BPF_PROG_ATTACH)
	case hook.EventUpdated:
		switch {
		case slotOf(e) != 0:
			return c.one(c.about(slotOf(e), unix.BPF_MAP_UPDATE_ELEM))
		case link != 0:
			return c.one(c.about(link, update))
		}
		return c.bare(e, all, unix.BPF_PROG_ATTACH)
	case hook.EventOvertaken:
		if e.By.LinkID != 0 {
			return c.one(c.about(e.By.LinkID, create))
		}
	case hook.EventExtended:
		return c.one(c.about(e.Extension.LinkID, create))
	case hook.EventPinned:
		return c.one(c.matching(func(x call) bool {
			return x.cmd == unix.BPF_OBJ_PIN && (xdp && x.attach == slotOf(e) || !xdp && x.id == link)
		}))
	case hook.EventEmptied:
		return c.ended(e)
	case hook.EventLeft:
		by := c.about(link, detach)
		if xdp {
			by = c.about(link, update, detach)
		}
		switch {
		case link == 0:
			return c.bare(e, all, unix.BPF_PROG_DETACH)
		case len(by) > 0:
			return c.one(by)
		}
		return c.ended(e)
	}
	return nil
}

// awaitsCall tells whether a call of bpf(2) that was not traced yet may have caused the event.
func awaitsCall(e hook.Event) bool {
	switch e.Kind {
	case hook.EventAttached, hook.EventAdopted, hook.EventSet, hook.EventReordered, hook.EventUpdated,
		hook.EventOvertaken, hook.EventExtended, hook.EventPinned, hook.EventLeft:
		return e.Who == nil && e.Hook.Family() != "tc" && (e.Hook != hook.XDP || e.LinkID != 0)
	}
	return false
}

func (c *calls) matching(fits func(call) bool) (list []*call) {
	for i := range c.list {
		x := &c.list[i]
		if fits(*x) && x.at >= c.since {
			list = append(list, x)
		}
	}
	return list
}

// about returns the calls about a link or slot.
func (c *calls) about(id uint32, cmds ...uint32) []*call {
	return c.matching(func(x call) bool { return id != 0 && x.id == id && slices.Contains(cmds, x.cmd) })
}

// bare finds the process that attached or detached a program without a link. There must
// be one such call and one such event. A change through netlink makes no such call.
func (c *calls) bare(e *hook.Event, all []hook.Event, cmd uint32) *hook.EventProcess {
	at := kernel.KindOf(e.Hook).Attach
	if e.Hook == hook.XDP || e.Hook.Family() == "tc" {
		return nil
	}
	for i := range all {
		if o := &all[i]; o != e && o.Hook == e.Hook && o.LinkID == 0 {
			return nil
		}
	}
	list := c.matching(func(x call) bool { return x.cmd == cmd && x.attach == uint32(at) })
	if len(list) != 1 {
		return nil
	}
	return c.one(list)
}

// ended returns the process that made the entry, if that process has just ended. A
// pinned entry does not leave with its maker.
func (c *calls) ended(e *hook.Event) *hook.EventProcess {
	s := subject{link: e.LinkID}
	if slot := slotOf(e); slot != 0 {
		s = subject{slot: slot}
	}
	pid, known := c.makers[s]
	if !known || e.Before == nil || e.Before.Persistent {
		return nil
	}
	for _, x := range c.list {
		if x.cmd == exit && x.pid == pid {
			return &hook.EventProcess{PID: x.pid, Comm: x.comm, Call: "exit"}
		}
	}
	return nil
}

// one returns the process of the calls if all calls are by the same process.
func (c *calls) one(list []*call) *hook.EventProcess {
	if len(list) == 0 {
		return nil
	}
	for _, x := range list {
		if x.pid != list[0].pid {
			return nil
		}
	}
	for _, x := range list {
		x.used = true
	}
	last := list[len(list)-1]
	return &hook.EventProcess{PID: last.pid, Comm: last.comm, Call: commandNames[last.cmd]}
}

var commandNames = map[uint32]string{
	unix.BPF_MAP_UPDATE_ELEM: "BPF_MAP_UPDATE_ELEM",
	unix.BPF_OBJ_PIN:         "BPF_OBJ_PIN",
	unix.BPF_PROG_ATTACH:     "BPF_PROG_ATTACH",
	unix.BPF_PROG_DETACH:     "BPF_PROG_DETACH",
	unix.BPF_LINK_CREATE:     "BPF_LINK_CREATE",
	unix.BPF_LINK_UPDATE:     "BPF_LINK_UPDATE",
	unix.BPF_LINK_DETACH:     "BPF_LINK_DETACH",
}
