package hook

import (
	"fmt"
	"time"
	"unicode"
	"unicode/utf8"
)

const (
	// MaxMembers is how many members a chain holds. The kernel allows 33 tail
	// calls for a packet (MAX_TAIL_CALL_CNT, linux/bpf.h), those of the
	// members included, and silently skips the rest.
	MaxMembers = 32
	// MaxName is the length of a member's name and of an owner's label, in bytes.
	MaxName = 63
	// DefaultPriority is the priority of a member that asks for none. It is
	// libxdp's, so that programs made for either end up in the same order.
	DefaultPriority = 50
	// MinPriority runs first and MaxPriority last.
	MinPriority, MaxPriority = 1, 65535
)

// Settings are what a member asks of its chain. The zero value of each field
// is the default on attaching and "leave it" on changing.
type Settings struct {
	// Priority orders the members: lower runs first, and of equals the one
	// that came first. From MinPriority to MaxPriority.
	Priority int
	// ContinueOn is the verdicts after which the next member runs.
	ContinueOn VerdictSet
	// OnMissing is what happens when the slot is empty.
	OnMissing OnMissing
}

// WithDefaults returns the settings with DefaultPriority, Pass and
// MissingContinue in place of zero values.
func (s Settings) WithDefaults() Settings {
	return s.Or(Settings{DefaultPriority, SetOf(Pass), MissingContinue})
}

// Or returns the settings with the zero values taken from other.
func (s Settings) Or(other Settings) Settings {
	if s.Priority == 0 {
		s.Priority = other.Priority
	}
	if s.ContinueOn == 0 {
		s.ContinueOn = other.ContinueOn
	}
	if s.OnMissing == 0 {
		s.OnMissing = other.OnMissing
	}
	return s
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
// start with a dash.
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
	for _, r := range s {
		if !unicode.IsPrint(r) || r == ' ' {
			return fmt.Errorf("the name %q has the character %q; use printable characters without spaces", s, r)
		}
	}
	return nil
}

// A Program identifies a loaded BPF program.
type Program struct {
	ID   uint32 // unique while the kernel runs
	Name string // as the kernel has it, at most 15 bytes
	Tag  string // hash of the instructions, hex
	// LoadedAt is when it was loaded, zero when the kernel does not say.
	LoadedAt time.Time
}

// Kind tells what an entry on a hook is.
type Kind string

const (
	KindMember  Kind = "member"  // a member of a chain of ours
	KindLegacy  Kind = "legacy"  // attached without a link: anyone may replace it
	KindForeign Kind = "foreign" // attached by a link that is not ours
)

// State tells whether an entry does its work.
type State string

const (
	StateRunning State = "running" // packets go through its program
	StateEmpty   State = "empty"   // its owner is gone; its OnMissing applies
	StateDefunct State = "defunct" // the device is gone
)

// A Member is one entry on a hook, in run order.
type Member struct {
	Name string
	// Settings are the member's own; zero for KindLegacy and KindForeign.
	Settings
	// Program is what its slot holds; the zero value when it is empty.
	Program Program
	// Persistent members are pinned and outlive their process.
	Persistent bool
	Kind       Kind
	State      State
	// Owner is the label that whoever attached it gave itself.
	Owner string
	// SlotID is the map id of the one-entry prog array that owns the member.
	SlotID uint32
	// TailCalls is set when the program makes tail calls of its own, which
	// count towards the kernel's limit for a packet.
	TailCalls bool
}

// NetNS identifies a network namespace.
type NetNS struct {
	Inode  uint64 // of /proc/PID/ns/net; used again after the namespace is gone
	Cookie uint64 // SO_NETNS_COOKIE, never used again; 0 before Linux 5.14
}

// A Chain is what is on a hook of one target.
type Chain struct {
	Hook    Hook
	Target  string // device name; empty once the device is gone
	Ifindex int    // 0 once the device is gone
	NetNS   NetNS
	Mode    Mode
	// LinkID is the link that holds the hook; 0 when there is none, so that
	// anyone may replace what is attached.
	LinkID uint32
	// DispatcherID is the program id of the dispatcher; 0 when what is
	// attached is not a chain of ours.
	DispatcherID uint32
	// Frags tells whether the chain takes multi-buffer packets, and with it
	// every member (xdp.frags, Linux 5.18).
	Frags bool
	// Pins are the chain's pins in the bpffs that was looked at.
	Pins    []string
	Members []Member
}

// Protected tells whether a link holds the hook, so that netlink cannot
// replace what is attached.
func (c *Chain) Protected() bool { return c.LinkID != 0 }

// Ours tells whether this is a chain of libdispatcher's and not a single
// program that somebody else attached.
func (c *Chain) Ours() bool { return c.DispatcherID != 0 }

// Member returns the member of that name, or nil.
func (c *Chain) Member(name string) *Member {
	for i := range c.Members {
		if c.Members[i].Kind == KindMember && c.Members[i].Name == name {
			return &c.Members[i]
		}
	}
	return nil
}
