package dispatcher

import (
	"context"
	"iter"
	"time"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/watch"
)

// An EventKind is what happened to an entry on a hook, in one word.
type EventKind string

const (
	// EventPresent: it was there when the watching began, see WatchOptions.First.
	EventPresent EventKind = "present"
	// EventAttached: it has come. With Before, as the same member: a closed door
	// that has an owner again, or the same program by another link.
	EventAttached EventKind = "attached"
	// EventLeft: it has gone.
	EventLeft EventKind = "left"
	// EventUpdated: another program has its place.
	EventUpdated EventKind = "updated"
	// EventReordered: it runs at another place among the others, which may be by a
	// new priority. On TCX and cgroups a member has a new link then. That others
	// came or went before it is not an event of its own.
	EventReordered EventKind = "reordered"
	// EventSet: it has other settings, at the same place; or what an attachment
	// without priorities has in their stead.
	EventSet EventKind = "set"
	// EventEmptied: the owner of a member of an XDP chain has gone, and its slot is
	// empty. It leaves the chain with the next change.
	EventEmptied EventKind = "emptied"
	// EventDefunct: its device or cgroup has gone, and its link is still there.
	EventDefunct EventKind = "defunct"
	// EventDisplaced: whoever holds the link of an XDP chain has put a program in
	// the place of the chain.
	EventDisplaced EventKind = "displaced"
	// EventMoved: the device has another name, or is in another network namespace.
	// One for each hook, without an entry; From is where it was. Target is empty
	// when the device has left the namespace that WatchOptions.NetNS names.
	EventMoved EventKind = "moved"
	// EventPinned and EventUnpinned: the member became persistent, or is so no more.
	EventPinned   EventKind = "pinned"
	EventUnpinned EventKind = "unpinned"
	// EventAdopted: a program that was attached without a link became a member.
	EventAdopted EventKind = "adopted"
	// EventNamed: a link got another name in the registry, or has one for the first
	// time: with that an entry that was foreign is a member.
	EventNamed EventKind = "named"
	// EventOvertaken: an entry that is not a member, and so has no priority, runs
	// before this member now, and did not before: By. One event for the first of
	// the members behind it.
	EventOvertaken EventKind = "overtaken"
	// EventUnreadable: a hook, or with an empty Hook a whole namespace or cgroup,
	// could be read before and cannot now: Err. What was there counts as unchanged.
	EventUnreadable EventKind = "unreadable"
	// EventMissed: something that wakes the watcher overflowed: Err. What is
	// attached is known all the same; what came and went in the meantime, and who
	// did it, may not be.
	EventMissed EventKind = "missed"
)

// An EventPlace is where a hook is. The fields are those of hook.Chain.
type EventPlace struct {
	Hook     hook.Hook
	Target   string
	NetNS    hook.NetNS
	Ifindex  int
	CgroupID uint64
}

// An Event is one change on one hook.
type Event struct {
	// Time is when it was noticed, which is after it happened: see [Watch].
	Time time.Time
	Kind EventKind
	// EventPlace is where; where it was, once that is gone.
	EventPlace
	// From is where the hook was before EventMoved; else nil.
	From *EventPlace
	// Entry is what the entry is, and Name how it is called; empty when the event
	// is not about an entry.
	Entry hook.Kind
	Name  string
	// Before and After are the entry as it was and as it is; nil when it was not
	// there, and when it is no more.
	Before, After *hook.Member
	// LinkID is the link that holds the entry: on XDP that of the chain, else its
	// own. 0 when it has none.
	LinkID uint32
	// PositionBefore and PositionAfter are its place on the hook in run order, from
	// 1, and Entries is how many there are now.
	PositionBefore, PositionAfter, Entries int
	// By is the entry that overtook a member, for EventOvertaken.
	By *hook.Member
	// Who did it, when that is certain; else nil.
	Who *EventProcess
	// Err says why, for EventUnreadable and EventMissed.
	Err string
}

// An EventProcess is a process whose system call, or whose end, is an event's
// cause. It may have ended since.
type EventProcess struct {
	PID  int
	Comm string
	// Call is the command of bpf(2), as BPF_LINK_CREATE; or "exit".
	Call string
}

// WatchOptions say what to watch, and how. The zero value watches everything.
type WatchOptions struct {
	// NetNS, Hooks and BPFFS choose the hooks as in [ListOptions].
	NetNS string
	Hooks []hook.Hook
	BPFFS string
	// Interval is how often to look when no sign of a change has come. Default:
	// one second.
	Interval time.Duration
	// First reports what is attached at the start, as EventPresent.
	First bool
	// Started is called when the first look is done: what changes from then on is
	// reported. It gets what the watching relies on.
	Started func(WatchSources)
	// IntervalOnly looks at intervals only, and listens to nothing.
	IntervalOnly bool
}

// WatchSources say which signs of a change are heard: nil, or why not.
type WatchSources struct {
	Netlink  error // rtnetlink: devices, XDP by netlink, filters
	Pins     error // inotify: pins in the bpffs
	Calls    error // bpf(2), and the end of processes that attached something; these tell who it was
	Programs error // programs that are loaded and freed
}

// Watch reports what changes on the hooks that [List] lists, until ctx ends or
// the loop does. It looks at the machine and compares: at every interval, and
// soon after each sign of a change that the kernel gives, see [WatchSources].
// So an event is late, but what is reported is true, and each state that lasts
// as long as an interval is reported. What came and went between two looks is not.
//
// Events with a sign were 11 to 28 ms late (the medians, by what happened), and 36
// ms at most; those without, as when a link is closed whose program stays loaded,
// up to an interval (BenchmarkWatchLate, Linux 6.18, 2 CPUs). To hear calls of
// bpf(2) costs every system call of the machine 0.05 µs, see
// WatchOptions.IntervalOnly.
//
// The only error is that nothing could be read at the start, and it ends the
// loop; the end of ctx is none.
//
// Watching changes nothing. A look opens what is attached for a moment, so that
// what its owner lets go in that moment leaves when the look is over.
func Watch(ctx context.Context, o WatchOptions) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		wo := watch.Options{
			Options: scanned(o.NetNS, o.Hooks, o.BPFFS), Interval: o.Interval, First: o.First, Quiet: o.IntervalOnly,
		}
		if wo.Interval <= 0 {
			wo.Interval = time.Second
		}
		if o.Started != nil {
			wo.Ready = func(s watch.Sources) { o.Started(WatchSources(s)) }
		}
		err := watch.Run(ctx, wo, func(e watch.Event) bool { return yield(eventOf(e), nil) })
		if err != nil {
			yield(Event{}, wrap("watch", Target{NetNS: o.NetNS}, err))
		}
	}
}

func eventOf(e watch.Event) Event {
	return Event{
		Time: e.Time, Kind: EventKind(e.Kind), EventPlace: EventPlace(e.Place), From: (*EventPlace)(e.From),
		Entry: e.Entry, Name: e.Name, Before: e.Before, After: e.After, LinkID: e.LinkID,
		PositionBefore: e.PositionBefore, PositionAfter: e.PositionAfter, Entries: e.Entries,
		By: e.By, Who: (*EventProcess)(e.Who), Err: e.Err,
	}
}
