package hook

// A Leftover is something that was left behind: by a device or a cgroup that is
// gone, or by a process that died.
type Leftover struct {
	// Hook and Target say where it was, as far as that is known. Hook is empty for
	// what was on no hook.
	Hook   Hook
	Target string
	// LinkID is the link that it belongs to; 0 without a link.
	LinkID uint32
	// Members are the names of the members that it holds.
	Members []string
	// Path is the path of its pins.
	Path string
	// What says in words what it is.
	What string
	// Reattached: the members are attached again, and not collected.
	Reattached bool
	// Err, an [Error], says why it is still there; nil when it is gone or attached
	// again.
	Err error
}
