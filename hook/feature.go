package hook

// A Feature is something that a kernel, a machine or a device may lack.
type Feature struct {
	// Name is short and stable: "tcx-link", "dev-native".
	Name string `json:"name"`
	// Supported tells that it works here.
	Supported bool `json:"supported"`
	// Needs says in words what provides it: a kernel version, a capability, a driver.
	Needs string `json:"needs,omitempty"`
	// Detail says why it is not supported; empty when it is.
	Detail string `json:"detail,omitempty"`
	// Unknown: the kernel does not tell, for example what a driver can do before Linux
	// 6.3. Supported is false then.
	Unknown bool `json:"unknown,omitempty"`
}
