package hook

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

const (
	// MaxMembers is how many members a chain can have. The kernel allows 33 tail
	// calls for a packet (MAX_TAIL_CALL_CNT, linux/bpf.h), the members' own tail
	// calls included, and silently skips the rest.
	MaxMembers = 32
	// MaxName is the length of a member's name and of an owner's label, in bytes.
	MaxName = 63
	// DefaultPriority is the priority of a member that asks for none. libxdp has the
	// same default, so that programs run in the same order in either chain.
	DefaultPriority = 50
	// MinPriority runs first and MaxPriority last.
	MinPriority, MaxPriority = 1, 65535
)

// Settings are what a member asks of its chain. The zero value of each field
// is the default on attaching and "leave it" on changing.
type Settings struct {
	// Priority orders the members: lower runs first, and of equals the oldest. From
	// MinPriority to MaxPriority.
	Priority int `json:"priority,omitempty"`
	// ContinueOn has the verdicts after which the next member runs.
	ContinueOn VerdictSet `json:"continue_on"`
	// OnMissing is what happens when the slot is empty.
	OnMissing OnMissing `json:"on_missing,omitempty"`
}

// WithDefaults returns the settings with DefaultPriority, Pass and
// MissingContinue in place of zero values.
func (s Settings) WithDefaults() Settings {
	return s.Or(Settings{DefaultPriority, SetOf(Pass), MissingContinue})
}

// Or returns the settings with the zero values taken from other.
func (s Settings) Or(other Settings) Settings {
	return Settings{cmp.Or(s.Priority, other.Priority), cmp.Or(s.ContinueOn, other.ContinueOn), cmp.Or(s.OnMissing, other.OnMissing)}
}

// CheckFor returns an error for settings that mean nothing on the hook.
func (s Settings) CheckFor(h Hook) error {
	switch {
	case h == XDP:
	case s.ContinueOn != 0:
		return fmt.Errorf("continue-on %v: on %s the program itself says with its return value whether the next one runs", s.ContinueOn, h)
	case s.OnMissing != 0:
		return fmt.Errorf("on-missing %v: on %s there are no slots that could be empty; a member leaves with its owner", s.OnMissing, h)
	}
	return nil
}

// Check returns an error that names the first value out of range. Zero values
// are in range.
func (s Settings) Check() error {
	if s.Priority != 0 && (s.Priority < MinPriority || s.Priority > MaxPriority) {
		return fmt.Errorf("priority %d: must be from %d (runs first) to %d", s.Priority, MinPriority, MaxPriority)
	}
	if s.ContinueOn != 0 && !s.ContinueOn.Valid() {
		return fmt.Errorf("continue-on %v: not a set of XDP verdicts", s.ContinueOn)
	}
	if s.OnMissing > MissingAborted {
		return fmt.Errorf("%v: no such policy for an empty slot", s.OnMissing)
	}
	return nil
}

// CheckName tells why s cannot be the name of a member or an owner: such a
// name has 1 to MaxName bytes of printable UTF-8 without spaces and does not
// start with a dash, nor with "link:" or "id:", see [Ref].
func CheckName(s string) error {
	switch {
	case s == "":
		return fmt.Errorf("the name is empty")
	case len(s) > MaxName:
		return fmt.Errorf("the name %.20q... has %d bytes, at most %d fit", s, len(s), MaxName)
	case !utf8.ValidString(s):
		return fmt.Errorf("the name %q is not valid UTF-8", s)
	case s[0] == '-':
		return fmt.Errorf("the name %q starts with a dash", s)
	}
	for _, prefix := range []string{"link:", "id:"} {
		if strings.HasPrefix(s, prefix) {
			return fmt.Errorf("the name %q starts with %q, which stands for a link or a program by its id", s, prefix)
		}
	}
	for _, r := range s {
		if !unicode.IsPrint(r) || r == ' ' {
			return fmt.Errorf("the name %q has the character %q; use printable characters without spaces", s, r)
		}
	}
	return nil
}

// A Program identifies a loaded BPF program.
type Program struct {
	ID   uint32 `json:"id"`   // unique while the kernel runs
	Name string `json:"name"` // as the kernel has it: cut after 15 bytes, but whole where there is BTF
	Tag  string `json:"tag"`  // hash of the instructions, hex
	// LoadedAt is when it was loaded, zero when the kernel does not say.
	LoadedAt time.Time `json:"loaded_at,omitzero"`
	// LoadedBy is the user id of the process that loaded it (created_by_uid,
	// linux/bpf.h).
	LoadedBy uint32 `json:"loaded_by_uid"`
}

// Same tells whether q is the same program, or another copy of it: with the same
// instructions and the same name.
func (p Program) Same(q Program) bool {
	return p.ID != 0 && (p.ID == q.ID || p.Tag != "" && p.Tag == q.Tag && p.Name == q.Name)
}

// MarshalJSON writes a program that there is not as null, and the time in UTC and whole
// seconds: the kernel's clocks do not tell it better.
func (p Program) MarshalJSON() ([]byte, error) {
	type fields Program
	if p.ID == 0 {
		return []byte("null"), nil
	}
	p.LoadedAt = p.LoadedAt.UTC().Truncate(time.Second)
	return json.Marshal(fields(p))
}

// Kind tells what an entry on a hook is.
type Kind string

const (
	KindMember  Kind = "member"  // ours: of a dispatcher, or with a name of its own
	KindLegacy  Kind = "legacy"  // attached without a link: anyone may replace it
	KindForeign Kind = "foreign" // attached by a link that is not ours
	// KindLibxdp: behind a dispatcher of libxdp, which netlink attached. It can
	// be joined and left, and nobody owns it: anyone may replace the dispatcher.
	KindLibxdp Kind = "libxdp"
)

// Style tells which library keeps a chain of XDP, and so which programs can join it.
type Style string

const (
	// StyleOwned is a dispatcher of ours behind a link. Its members are in slots, and
	// belong to the holders of the slots.
	StyleOwned Style = "owned"
	// StyleLibxdp is a dispatcher of libxdp, which netlink attached. It has up to 10
	// members, attached with freplace and pinned. All programs that use libxdp can
	// join, and nothing protects the chain.
	StyleLibxdp Style = "libxdp"
)

// ParseStyle returns the style of that name.
func ParseStyle(s string) (Style, error) {
	switch style := Style(s); style {
	case StyleOwned, StyleLibxdp:
		return style, nil
	}
	return "", fmt.Errorf("unknown style %q (known: %s, %s)", s, StyleOwned, StyleLibxdp)
}

// State tells whether an entry does its work.
type State string

const (
	StateRunning State = "running" // packets go through its program
	StateEmpty   State = "empty"   // its owner is gone; its OnMissing applies
	StateDefunct State = "defunct" // the device or cgroup is gone, or the link was detached
	// StateDisplaced: a holder of the chain's link has replaced the chain by a
	// program. The member is still pinned.
	StateDisplaced State = "displaced"
	// StateBypassed: freplace has replaced the main function of the entry or of the
	// dispatcher. Packets do not meet the entry.
	StateBypassed State = "bypassed"
	// StateOverridden: a cgroup has programs of its own, so the entry of a cgroup above,
	// which was attached without BPF_F_ALLOW_MULTI, does not run there.
	StateOverridden State = "overridden"
)

// A Member is one entry on a hook, in run order.
type Member struct {
	Name string `json:"name"`
	// Settings are the member's own; zero for KindLegacy and KindForeign. For
	// KindLibxdp the priority may be any number, and OnMissing is zero.
	// ContinueOn and OnMissing are zero on every hook but XDP: there the
	// program itself says whether the next one runs, and there are no slots.
	Settings
	// Program is what runs; the zero value when a slot is empty.
	Program Program `json:"program"`
	// Persistent members are pinned and outlive their process.
	Persistent bool  `json:"persistent"`
	Kind       Kind  `json:"kind"`
	State      State `json:"state"`
	// Owner is the label that the process which attached the member gave itself.
	Owner string `json:"owner,omitempty"`
	// LinkID is the link that attaches only this entry. It is 0 without such a link:
	// a member of an XDP chain has a slot instead.
	LinkID uint32 `json:"link_id,omitempty"`
	// SlotID is the map id of the one-entry prog array that owns the member of
	// an XDP chain; 0 on other hooks.
	SlotID uint32 `json:"slot_id,omitempty"`
	// TailCalls is set when the program makes tail calls of its own, which
	// count towards the kernel's limit for a packet.
	TailCalls bool `json:"tail_calls"`
	// Sealed members of an XDP chain are linked into its dispatcher: the slot
	// has their program too, but packets do not come by there.
	Sealed bool `json:"sealed,omitempty"`
	// Filter is the place of a tc filter; nil on other hooks.
	Filter *Filter `json:"filter,omitempty"`
	// Actions are what tc does with packets that a filter without direct action matches.
	Actions []Action `json:"actions,omitempty"`
	// From is the cgroup that the entry is attached to, in a list of a cgroup's
	// effective entries; else empty. A cgroup that cannot be seen, because it is above the root of a
	// cgroup namespace, is "a cgroup above /" with its id.
	From string `json:"from,omitempty"`
	// Detail is what else the kernel says of the entry, in words: flags of a
	// cgroup attachment, the place of a netfilter hook.
	Detail string `json:"detail,omitempty"`
	// Extensions are the programs that replace functions of the entry's program, or
	// the function of a sealed member in the dispatcher (freplace).
	Extensions []Extension `json:"extensions,omitempty"`
}

// Ref returns the reference that names the entry: a member by its name, any other entry
// by its link, or without a link by its program.
func (m *Member) Ref() Ref {
	switch {
	case m.Kind == KindMember:
		return Ref(m.Name)
	case m.LinkID != 0:
		return LinkRef(m.LinkID)
	}
	return ProgramRef(m.Program.ID)
}

// Named tells whether the entry can be referred to by its name.
func (m *Member) Named() bool { return m.Kind == KindMember || m.Kind == KindLibxdp }

// Protected tells whether the entry runs, and the legacy calls (netlink, tc,
// PROG_ATTACH) cannot remove or replace it by itself. For XDP see
// [Chain.Protected].
func (m *Member) Protected() bool {
	return m.LinkID != 0 && m.State != StateDefunct && m.State != StateBypassed
}

// An Extension is a program that replaces a function of another program (freplace,
// BPF_PROG_TYPE_EXT). List, Read and Watch find the extensions of dispatchers and of
// all programs on hooks, from Linux 5.13.
//
// The kernel refuses extensions of a dispatcher of this library, except of the
// functions of large sealed members. From Linux 6.12 it refuses extensions of a program
// in a slot. Before that, a program in a slot still runs its own main function, but
// calls the extensions of its other functions.
type Extension struct {
	Function string  `json:"function"` // that it runs in the place of; empty when the name is not known
	Main     bool    `json:"main"`     // Function is the main function: no other code of the program runs
	LinkID   uint32  `json:"link_id"`  // by which it is attached; the kernel detaches none of this type
	Program  Program `json:"program"`
}

// String says what runs in the place of which function.
func (x Extension) String() string {
	function := "function " + x.Function
	if x.Main {
		function = "main " + function
	}
	return fmt.Sprintf("%s (id %d, link %d) in the place of the %s", x.Program.Name, x.Program.ID, x.LinkID, function)
}

// An OtherFilter is a filter of tc that is no BPF program.
type OtherFilter struct {
	Kind string `json:"kind"` // "u32", "flower", "matchall", ...
	Filter
	// Block is the number of the block that several devices share; 0 if there is none.
	Block   uint32   `json:"block,omitempty"`
	Actions []Action `json:"actions,omitempty"`
}

// String describes the filter in words.
func (f OtherFilter) String() string {
	text := fmt.Sprintf("%s filter pref %d handle %#x", f.Kind, f.Pref, f.Handle)
	if f.Chain != 0 {
		text = fmt.Sprintf("%s filter chain %d pref %d handle %#x", f.Kind, f.Chain, f.Pref, f.Handle)
	}
	if f.Block != 0 {
		text += fmt.Sprintf(" in shared block %d", f.Block)
	}
	if len(f.Actions) == 0 {
		return text
	}
	return text + ": " + DescribeActions(f.Actions)
}

// An Action is what tc does with a packet that a filter has matched.
type Action struct {
	Kind string `json:"kind"` // "gact", "mirred", "bpf", ...
	// Does says what in words; empty where that is not known, and for bpf, where Program
	// decides.
	Does    string  `json:"does,omitempty"`
	Program Program `json:"program"`
}

// DescribeActions describes actions in words, in the order in which they run.
func DescribeActions(list []Action) string {
	var words []string
	for _, a := range list {
		switch {
		case a.Program.ID != 0:
			words = append(words, fmt.Sprintf("action bpf (program %s, id %d)", cmp.Or(a.Program.Name, "without a name"), a.Program.ID))
		case a.Does != "":
			words = append(words, fmt.Sprintf("action %s (%s)", a.Kind, a.Does))
		default:
			words = append(words, "action "+a.Kind)
		}
	}
	return strings.Join(words, ", ")
}

// A Filter is the place of a tc filter, as "tc filter" names it.
type Filter struct {
	Parent   uint32 `json:"parent"`   // qdisc and class: TC_H_MAKE(major, minor)
	Chain    uint32 `json:"chain"`    // of tc; 0 is where packets start
	Pref     uint16 `json:"pref"`     // lower runs first
	Protocol uint16 `json:"protocol"` // ETH_P_*, host byte order; ETH_P_ALL is 3
	Handle   uint32 `json:"handle"`   // of the filter within its preference
	// DirectAction: the program's return value is the verdict; else it is a class.
	DirectAction bool `json:"direct_action"`
}

// NetNS identifies a network namespace.
type NetNS struct {
	Inode  uint64 `json:"inode"`  // of /proc/PID/ns/net; used again after the namespace is gone
	Cookie uint64 `json:"cookie"` // SO_NETNS_COOKIE, never used again; 0 before Linux 5.14
	// Name opens the namespace: a name as in "ip netns", or a path. It is empty for
	// the caller's own namespace, and where no name was looked for.
	Name string `json:"name,omitempty"`
}

// Begins says what packets on a device begin with, as its programs see them.
type Begins string

// What packets begin with; empty for an Ethernet header.
const (
	BeginsIP    Begins = "ip"    // the IP header: tun, WireGuard, IP tunnels, PPP
	BeginsOther Begins = "other" // the header of another kind of network, or of the packet around it
)

// String completes the sentence "packets begin with".
func (b Begins) String() string {
	switch b {
	case BeginsIP:
		return "the IP header"
	case BeginsOther:
		return "neither an Ethernet header nor their own IP header"
	}
	return "an Ethernet header"
}

// A Chain is what is on a hook of one target.
type Chain struct {
	Hook Hook `json:"hook"`
	// Target is a device by its name or a cgroup by its path; empty for a
	// network namespace, and once it is gone.
	Target   string `json:"target"`
	Ifindex  int    `json:"ifindex"`             // 0 for what is not a device, and once the device is gone
	CgroupID uint64 `json:"cgroup_id,omitempty"` // inode of the cgroup's folder; 0 for what is not a cgroup
	NetNS    NetNS  `json:"netns"`
	// Begins says what packets on the device begin with; empty for an Ethernet header, and
	// for what is not a device.
	Begins Begins `json:"begins,omitempty"`
	Mode   Mode   `json:"mode"` // of XDP
	// NativeRefused says why a chain that was started in mode auto is in generic mode: how
	// the driver refused native mode. Only Link.Chain of the member that started it has it.
	NativeRefused string `json:"-"`
	// Revision counts the changes of the hook where the kernel does: TCX (Linux
	// 6.6), cgroups (6.17); else 0.
	Revision uint64 `json:"revision,omitempty"`
	// LinkID is the one link that holds the XDP hook; 0 when there is none, so
	// that anyone may replace what is attached. On other hooks each entry has a
	// link of its own, see [Member].
	LinkID uint32 `json:"link_id,omitempty"`
	// Style is the style of an XDP chain; empty when no chain is attached.
	Style Style `json:"style,omitempty"`
	// ConfigVersion is the config version of libxdp's dispatcher, which says what
	// versions of libxdp can change it; 0 for all else.
	ConfigVersion uint8 `json:"config_version,omitempty"`
	// DispatcherID is the program id of the dispatcher, ours or libxdp's; 0 when no
	// chain is attached.
	DispatcherID uint32 `json:"dispatcher_id,omitempty"`
	// Frags tells whether the chain takes multi-buffer packets, and with it
	// every member (xdp.frags, Linux 5.18).
	Frags bool `json:"frags"`
	// Pins are the chain's pins in the bpffs that was looked at.
	Pins []string `json:"pins"`
	// Extensions are the programs that replace other functions of the dispatcher
	// (freplace). The members of libxdp's chain are not among them.
	Extensions []Extension `json:"extensions,omitempty"`
	Members    []Member    `json:"members"`
	// Others are the filters on tc/* that are no BPF programs. They take turns with the
	// members by their preferences.
	Others []OtherFilter `json:"other_filters,omitempty"`
	// Err says why the hook could not be read, in a list of hooks; else nil.
	Err error `json:"-"`
}

// At returns the hook and the target.
func (c *Chain) At() EventTarget {
	return EventTarget{Hook: c.Hook, Target: c.Target, Ifindex: c.Ifindex, CgroupID: c.CgroupID, NetNS: c.NetNS}
}

// Meets tells whether what runs on both chains meets the same packets or calls: on one hook
// of one target, or in one direction of TCX and clsact, which run one after the other.
func (c *Chain) Meets(d *Chain) bool {
	a, b := c.At(), d.At()
	a.Target, b.Target, a.NetNS.Name, b.NetNS.Name = "", "", "", ""
	a.Hook, b.Hook = Hook(strings.Replace(string(a.Hook), "tcx/", "tc/", 1)), Hook(strings.Replace(string(b.Hook), "tcx/", "tc/", 1))
	return a == b
}

// Bypassed tells whether another program replaces the dispatcher, so that packets meet
// none of the members.
func (c *Chain) Bypassed() bool {
	return slices.ContainsFunc(c.Extensions, func(x Extension) bool { return x.Main })
}

// Protected tells whether links hold all that is attached, so that the legacy
// calls can replace none of it, and it runs.
func (c *Chain) Protected() bool {
	if c.Hook == XDP {
		return c.LinkID != 0 && !c.Bypassed()
	}
	return len(c.Members) > 0 && !slices.ContainsFunc(c.Members, func(m Member) bool { return !m.Protected() })
}

// Ours tells whether libdispatcher attached something on the hook.
func (c *Chain) Ours() bool {
	if c.Hook == XDP {
		return c.Style == StyleOwned
	}
	return slices.ContainsFunc(c.Members, func(m Member) bool { return m.Kind == KindMember })
}

// Member returns the member of that name, or nil. It returns the first one if several
// members behind libxdp's dispatcher have that name.
func (c *Chain) Member(name string) *Member {
	for i := range c.Members {
		if c.Members[i].Named() && c.Members[i].Name == name {
			return &c.Members[i]
		}
	}
	return nil
}

// A Sealing tells what became of a member when its chain was sealed.
type Sealing struct {
	Member string `json:"member"`
	Sealed bool   `json:"sealed"`
	// Reason says why it stays in its slot; empty when it is sealed.
	Reason string `json:"reason,omitempty"`
}
