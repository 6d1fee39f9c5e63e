package hook

// A Leftover is something that was left behind: by a device or a cgroup that is
// gone, or by a process that died.
type Leftover struct {
	// Hook and Target are where it was, as far as that is known. Hook is empty for
	// what is on no hook.
	Hook   Hook
	Target string
	// LinkID is the link that it belongs to; 0 for what belongs to none.
	LinkID uint32
	// Members are the names of the members that it holds.
	Members []string
	// Path is the path of its pins.
	Path string
	// What it is, in words.
	What string
	// Reattached: the members are attached again, and not collected.
	Reattached bool
	// Err, an [Error], is why it is still there; nil once it is gone or attached again.
	Err error
}
