package watch

import "github.com/libdispatcher/dispatcher/hook"

func targetOf(c *hook.Chain) hook.EventTarget {
	return hook.EventTarget{Hook: c.Hook, Target: c.Target, NetNS: c.NetNS, Ifindex: c.Ifindex, CgroupID: c.CgroupID}
}

// A targetID is what does not change while a device or cgroup stays where it is.
type targetID struct {
	netns    uint64
	ifindex  int
	cgroupID uint64
}

func idOf(t hook.EventTarget) targetID { return targetID{netnsOf(t.NetNS), t.Ifindex, t.CgroupID} }

// netnsOf is one number for a namespace. Inodes come round, cookies do not, but
// old kernels have none. The two do not meet: inodes of namespaces are large.
func netnsOf(ns hook.NetNS) uint64 {
	if ns.Cookie != 0 {
		return ns.Cookie
	}
	return ns.Inode
}
