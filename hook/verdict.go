package hook

import (
	"fmt"
	"strings"
)

// A Verdict is what an XDP program returns (enum xdp_action, linux/bpf.h).
type Verdict uint32

const (
	Aborted  Verdict = iota // drop, and fire the xdp:xdp_exception tracepoint
	Drop                    // drop
	Pass                    // hand the packet to the network stack
	TX                      // send it back out of the device it came in on
	Redirect                // send it where bpf_redirect said
)

// Verdicts is how many verdicts there are; the kernel takes any other value
// for Aborted and warns.
const Verdicts = 5

var verdictNames = [Verdicts]string{"aborted", "drop", "pass", "tx", "redirect"}

// String returns the name of the verdict in lower case.
func (v Verdict) String() string {
	if v < Verdicts {
		return verdictNames[v]
	}
	return fmt.Sprintf("Verdict(%d)", uint32(v))
}

// ParseVerdict returns the verdict of that name, in lower case or as in C
// (XDP_PASS).
func ParseVerdict(s string) (Verdict, error) {
	name := strings.TrimPrefix(strings.ToLower(s), "xdp_")
	for v, n := range verdictNames {
		if n == name {
			return Verdict(v), nil
		}
	}
	return 0, fmt.Errorf("unknown verdict %q (known: %s)", s, strings.Join(verdictNames[:], ", "))
}

// A VerdictSet is a set of verdicts, bit n for verdict n: those after which a
// chain goes on to the next member. The zero value means the default, which
// is Pass when a member is attached and "as it is" when one is changed.
type VerdictSet uint32

// Never is the empty set: the chain ends after the member, whatever it says.
const Never VerdictSet = 1 << 31

const allVerdicts VerdictSet = 1<<Verdicts - 1

// SetOf returns the set of these verdicts, and Never for none. With a verdict that does
// not exist the set is not valid.
func SetOf(verdicts ...Verdict) VerdictSet {
	var s VerdictSet
	for _, v := range verdicts {
		s |= 1 << min(v, Verdicts)
	}
	if s == 0 {
		return Never
	}
	return s
}

// Has tells whether v is in the set.
func (s VerdictSet) Has(v Verdict) bool { return v < Verdicts && s&(1<<v) != 0 }

// List returns the verdicts in the set, in numeric order.
func (s VerdictSet) List() []Verdict {
	list := []Verdict{}
	for v := range Verdict(Verdicts) {
		if s.Has(v) {
			list = append(list, v)
		}
	}
	return list
}

// Valid tells whether the set is Never or one of known verdicts only. The
// zero value is not: it stands for a default that is still to be filled in.
func (s VerdictSet) Valid() bool {
	return s == Never || s != 0 && s&^allVerdicts == 0
}

// String returns the names joined by commas, "none" for Never and "default"
// for the zero value.
func (s VerdictSet) String() string {
	switch s {
	case 0:
		return "default"
	case Never:
		return "none"
	}
	var names []string
	for _, v := range s.List() {
		names = append(names, v.String())
	}
	if rest := s &^ allVerdicts; rest != 0 {
		names = append(names, fmt.Sprintf("%#x", uint32(rest)))
	}
	return strings.Join(names, ",")
}

// ParseVerdictSet reads verdict names separated by commas; "none" is Never,
// "any" is all of them.
func ParseVerdictSet(s string) (VerdictSet, error) {
	switch s {
	case "none":
		return Never, nil
	case "any":
		return allVerdicts, nil
	}
	var set VerdictSet
	for name := range strings.SplitSeq(s, ",") {
		v, err := ParseVerdict(strings.TrimSpace(name))
		if err != nil {
			return 0, fmt.Errorf("%w; \"none\" ends the chain here, \"any\" always goes on", err)
		}
		set |= 1 << v
	}
	return set, nil
}

// OnMissing says what happens at a member with an empty slot, after its owner
// closed it or died. The zero value means the default: continue when a member is
// attached, "as it is" when a member is changed.
type OnMissing uint8

const (
	// MissingContinue goes on to the next member, as if this one were not there.
	MissingContinue OnMissing = iota + 1
	// MissingDrop drops the packet: a closed door.
	MissingDrop
	// MissingAborted drops it and fires the xdp:xdp_exception tracepoint.
	MissingAborted
)

var missingNames = []string{"default", "continue", "drop", "aborted"}

// String returns the name of the policy.
func (m OnMissing) String() string {
	if int(m) < len(missingNames) {
		return missingNames[m]
	}
	return fmt.Sprintf("OnMissing(%d)", uint8(m))
}

// ParseOnMissing returns the policy of that name.
func ParseOnMissing(s string) (OnMissing, error) {
	for m := MissingContinue; m <= MissingAborted; m++ {
		if m.String() == s {
			return m, nil
		}
	}
	return 0, fmt.Errorf("unknown policy %q for an empty slot (known: continue, drop, aborted)", s)
}
