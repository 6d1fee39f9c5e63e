package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/chains"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/links"
	"github.com/libdispatcher/dispatcher/internal/state"
)

// chain looks at what is on one hook.
func (e *exam) chain(c *hook.Chain) {
	if c.Err != nil {
		e.unreadable(c)
	}
	if isDefunct(c) {
		e.heldDefunct(c)
		return
	}
	for i := range c.Members {
		e.displaced(c, &c.Members[i])
	}
	e.extended(c)
	if !c.Ours() {
		return
	}
	if c.Hook == hook.XDP {
		e.unprotected(c)
		for i := range c.Members {
			e.slot(c, &c.Members[i])
		}
		e.tailCalls(c)
		e.watched(c)
		return
	}
	e.order(c)
	e.inFront(c)
	e.overridden(c)
	e.twice(c)
}

// twice reports members whose program runs a second time, since the tool that attached it
// before it was adopted has attached it again. An unfinished move has two links of one program, too.
func (e *exam) twice(c *hook.Chain) {
	if slices.ContainsFunc(e.found, func(f hook.Finding) bool { return f.Check == "leftover" || f.Check == "move" }) {
		return
	}
	for i := range c.Members {
		m := &c.Members[i]
		if m.Kind != hook.KindMember {
			continue
		}
		for j := range e.chains {
			d := &e.chains[j]
			for k := range d.Members {
				// Of hundreds of chains few have such a program: whether they meet is asked last.
				if o := &d.Members[k]; o.Kind != hook.KindMember && o.Program.Same(m.Program) && c.Meets(d) {
					f := at(c, m.Name, "twice", hook.LevelDrift, "its program runs twice: %s on %s (%s) is the same, or a copy; its manager may have put it back", o.Ref(), d.Hook, o.Kind)
					f.Mend = e.on(c, nil, "detach", m.Name)
					e.add(f)
				}
			}
		}
	}
}

// overridden reports the program of a cgroup above that does not run for a cgroup with
// members.
func (e *exam) overridden(c *hook.Chain) {
	if !c.Hook.OnCgroup() {
		return
	}
	prog, where, err := links.Overridable(c.Target, c.Hook)
	switch {
	case errors.Is(err, fs.ErrNotExist): // gone meanwhile
	case err != nil:
		e.add(at(c, "", "unreadable", hook.LevelDrift, "the cgroups above: %s", oneLine(err)))
	case prog.ID != 0:
		f := at(c, "", "overridden", hook.LevelDrift, "the members have switched off %s (id %d) of %s here: it was attached without BPF_F_ALLOW_MULTI", prog.Name, prog.ID, where)
		f.Mend = kernel.Command("", e.bpffs, nil, "adopt", string(c.Hook), where, string(hook.ProgramRef(prog.ID)))
		e.add(f)
	}
}

// isDefunct tells whether the device or cgroup is gone.
func isDefunct(c *hook.Chain) bool {
	return slices.ContainsFunc(c.Members, func(m hook.Member) bool { return m.State == hook.StateDefunct })
}

// heldDefunct reports a chain that a process still holds although its device or cgroup
// is gone. If the chain is pinned, the check of the pins reports it.
func (e *exam) heldDefunct(c *hook.Chain) {
	if len(c.Pins) > 0 {
		return
	}
	var names []string
	for _, m := range c.Members {
		names = append(names, m.Name)
	}
	what := "device is gone"
	if c.Hook.OnCgroup() {
		what = "cgroup is gone"
	}
	if was := c.Members[0].Detail; was != "" {
		what += " (it " + was + ")"
	}
	e.add(at(c, "", "defunct", hook.LevelNote, "the %s, or it was detached; a process still holds: %s", what, list(names)))
}

// displaced reports a member of a chain that is displaced: a holder of the chain's link
// replaced the chain by another program.
func (e *exam) displaced(c *hook.Chain, m *hook.Member) {
	if m.State == hook.StateDisplaced {
		f := at(c, m.Name, "displaced", hook.LevelBroken, "packets do not meet it: the maker of the link that holds the chain has put another program in its place")
		if chains.OnlyPinned(c.LinkID) {
			f.Text += ", and has ended: only the pin of the chain keeps that on the device"
			f.Mend = e.recover()
		}
		e.add(f)
	}
}

// extended reports the functions of the dispatcher and of members that freplace has
// replaced.
func (e *exam) extended(c *hook.Chain) {
	for _, x := range c.Extensions {
		f := at(c, "", "extended", hook.LevelNote, "%s", e.extension(x, ", of the dispatcher"))
		if x.Main {
			f.Level = hook.LevelBroken
			f.Text = e.extension(x, ": packets meet no member until the next change of the chain, which builds another dispatcher")
		}
		e.add(f)
	}
	for i := range c.Members {
		if m := &c.Members[i]; m.Named() {
			for _, x := range m.Extensions {
				e.extendedMember(c, m, x)
			}
		}
	}
}

func (e *exam) extendedMember(c *hook.Chain, m *hook.Member, x hook.Extension) {
	f := at(c, m.Name, "extended", hook.LevelNote, "%s", e.extension(x, ""))
	if x.Main && m.State == hook.StateBypassed {
		f.Level = hook.LevelBroken
		f.Text = e.extension(x, ": packets do not meet the member until it is replaced")
		if m.Sealed {
			f.Text = e.extension(x, ": packets do not meet the member until it is back in its slot")
			f.Mend = e.on(c, nil, "unseal")
		}
	}
	e.add(f)
}

// extension says which program replaces which function, and which command finds the
// holders: only a holder can end it, because the kernel detaches no such link
// (bpf_tracing_link_lops, kernel/bpf/syscall.c).
func (e *exam) extension(x hook.Extension, effect string) string {
	holders := kernel.Command("", e.bpffs, kernel.Flags{"--link", fmt.Sprint(x.LinkID)}, "holders")
	return fmt.Sprintf("freplace has put %v%s; \"%s\" tells which process can close the link", x, effect, holders)
}

// unreadable reports what could not be read.
func (e *exam) unreadable(c *hook.Chain) {
	f := at(c, "", "unreadable", hook.LevelDrift, "%s", oneLine(c.Err))
	switch {
	case len(c.Members) > 0: // a link: only its place was not found
		f.Level = hook.LevelNote
		f.Text = fmt.Sprintf("program %s (id %d): %s", c.Members[0].Program.Name, c.Members[0].Program.ID, f.Text)
	case errors.Is(c.Err, hook.ErrPermission):
		f.Level = hook.LevelNote
	case errors.Is(c.Err, ebpf.ErrNotSupported):
		f.Text += "; use that version, this one leaves the hook alone"
	}
	e.add(f)
}

// unprotected reports a chain that netlink carries.
func (e *exam) unprotected(c *hook.Chain) {
	if c.LinkID != 0 || len(c.Members) == 0 {
		return
	}
	f := at(c, "", "unprotected", hook.LevelDrift, "no link holds the chain: any program that is attached by netlink throws it out; packets pass unfiltered for the moment that the mending takes")
	f.Mend = e.on(c, nil, "adopt")
	e.add(f)
}

// watched reports a dispatcher that still counts although no process measures it.
func (e *exam) watched(c *hook.Chain) {
	if chain := e.loaded[c.DispatcherID]; chain == nil || !state.Abandoned(chain) {
		return
	}
	f := at(c, "", "watched", hook.LevelDrift, "the \"dispatcher top\" that watched it was killed: its dispatcher still checks for a watcher, for each packet, until the next change")
	f.Mend = e.recover()
	e.add(f)
}

// slot looks at a member of a chain.
func (e *exam) slot(c *hook.Chain, m *hook.Member) {
	switch {
	case m.State == hook.StateEmpty && m.OnMissing == hook.MissingContinue:
		f := at(c, m.Name, "empty", hook.LevelDrift, "its owner is gone: packets pass it by, and the next change of the chain leaves it out")
		f.Mend = e.on(c, nil, "detach", m.Name)
		e.add(f)
	case m.State == hook.StateEmpty:
		f := at(c, m.Name, "empty", hook.LevelBroken, "its owner is gone, and it asked for %v: packets that come to it are dropped until it is detached, or attached again", m.OnMissing)
		f.Mend = e.on(c, nil, "detach", m.Name)
		e.add(f)
	case m.Persistent && !pinned(c, m):
		e.add(at(c, m.Name, "unpinned", hook.LevelNote, "it shall outlive its process, and is not pinned in %s: it may be in another bpffs, or somebody removed the pin", e.bpffs))
	}
}

// pinned tells whether some of the pins that were read are the member's.
func pinned(c *hook.Chain, m *hook.Member) bool {
	return slices.ContainsFunc(c.Pins, func(path string) bool {
		_, _, member, err := state.ParseHeldPath(path)
		return err == nil && member == m.Name && strings.HasSuffix(path, "/slot")
	})
}

// maxTailCalls is how many tail calls a packet may make (MAX_TAIL_CALL_CNT,
// linux/bpf.h). Linux 6.1 counts the tail calls of a member apart from the chain's.
const maxTailCalls = 33

// tailCalls looks for members that the kernel may skip, because a member before them
// makes tail calls too. How many tail calls that member makes is not known.
func (e *exam) tailCalls(c *hook.Chain) {
	greedy := slices.IndexFunc(c.Members, func(m hook.Member) bool { return m.TailCalls })
	if greedy < 0 || greedy == len(c.Members)-1 || !kernel.Since(6, 2) {
		return
	}
	var after []string
	for _, m := range c.Members[greedy+1:] {
		after = append(after, fmt.Sprintf("%s (%v)", m.Name, m.OnMissing))
	}
	e.add(at(c, c.Members[greedy].Name, "tail-calls", hook.LevelNote, "it makes tail calls of its own: %d are allowed for a packet and the chain needs %d, so when its own are more than %d, members after it are skipped, as if they were missing: %s",
		maxTailCalls, len(c.Members), maxTailCalls-len(c.Members), list(after)))
}

// order looks for members that do not run in the order of their priorities, and for
// members with an unknown priority.
func (e *exam) order(c *hook.Chain) {
	var ranked []*hook.Member
	if slices.ContainsFunc(c.Members, func(m hook.Member) bool { return e.unsettled(m.LinkID) }) {
		return // a move is not finished: the order is checked after that
	}
	for i := range c.Members {
		m := &c.Members[i]
		switch {
		case m.Kind != hook.KindMember:
		case m.Priority == 0:
			f := at(c, m.Name, "priority", hook.LevelNote, "its priority is not known: its record is gone, or damaged")
			f.Mend = e.on(c, kernel.Flags{"--priority", fmt.Sprint(hook.DefaultPriority)}, "set", m.Name)
			e.add(f)
		default:
			ranked = append(ranked, m)
		}
	}
	for _, m := range strays(ranked) {
		f := at(c, m.Name, "order", hook.LevelDrift, "it is not where its priority, %d, says: the order is %s", m.Priority, places(ranked))
		if c.Hook.OnCgroup() && c.Revision == 0 {
			f.Level = hook.LevelNote
			f.Text += "; this kernel attaches behind all others"
		} else {
			f.Mend = e.on(c, kernel.Flags{"--priority", fmt.Sprint(m.Priority)}, "set", m.Name)
		}
		e.add(f)
	}
}

// strays returns the fewest members that must be moved to put all in order: the members
// outside the longest subsequence of priorities that do not fall.
func strays(members []*hook.Member) []*hook.Member {
	priorities := make([]int, len(members))
	for i, m := range members {
		priorities[i] = m.Priority
	}
	stray := slices.Clone(members)
	for _, i := range dispatch.Rising(priorities) {
		stray[i] = nil
	}
	return slices.DeleteFunc(stray, func(m *hook.Member) bool { return m == nil })
}

func places(members []*hook.Member) string {
	var words []string
	for _, m := range members {
		words = append(words, fmt.Sprintf("%s (%d)", m.Name, m.Priority))
	}
	return strings.Join(words, ", ")
}

// inFront reports programs of other tools that see packets before all members.
func (e *exam) inFront(c *hook.Chain) {
	first := slices.IndexFunc(c.Members, func(m hook.Member) bool { return m.Kind == hook.KindMember })
	if first == 0 {
		return
	}
	var words []string
	for _, m := range c.Members[:first] {
		ref := hook.ProgramRef(m.Program.ID)
		if m.LinkID != 0 {
			ref = hook.LinkRef(m.LinkID)
		}
		words = append(words, fmt.Sprintf("%s (%s, program %s)", ref, m.Kind, m.Program.Name))
	}
	e.add(at(c, "", "in-front", hook.LevelNote, "run before the first member, and are not ours: %s", list(words)))
}
