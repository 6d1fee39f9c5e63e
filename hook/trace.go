package hook

import (
	"bytes"
	"fmt"
)

// An Outcome says what an entry did when a packet came along.
type Outcome string

const (
	OutcomeRan       Outcome = "ran"       // its program ran
	OutcomeEmpty     Outcome = "empty"     // its slot is empty, and the packet skipped it
	OutcomeClosed    Outcome = "closed"    // its slot is empty and a closed door: see OnMissing
	OutcomeUnreached Outcome = "unreached" // the packet did not come to it
)

// A Trace is the way of one packet through what is on a hook.
type Trace struct {
	// Steps has one for each entry of the chain, in its order. Where entries cannot be
	// told apart there is one for all of them.
	Steps []Step
	// Verdict is what becomes of the packet as far as this hook decides. On
	// TCX, TX does not occur; on cgroups, only Pass and Drop do.
	Verdict Verdict
	// By is the index in Steps of the step that decided: the last one that ran on
	// XDP, the first one that denied on a cgroup. -1 when the packet passes because none
	// said otherwise.
	By int
	// Onward is the hook with filters of tc where a packet that passes goes on, and what
	// becomes of it there is not known; empty where there are no filters, and for a packet
	// that does not come to them.
	Onward Hook
	// Packet is the packet as it leaves the hook.
	Packet []byte
	// Err says why the packet could not be taken all the way; the verdict then means
	// nothing.
	Err error
}

// A Step says what one entry did with a packet.
type Step struct {
	// Member is the index of the entry in Chain.Members; -1 for all of them at once.
	Member  int
	Outcome Outcome
	// Returned is the program's return value, and Says what it means on this hook: a
	// verdict on XDP, else "next", "pass", "allow" and so on.
	Returned uint32
	Says     string
	// GoesOn tells whether the next entry runs.
	GoesOn bool
	// Packet is the packet behind the program, and Change what the program did to it.
	Packet []byte
	Change Change
}

// A Change is what a program did to a packet.
type Change struct {
	// Head and Tail are how many bytes the packet has grown at its beginning and at
	// its end; negative where it has shrunk. The kernel does not tell at which end: this
	// is the choice that leaves the other bytes most alike.
	Head, Tail int
	// Edits are the bytes that were there before and differ now, by offset.
	Edits []Edit
	// Meta is how many bytes the metadata before the packet has grown.
	Meta int
	// Mark and Priority are what the packet has now; nil where that is
	// unchanged. XDP has none.
	Mark, Priority *uint32
}

// An Edit is a run of bytes that differ.
type Edit struct {
	Offset        int // in the packet as it is now
	Before, After []byte
}

// IsZero tells whether nothing was changed.
func (c *Change) IsZero() bool {
	return c.Head == 0 && c.Tail == 0 && len(c.Edits) == 0 && c.Meta == 0 && c.Mark == nil && c.Priority == nil
}

// A WritableMap is a map that a program may write to while it is explained.
type WritableMap struct {
	// Member is the index in Chain.Members of the entry with the program that may
	// write to it; -1 for all entries at once.
	Member int
	ID     uint32 // unique while the map exists
	Name   string // as the kernel has it: cut after 15 bytes
	Type   string // as cilium/ebpf names it: "Hash", "PerCPUArray"
}

// Compare returns the change from one packet to another. Both may be any bytes.
func Compare(before, after []byte) Change {
	grown := len(after) - len(before)
	c := Change{Tail: grown}
	if grown != 0 && alike(before, after, grown) > alike(before, after, 0) {
		c = Change{Head: grown}
	}
	before, after, at := aligned(before, after, c.Head)
	for i := 0; i < len(after); i++ {
		if before[i] == after[i] {
			continue
		}
		from := i
		for i < len(after) && before[i] != after[i] {
			i++
		}
		c.Edits = append(c.Edits, Edit{Offset: at + from, Before: bytes.Clone(before[from:i]), After: bytes.Clone(after[from:i])})
	}
	return c
}

// aligned returns the bytes that both packets have, when the second packet has head more
// bytes at its beginning, and where in the second packet they begin.
func aligned(before, after []byte, head int) (b, a []byte, at int) {
	if head >= 0 {
		after = after[head:]
	} else {
		before = before[-head:]
	}
	n := min(len(before), len(after))
	return before[:n], after[:n], max(head, 0)
}

// alike counts the bytes that are the same in both packets.
func alike(before, after []byte, head int) (n int) {
	before, after, _ = aligned(before, after, head)
	for i, b := range before {
		if b == after[i] {
			n++
		}
	}
	return n
}

// actions are the return values of programs on TC (TCX_* in linux/bpf.h, TC_ACT_* in
// linux/pkt_cls.h), from -1.
var actions = []string{"next", "pass", "reclassify", "drop", "pipe", "stolen", "queued", "repeat", "redirect", "trap"}

// Interpret tells what a program's return value means on a hook: says is the meaning in a
// word, v the verdict if the program is the last one, and goesOn whether the next program
// runs. on is the continue set of a member on XDP.
func (h Hook) Interpret(returned uint32, on VerdictSet) (says string, v Verdict, goesOn bool) {
	switch h.Family() {
	case "xdp":
		v = Verdict(returned)
		if v < Verdicts {
			return v.String(), v, on.Has(v)
		}
		return fmt.Sprintf("%d, taken for aborted", int32(returned)), Aborted, false
	case "cgroup": // the bit above tells TCP about congestion (BPF_PROG_CGROUP_INET_EGRESS_RUN_ARRAY)
		if returned&1 == 0 {
			return "deny", Drop, true // the others run all the same
		}
		return "allow", Pass, true
	}
	// What tcx_action_code makes of it (include/net/tcx.h): with other values than these
	// four the rest is skipped, and the packet goes on to clsact.
	n := int64(int32(returned)) + 1
	says = fmt.Sprintf("%d", int32(returned))
	if n >= 0 && n < int64(len(actions)) {
		says = actions[n]
	}
	switch says {
	case "next":
		return says, Pass, true
	case "drop":
		return says, Drop, false
	case "redirect":
		return says, Redirect, false
	}
	return says, Pass, false
}
