package hook

import (
	"testing"
	"time"

	"github.com/go-quicktest/qt"
)

func TestEventString(t *testing.T) {
	eth0 := EventTarget{Hook: TCXIngress, Target: "eth0", Ifindex: 2, NetNS: NetNS{Inode: 1}}
	blue := eth0
	blue.NetNS.Name = "blue"
	group := EventTarget{Hook: CgroupConnect4, CgroupID: 7}
	prog := func(id uint32) Program { return Program{ID: id, Name: "count"} }
	ours := func(name string, priority int, id uint32) *Member {
		return &Member{Kind: KindMember, Name: name, Settings: Settings{Priority: priority}, Program: prog(id)}
	}
	theirs := &Member{Kind: KindForeign, LinkID: 9, Program: Program{ID: 4}}
	for want, e := range map[string]Event{
		`tcx/ingress eth0: "a" attached, number 2 of 3, program count 41 (by pid 812 app, BPF_LINK_CREATE)`: {
			Kind: EventAttached, EventTarget: eth0, Entry: KindMember, Name: "a", After: ours("a", 50, 41), PositionAfter: 2, Entries: 3,
			Who: &EventProcess{PID: 812, Comm: "app", Call: "BPF_LINK_CREATE"},
		},
		`tcx/ingress eth0 netns blue: "a" updated, program count 42, was count 41`: {
			Kind: EventUpdated, EventTarget: blue, Entry: KindMember, Name: "a", Before: ours("a", 50, 41), After: ours("a", 50, 42), PositionAfter: 1, Entries: 1,
		},
		`tcx/ingress eth0: "a" reordered, number 2 of 2, was 1, priority 60, was 50, program count 41`: {
			Kind: EventReordered, EventTarget: eth0, Entry: KindMember, Name: "a", Before: ours("a", 50, 41), After: ours("a", 60, 41), PositionBefore: 1, PositionAfter: 2, Entries: 2,
		},
		`tcx/ingress eth0: "a" overtaken, by link:9 (foreign), number 2 of 2, program count 41`: {
			Kind: EventOvertaken, EventTarget: eth0, Entry: KindMember, Name: "a", After: ours("a", 50, 41), By: theirs, PositionAfter: 2, Entries: 2,
		},
		`cgroup/connect4 (cgroup id 7): "-" (foreign) left, was number 1, program - 4`: {
			Kind: EventLeft, EventTarget: group, Entry: KindForeign, Name: "-", Before: theirs, PositionBefore: 1,
		},
		`cgroup/connect4 (on no cgroup): "a" defunct, was number 1, program count 41`: {
			Kind: EventDefunct, EventTarget: EventTarget{Hook: CgroupConnect4}, Entry: KindMember, Name: "a", Before: ours("a", 50, 41), PositionBefore: 1,
		},
		`tcx/ingress elsewhere: moved, was tcx/ingress eth0`: {
			Kind: EventMoved, EventTarget: EventTarget{Hook: TCXIngress}, From: &eth0,
		},
		`watch: missed, ring buffer full`: {Kind: EventMissed, Err: "ring\nbuffer full"},
	} {
		e.Time = time.Date(2026, 11, 29, 15, 4, 5, 123e6, time.Local)
		qt.Check(t, qt.Equals(e.String(), "15:04:05.123 "+want))
	}
}
