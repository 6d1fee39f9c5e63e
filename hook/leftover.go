package hook

// A Leftover is something that was left behind: by a device or a cgroup that is
// gone, or by a process that died.
type Leftover struct {
	// Hook and Target say where it was, as far as that is known. Hook is empty for
	// what was on no hook.
	Hook   Hook   `json:"hook,omitempty"`
	Target string `json:"target,omitempty"`
	// LinkID is the link that it belongs to; 0 without a link.
	LinkID uint32 `json:"link_id,omitempty"`
	// Members are the names of the members that it holds.
	Members []string `json:"members"`
	// Path is the path of its pins.
	Path string `json:"path"`
	// What says in words what it is.
	What string `json:"what"`
	// Reattached: the members are attached again, and not collected.
	Reattached bool `json:"reattached"`
	// Err, an [Error], says why it is still there; nil when it is gone or attached
	// again.
	Err error `json:"-"`
}
