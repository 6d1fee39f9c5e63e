package hook

import (
	"cmp"
	"fmt"
	"strings"
	"time"
)

// An EventKind says in one word what happened to an entry on a hook.
type EventKind string

const (
	// EventPresent: the entry was there when the watching began, see WatchOptions.First.
	EventPresent EventKind = "present"
	// EventAttached: the entry is new. If Before is set it is the same member again: a
	// closed door that has an owner again, or the same program on another link.
	EventAttached EventKind = "attached"
	// EventLeft: the entry is gone.
	EventLeft EventKind = "left"
	// EventUpdated: another program replaced the entry's program.
	EventUpdated EventKind = "updated"
	// EventReordered: the entry runs at another place among the others, perhaps with
	// a new priority. On TCX and cgroups a member then has a new link. An entry that
	// only has more or fewer entries before it is not reordered.
	EventReordered EventKind = "reordered"
	// EventSet: the entry has other settings, at the same place.
	EventSet EventKind = "set"
	// EventEmptied: the owner of a member of an XDP chain has gone, and its slot is
	// empty. The member leaves the chain with the next change.
	EventEmptied EventKind = "emptied"
	// EventDefunct: the device or cgroup is gone, or the link was detached, and the entry's
	// link still exists.
	EventDefunct EventKind = "defunct"
	// EventDisplaced: a holder of the link of an XDP chain has replaced the chain by a
	// program.
	EventDisplaced EventKind = "displaced"
	// EventMoved: the device has another name, or is in another network namespace.
	// There is one event for each hook, without an entry; From is where the hook was.
	// Target is empty when the device left the namespace that WatchOptions.NetNS names.
	EventMoved EventKind = "moved"
	// EventPinned and EventUnpinned: the member became persistent, or is not
	// persistent any more.
	EventPinned   EventKind = "pinned"
	EventUnpinned EventKind = "unpinned"
	// EventAdopted: a program that was attached without a link became a member.
	EventAdopted EventKind = "adopted"
	// EventNamed: a link has a first or another name. With its first
	// name a foreign entry becomes a member.
	EventNamed EventKind = "named"
	// EventOvertaken: an entry that is not a member, and so has no priority, now runs
	// before this member and did not before: By. Only the first member behind that
	// entry gets an event.
	EventOvertaken EventKind = "overtaken"
	// EventExtended: freplace has replaced a function by a program, Extension. The
	// function is the entry program's, or the dispatcher's when the event is not about
	// an entry. EventRestored: the function runs again.
	EventExtended EventKind = "extended"
	EventRestored EventKind = "restored"
	// EventUnreadable: a hook could be read before and cannot be read now: Err. With an
	// empty Hook, this concerns a whole namespace or cgroup. Its entries count as
	// unchanged.
	EventUnreadable EventKind = "unreadable"
	// EventMissed: a source that wakes the watcher overflowed: Err. What is attached
	// is known all the same. What came and went meanwhile may be missing, and so may
	// the process in Who.
	EventMissed EventKind = "missed"
)

// An Event is one change on one hook.
type Event struct {
	// Time is when the change was noticed, which is after it happened.
	Time time.Time `json:"time"`
	Kind EventKind `json:"event"`
	// EventTarget is where it happened; for a target that is gone, where it was.
	EventTarget
	// From is where the hook was before EventMoved; else nil.
	From *EventTarget `json:"from,omitempty"`
	// Entry is the kind of the entry, and Name its name; empty when the event is not
	// about an entry.
	Entry Kind   `json:"kind,omitempty"`
	Name  string `json:"name"`
	// Before is the entry as it was, nil for a new entry. After is the entry as it is,
	// nil for an entry that is gone.
	Before *Member `json:"before"`
	After  *Member `json:"after"`
	// LinkID is the link that holds the entry: on XDP the chain's link, else the
	// entry's own. 0 without a link.
	LinkID uint32 `json:"link_id,omitempty"`
	// PositionBefore and PositionAfter are the entry's place on the hook in run order,
	// from 1. Entries is how many entries are there now.
	PositionBefore int `json:"position_before,omitempty"`
	PositionAfter  int `json:"position_after,omitempty"`
	Entries        int `json:"entries"`
	// By is the entry that overtook a member, for EventOvertaken.
	By *Member `json:"by,omitempty"`
	// Twin is an entry that runs the same program for the same packets or calls as the
	// entry that was attached, one of both being a member: the program runs twice. Nil
	// when there is none.
	Twin *Member `json:"twin,omitempty"`
	// Extension is what EventExtended and EventRestored are about; else nil.
	Extension *Extension `json:"extension,omitempty"`
	// Who is the process that did it, when that is certain; else nil.
	Who *EventProcess `json:"who,omitempty"`
	// Err says why, for EventUnreadable and EventMissed.
	Err string `json:"error,omitempty"`
}

// An EventTarget is the hook and the target of an event. The fields are as in
// [Chain]; all are empty when the event is about more than one target.
type EventTarget struct {
	Hook     Hook   `json:"hook"`
	Target   string `json:"target"`
	Ifindex  int    `json:"ifindex"`
	CgroupID uint64 `json:"cgroup_id,omitempty"`
	NetNS    NetNS  `json:"netns"`
}

// An EventProcess is a process that caused an event by a system call or by its end.
// It may have ended since.
type EventProcess struct {
	PID  int    `json:"pid"`  // as the initial pid namespace has it
	Comm string `json:"comm"` // of the process
	// Call is the command of bpf(2), as BPF_LINK_CREATE; or "exit".
	Call string `json:"call"`
}

// WatchSources say for each source of signs why it is not heard; nil means that it is
// heard.
type WatchSources struct {
	Netlink  error // rtnetlink: devices, XDP by netlink, filters
	Pins     error // inotify: pins in the bpffs
	Calls    error // bpf(2), and the end of processes that attached something; these tell which process it was
	Programs error // programs that are loaded and freed
}

// String returns the event in one line, with the local time:
//
//	15:04:05.123 tcx/ingress eth0: "count" attached, number 2 of 3, program count_tc 41 (by pid 812 dispatcher, BPF_LINK_CREATE)
func (e Event) String() string {
	parts := []string{e.subject()}
	switch e.Kind {
	case EventMoved:
		parts = append(parts, "was "+e.From.String())
	case EventReordered:
		parts = append(parts, fmt.Sprintf("number %d of %d, was %d", e.PositionAfter, e.Entries, e.PositionBefore))
	case EventExtended, EventRestored:
		parts = append(parts, e.Extension.String())
	case EventOvertaken:
		parts = append(parts, fmt.Sprintf("by %s (%s)", e.By.Ref(), e.By.Kind), fmt.Sprintf("number %d of %d", e.PositionAfter, e.Entries))
	case EventLeft, EventDefunct, EventEmptied:
		parts = append(parts, fmt.Sprint("was number ", e.PositionBefore))
	case EventPresent, EventAttached, EventAdopted:
		parts = append(parts, fmt.Sprintf("number %d of %d", e.PositionAfter, e.Entries))
	}
	if e.Before != nil && e.After != nil {
		parts = append(parts, differences(e.Before, e.After)...)
	}
	parts = append(parts, e.programs()...)
	if e.Twin != nil {
		parts = append(parts, fmt.Sprintf("runs twice: it is the program of %s (%s) too", e.Twin.Ref(), e.Twin.Kind))
	}
	if e.Err != "" {
		parts = append(parts, e.Err)
	}
	line := fmt.Sprintf("%s %s: %s", e.Time.Local().Format("15:04:05.000"), e.EventTarget, strings.Join(parts, ", "))
	if e.Who != nil {
		line += fmt.Sprintf(" (by pid %d %s, %s)", e.Who.PID, e.Who.Comm, e.Who.Call)
	}
	return oneLine(line)
}

// subject says what the event is about, and what happened to it.
func (e *Event) subject() string {
	switch e.Entry {
	case "":
		return string(e.Kind)
	case KindMember:
		return fmt.Sprintf("%q %s", e.Name, e.Kind)
	}
	return fmt.Sprintf("%q (%s) %s", e.Name, e.Entry, e.Kind)
}

// programs names the program that runs or ran.
func (e *Event) programs() []string {
	words := func(p Program) string {
		return fmt.Sprintf("%s %d", cmp.Or(p.Name, "-"), p.ID)
	}
	var was, is Program
	if e.Before != nil {
		was = e.Before.Program
	}
	if e.After != nil {
		is = e.After.Program
	}
	switch {
	case e.Kind == EventUpdated && was.ID != 0:
		return []string{"program " + words(is) + ", was " + words(was)}
	case is.ID != 0:
		return []string{"program " + words(is)}
	case was.ID != 0:
		return []string{"program " + words(was)}
	}
	return nil
}

// differences returns the settings that differ, in words.
func differences(before, after *Member) (list []string) {
	add := func(name string, was, is any) {
		if was != is {
			list = append(list, fmt.Sprintf("%s %v, was %v", name, is, was))
		}
	}
	add("name", before.Name, after.Name)
	if before.Kind == after.Kind {
		add("priority", before.Priority, after.Priority)
		add("continue-on", before.ContinueOn, after.ContinueOn)
		add("on-missing", before.OnMissing, after.OnMissing)
	}
	return list
}

// String returns the hook and its target in words, with the network namespace
// where that has a name.
func (t EventTarget) String() string {
	var words string
	switch h := t.Hook; {
	case h == "" && t.NetNS.Inode == 0:
		return "watch"
	case h == "":
	case h.OnNetNS():
		words = string(h)
	case h.OnCgroup() && t.Target == "" && t.CgroupID == 0:
		words = fmt.Sprintf("%s (on no cgroup)", h)
	case h.OnCgroup() && t.Target == "":
		words = fmt.Sprintf("%s (cgroup id %d)", h, t.CgroupID)
	case h.OnDevice() && t.Ifindex == 0:
		words = strings.TrimSpace(fmt.Sprintf("%s %s", h, t.Target)) + " elsewhere"
	default:
		words = strings.TrimSpace(fmt.Sprintf("%s %s", h, t.Target))
	}
	if t.NetNS.Name != "" {
		words += " netns " + t.NetNS.Name
	}
	return strings.TrimSpace(words)
}
