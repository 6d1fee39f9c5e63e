package watch

import (
	"time"

	"github.com/libdispatcher/dispatcher/hook"
)

// A Kind is what happened, in one word.
type Kind string

// The root package says what they mean.
const (
	Present    Kind = "present"
	Attached   Kind = "attached"
	Left       Kind = "left"
	Updated    Kind = "updated"
	Reordered  Kind = "reordered"
	Set        Kind = "set"
	Emptied    Kind = "emptied"
	Defunct    Kind = "defunct"
	Displaced  Kind = "displaced"
	Moved      Kind = "moved"
	Pinned     Kind = "pinned"
	Unpinned   Kind = "unpinned"
	Adopted    Kind = "adopted"
	Named      Kind = "named"
	Overtaken  Kind = "overtaken"
	Unreadable Kind = "unreadable"
	Missed     Kind = "missed"
)

// A Place is where a hook is.
type Place struct {
	Hook     hook.Hook
	Target   string
	NetNS    hook.NetNS
	Ifindex  int
	CgroupID uint64
}

func placeOf(c *hook.Chain) Place {
	return Place{c.Hook, c.Target, c.NetNS, c.Ifindex, c.CgroupID}
}

// target is what does not change while a device or cgroup stays where it is.
func (p Place) target() target {
	return target{netnsOf(p.NetNS), p.Ifindex, p.CgroupID}
}

// A target is a device, a cgroup or a network namespace.
type target struct {
	netns    uint64
	ifindex  int
	cgroupID uint64
}

// netnsOf is one number for a namespace. Inodes come round, cookies do not, but
// old kernels have none. The two do not meet: inodes of namespaces are large.
func netnsOf(ns hook.NetNS) uint64 {
	if ns.Cookie != 0 {
		return ns.Cookie
	}
	return ns.Inode
}

// An Event is one change.
type Event struct {
	Time time.Time
	Kind Kind
	Place
	From   *Place // of Moved
	Entry  hook.Kind
	Name   string
	Before *hook.Member
	After  *hook.Member
	// Places among the entries of the hook, from 1, and how many there are.
	PositionBefore, PositionAfter, Entries int

	By  *hook.Member // of Overtaken
	Who *Process
	Err string

	LinkID uint32 // that holds the entry, alone or with others
	slot   uint32 // of a member of a chain
}

// A Process is who did it.
type Process struct {
	PID  int
	Comm string
	Call string
}
