package dispatcher

import "github.com/libdispatcher/dispatcher/hook"

// A Target is a hook on one device.
type Target struct {
	Hook hook.Hook
	// Device is the name of the network device. An alternative name
	// (ip link property add altname) works too.
	Device string
	// NetNS is the network namespace of the device: a name as in "ip netns",
	// a path, or a process id. Empty is the caller's own.
	NetNS string
}

// XDP is the XDP hook of a device in the caller's network namespace.
func XDP(device string) Target { return Target{Hook: hook.XDP, Device: device} }

// In returns the same target in another network namespace.
func (t Target) In(netns string) Target {
	t.NetNS = netns
	return t
}
