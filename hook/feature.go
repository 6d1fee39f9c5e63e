package hook

// A Feature is something that a kernel, a machine or a device may lack.
type Feature struct {
	// Name is short and stable: "tcx-link", "dev-native".
	Name string
	// Supported tells that it works here.
	Supported bool
	// Needs says in words what provides it: a kernel version, a capability, a driver.
	Needs string
	// Detail says why it is not supported; empty when it is.
	Detail string
	// Unknown: the kernel does not tell, for example what a driver can do before Linux
	// 6.3. Supported is false then.
	Unknown bool
}
