package watch

import "github.com/libdispatcher/dispatcher/hook"

// A targetID identifies a device or cgroup for as long as it stays where it is.
type targetID struct {
	netns    uint64
	ifindex  int
	cgroupID uint64
}

func idOf(t hook.EventTarget) targetID { return targetID{netnsOf(t.NetNS), t.Ifindex, t.CgroupID} }

// netnsOf returns one number for a namespace: its cookie, or on old kernels its inode. The
// kernel uses inodes again, but not cookies. A cookie never equals an inode, because the
// inodes of namespaces are large.
func netnsOf(ns hook.NetNS) uint64 {
	if ns.Cookie != 0 {
		return ns.Cookie
	}
	return ns.Inode
}
