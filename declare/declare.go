package declare

import (
	"encoding/json"
	"fmt"
	"strconv"
)

// A Document is what one file declares.
type Document struct {
	// Attachments are the declared members, in any order.
	Attachments []Attachment `json:"attachments"`
}

// An Attachment is a program on a hook of all targets that match.
type Attachment struct {
	// Name is the member's name, unique on its hook: see hook.CheckName.
	Name string `json:"name"`
	// Hook is a hook by its name, as "xdp" or "cgroup/connect4".
	Hook string `json:"hook"`
	// On says where.
	On Match `json:"on"`
	// Program says what.
	Program Program `json:"program"`
	// Maps says what becomes of the maps when the program is replaced.
	Maps Maps `json:"maps,omitzero"`
	// Order says when the member runs.
	Order Order `json:"order,omitzero"`
	// Mode is that of XDP: "auto", "native" or "generic". Default: auto.
	Mode string `json:"mode,omitempty"`
	// Seal links the chain of XDP into one program when something was changed, if all its members are declared
	// with it; false leaves the chain as it is. Default: true. On other hooks it means nothing.
	Seal *bool `json:"seal,omitempty"`
	// OnConflict says what to do with a program that holds the hook without a link: "refuse", or
	// "adopt", which makes it a member. Default: refuse.
	OnConflict string `json:"onConflict,omitempty"`
	// OnDrift is for an agent, which sees when a member is changed by others: "restore" or
	// "report". Applying a document always restores. Default: restore.
	OnDrift string `json:"onDrift,omitempty"`
	// Confirm says how a new attachment, and a new program, prove that they do no harm. Not on tc/*.
	Confirm *Confirm `json:"confirm,omitempty"`
}

// A Match chooses targets; every key that is set must match. For hooks on devices at least
// one of Names, Driver, Kind and Role is set; for hooks on cgroups Cgroup and nothing else.
type Match struct {
	// Names are names of devices with *, ? and [...] as in the shell. Alternative names match, too.
	Names []string `json:"names,omitempty"`
	// Driver are drivers, as "ethtool -i" tells them, with *, ? and [...].
	Driver []string `json:"driver,omitempty"`
	// Kind are kinds of devices, as "ip -d link" tells them ("bond", "veth", "vlan"); "physical" is
	// a device without a kind, and "loopback" the loopback device.
	Kind []string `json:"kind,omitempty"`
	// Role is "leaf" for devices that no other device is on top of: no port of a bond or
	// bridge, no VLAN above.
	Role string `json:"role,omitempty"`
	// NetNS is the devices' network namespace: a name as in "ip netns", or a path. Default:
	// that of the process that applies.
	NetNS string `json:"netns,omitempty"`
	// Cgroup is a cgroup by its path below the mount of cgroup v2 ("/system.slice"), or by the
	// path of its folder.
	Cgroup string `json:"cgroup,omitempty"`
}

// A Program says where a program comes from: one of File, Builtin, Image and Pin is set.
type Program struct {
	// File is the path of an object file; one that is not absolute begins at the document's folder.
	File string `json:"file,omitempty"`
	// Builtin is a program that comes with libdispatcher.
	Builtin string `json:"builtin,omitempty"`
	// Image is an OCI image.
	Image string `json:"image,omitempty"`
	// Pin is the path of a pinned program.
	Pin string `json:"pin,omitempty"`
	// Entry is the program's function or section, for a file with several.
	Entry string `json:"entry,omitempty"`
	// Globals are constants and variables to set before the program is loaded, written as in C.
	Globals map[string]Value `json:"globals,omitempty"`
}

// A Value is a number, a truth value or a text.
type Value string

// UnmarshalJSON reads a number or a truth value as it is written, and a text.
func (v *Value) UnmarshalJSON(b []byte) error {
	var read any
	if err := json.Unmarshal(b, &read); err != nil {
		return err
	}
	switch read := read.(type) {
	case string:
		*v = Value(read)
	case float64:
		*v = Value(b)
	case bool:
		*v = Value(strconv.FormatBool(read))
	default:
		return fmt.Errorf("%s: must be a number, true, false or a text", b)
	}
	return nil
}

// Maps says what becomes of maps.
type Maps struct {
	// Reuse is "by-name": a program that replaces another takes over its maps of the same
	// names; or "none". Default: by-name.
	Reuse string `json:"reuse,omitempty"`
}

// An Order says when a member runs, and what runs then.
type Order struct {
	// Priority: lower runs first. Default: hook.DefaultPriority.
	Priority int `json:"priority,omitempty"`
	// Before and After name members on the same hook, declared or not. The priority is lowered or
	// raised as far as they need it. A member that is not there asks for nothing.
	Before []string `json:"before,omitempty"`
	After  []string `json:"after,omitempty"`
	// ContinueOn has the verdicts after which the next member runs. On xdp only. Default: pass.
	ContinueOn []string `json:"continueOn,omitempty"`
	// OnMissing is what becomes of packets while the member's slot is empty: "continue", "drop" or
	// "aborted". On xdp only. Default: continue.
	OnMissing string `json:"onMissing,omitempty"`
}

// A Confirm is what a new attachment must pass before it is pinned: until then it is held, and leaves if it does not
// pass or the process that holds it dies. A new program of a member must pass, too, or the old one is put back.
type Confirm struct {
	// Within is how long that may take, as "30s".
	Within string `json:"within"`
	// Probes must all pass.
	Probes []Probe `json:"probes"`
}

// A Probe is one trial: one of its keys is set.
type Probe struct {
	// TCP is an address and port to connect to, from the network namespace of the device.
	TCP string `json:"tcp,omitempty"`
	// Exec is a command that must end with 0, in the network namespace of the device.
	Exec []string `json:"exec,omitempty"`
}

// Words of the keys that have few values. The first is the default.
var (
	Modes     = []string{"auto", "native", "generic"}
	Conflicts = []string{"refuse", "adopt"}
	Drifts    = []string{"restore", "report"}
	Reuses    = []string{"by-name", "none"}
	Missings  = []string{"continue", "drop", "aborted"}
	Roles     = []string{"leaf"}
)

// Sealed tells whether the chain shall be sealed.
func (a *Attachment) Sealed() bool { return a.Hook == "xdp" && (a.Seal == nil || *a.Seal) }

// Adopts tells whether a program without a link becomes a member.
func (a *Attachment) Adopts() bool { return a.OnConflict == "adopt" }
