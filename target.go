package dispatcher

import "github.com/libdispatcher/dispatcher/hook"

// A Target is a hook on one device or one cgroup.
type Target struct {
	Hook hook.Hook
	// Device is the name of the network device, for hooks that are on one. An
	// alternative name (ip link property add altname) works too.
	Device string
	// Cgroup is the path of the cgroup, for hooks that are on one: the path of its
	// folder, or else the path below the mount of cgroup v2 ("/system.slice"). What
	// begins with "." or ".." is only looked for in the working folder.
	Cgroup string
	// NetNS is the network namespace of the device: a name as in "ip netns", a path,
	// or a process id. Empty means the caller's own.
	NetNS string
}

// XDP returns the XDP hook of a device in the caller's network namespace.
func XDP(device string) Target { return On(hook.XDP, device) }

// On returns a hook on a device, by its name, or on a cgroup, by its path.
func On(h hook.Hook, target string) Target {
	if h.OnCgroup() {
		return Target{Hook: h, Cgroup: target}
	}
	return Target{Hook: h, Device: target}
}

// In returns the same target in another network namespace.
func (t Target) In(netns string) Target {
	t.NetNS = netns
	return t
}

// Name returns the name of the device or the path of the cgroup.
func (t Target) Name() string {
	if t.Hook.OnCgroup() {
		return t.Cgroup
	}
	return t.Device
}
