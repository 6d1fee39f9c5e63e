package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/libdispatcher/dispatcher/hook"
)

// printChains prints chains, or the chains that a dry run would make, and their holders
// if held is not nil.
func (a *app) printChains(chains []hook.Chain, held [][]hook.Held, dryRun bool) error {
	unread := 0
	for i := range chains {
		if chains[i].Err != nil && len(chains[i].Members) == 0 {
			unread++
		}
	}
	if unread > 0 {
		a.warn("not all hooks could be read: see the errors in the list (%d)", unread)
	}
	if a.format == formatJSON {
		out := jsonChains{Version: schema, DryRun: dryRun, Hooks: []jsonChain{}}
		for i := range chains {
			j := describeChain(chains[i], dryRun)
			if held != nil {
				j.Held = describeHeld(held[i])
			}
			out.Hooks = append(out.Hooks, j)
		}
		return a.printJSON(out)
	}
	if len(chains) == 0 {
		a.note("nothing is attached")
	}
	var b strings.Builder
	for i := range chains {
		c := &chains[i]
		if len(c.Members) == 0 && len(c.Others) == 0 && c.Err == nil {
			a.note("nothing is attached to %s %s", c.Hook, c.Target)
			continue
		}
		if b.Len() > 0 {
			b.WriteByte('\n')
		}
		a.chain(&b, c, dryRun)
		if held != nil {
			for _, h := range held[i] {
				b.WriteString("  " + heldLine(h) + "\n")
				a.holders(&b, "    ", h.Holders, mostObjects)
			}
		}
	}
	return a.print(b.String())
}

// chain writes the chain of a hook: a headline, and a line for each entry.
func (a *app) chain(b *strings.Builder, c *hook.Chain, dryRun bool) {
	wide := a.format == formatWide
	b.WriteString(strings.Join(headline(c, wide, dryRun), "  ") + "\n")
	switch {
	case c.Err != nil && len(c.Members) == 0:
		b.WriteString("  " + a.paint(a.stdout, "cannot be read: "+why(c.Err), red) + "\n")
		return
	case c.Err != nil:
		b.WriteString("  " + a.paint(a.stdout, why(c.Err), yellow) + "\n")
	}
	if len(c.Members) > 0 {
		a.table(b, "  ", rowsOf(c, wide))
	}
	for _, f := range c.Others {
		b.WriteString("  " + f.String() + "\n")
	}
	a.extensions(b, c)
	if wide {
		for _, pin := range c.Pins {
			b.WriteString("  pin " + pin + "\n")
		}
	}
}

// rowsOf returns the head of the table of entries, and a row for each.
func rowsOf(c *hook.Chain, wide bool) [][]cell {
	columns := columnsOf(c, wide)
	rows := make([][]cell, 1, len(c.Members)+1)
	for _, col := range columns {
		rows[0] = append(rows[0], cell{text: col.head})
	}
	for i := range c.Members {
		var row []cell
		for _, col := range columns {
			row = append(row, col.cell(&c.Members[i]))
		}
		rows = append(rows, row)
	}
	return rows
}

// extensions writes what freplace has put in the place of functions.
func (a *app) extensions(b *strings.Builder, c *hook.Chain) {
	line := func(whose string, list []hook.Extension) {
		for _, x := range list {
			b.WriteString("  " + a.paint(a.stdout, fmt.Sprintf("freplace on %s: %v", whose, x), red) + "\n")
		}
	}
	line("the dispatcher", c.Extensions)
	for i := range c.Members {
		m := &c.Members[i]
		line(string(m.Ref()), m.Extensions)
	}
}

func headline(c *hook.Chain, wide, dryRun bool) []string {
	var parts []string
	if at := where(c); at != "" {
		parts = append(parts, at)
	}
	netns := netnsPart(c, wide)
	if netns != "" && !wide {
		parts = append(parts, netns)
	}
	switch {
	case len(c.Members) == 0: // the chain could not be read
	case c.Hook == hook.XDP && c.Ifindex == 0: // the device is gone, so nothing is protected
		parts = append(parts, fmt.Sprintf("link %d", c.LinkID))
	case c.Hook == hook.XDP:
		parts = append(parts, chainParts(c, wide, dryRun)...)
	default:
		parts = append(parts, "verdicts are the programs' own")
		if wide && c.Revision != 0 {
			parts = append(parts, fmt.Sprintf("revision %d", c.Revision))
		}
	}
	if dryRun {
		parts = append(parts, "dry run")
	}
	if netns != "" && wide {
		parts = append(parts, netns)
	}
	return parts
}

// where names a hook and its target. A network namespace as a whole has no
// hook.
func where(c *hook.Chain) string {
	switch h := c.Hook; {
	case h == "" && c.NetNS.Inode != 0:
		return ""
	case h == "":
		return strings.TrimSpace("cgroups " + c.Target)
	case h.OnNetNS(), c.Target == "" && c.Err != nil && c.Ifindex == 0 && c.CgroupID == 0:
		return string(h)
	case h.OnCgroup():
		return hook.EventTarget{Hook: h, Target: c.Target, CgroupID: c.CgroupID}.String()
	case c.Ifindex == 0:
		return fmt.Sprintf("%s (on no device)", h)
	}
	return strings.TrimSpace(fmt.Sprintf("%s %s", c.Hook, c.Target)) + fmt.Sprintf(" (ifindex %d)", c.Ifindex)
}

// netnsPart names the network namespace if that helps. The library sets the
// name when it has read several namespaces and this is not the caller's own.
func netnsPart(c *hook.Chain, wide bool) string {
	switch ns := c.NetNS; {
	case ns.Name != "" && wide:
		return fmt.Sprintf("netns %s (%d)", ns.Name, ns.Inode)
	case ns.Name != "":
		return "netns " + ns.Name
	case ns.Inode != 0 && (wide || c.Err != nil):
		return fmt.Sprintf("netns %d", ns.Inode)
	}
	return ""
}

// chainParts returns the headline's parts about XDP.
func chainParts(c *hook.Chain, wide, dryRun bool) []string {
	parts := []string{c.Mode.String()}
	if c.LinkID != 0 {
		parts = append(parts, fmt.Sprintf("link %d", c.LinkID))
	}
	if wide && c.DispatcherID != 0 {
		parts = append(parts, fmt.Sprintf("dispatcher %d", c.DispatcherID))
	}
	if c.Frags {
		parts = append(parts, "frags")
	}
	switch {
	case c.Style == hook.StyleLibxdp:
		parts = append(parts, fmt.Sprintf("libxdp (config version %d)", c.ConfigVersion))
		if len(c.Pins) == 0 && !dryRun {
			parts = append(parts, "without its pins")
		}
		parts = append(parts, "not protected")
	case c.Bypassed():
		parts = append(parts, "bypassed by freplace")
	case c.Members[0].Kind == hook.KindForeign:
		parts = append(parts, "held by another tool")
	case protected(c, dryRun):
		parts = append(parts, "protected")
	default:
		parts = append(parts, "not protected, may be adopted")
	}
	return parts
}

// protected tells whether other tools cannot replace what is attached. In a dry
// run a chain's first member would bring the missing link.
func protected(c *hook.Chain, dryRun bool) bool {
	if c.Hook == hook.XDP {
		return c.Protected() || dryRun && len(c.Members) == 1 && c.Style != hook.StyleLibxdp
	}
	exposed := func(m hook.Member) bool { return !entryProtected(c, &m, dryRun) }
	return len(c.Members) > 0 && !slices.ContainsFunc(c.Members, exposed)
}

// entryProtected is protected for one entry. In a dry run a member would have a
// link, unless it is a filter.
func entryProtected(c *hook.Chain, m *hook.Member, dryRun bool) bool {
	if c.Hook == hook.XDP {
		return protected(c, dryRun)
	}
	return m.Protected() || dryRun && m.Kind == hook.KindMember && m.Filter == nil
}

// A column of a hook's table.
type column struct {
	head string
	cell func(*hook.Member) cell
}

// columnsOf chooses the columns for a hook: on XDP the columns of a chain,
// elsewhere links and details.
func columnsOf(c *hook.Chain, wide bool) []column {
	has := func(value func(*hook.Member) string) bool {
		return slices.ContainsFunc(c.Members, func(m hook.Member) bool { return value(&m) != "" })
	}
	detail := func(m *hook.Member) string { return m.Detail }
	from := func(m *hook.Member) string { return m.From }
	xdp := c.Hook == hook.XDP

	columns := []column{
		{"PRIO", priorityCell},
		{"NAME", textCell(func(m *hook.Member) string { return m.Name })},
		{"PROGRAM", textCell(func(m *hook.Member) string { return m.Program.Name })},
		{"ID", func(m *hook.Member) cell { return number(m.Program.ID) }},
	}
	if xdp {
		columns = append(columns,
			column{"CONTINUE", ofMember(func(m *hook.Member) string { return m.ContinueOn.String() })},
			column{"MISSING", ofMember(missingText)})
	} else {
		columns = append(columns, column{"LINK", linkCell})
	}
	columns = append(columns, column{"STATE", stateCell}, column{"OWNER", textCell(func(m *hook.Member) string { return m.Owner })})
	if has(from) {
		columns = append(columns, column{"FROM", textCell(from)})
	}
	if wide {
		columns = append(columns,
			column{"TAG", textCell(func(m *hook.Member) string { return m.Program.Tag })},
			column{"LOADED", textCell(loaded)},
			column{"UID", textCell(loader)})
		if xdp {
			columns = append(columns, column{"SLOT", func(m *hook.Member) cell { return number(m.SlotID) }})
		}
		columns = append(columns,
			column{"PERSISTENT", func(m *hook.Member) cell { return yes(m.Persistent) }},
			column{"TAILCALLS", func(m *hook.Member) cell { return yes(m.TailCalls) }})
	}
	if has(detail) || wide && !xdp {
		columns = append(columns, column{"DETAIL", textCell(detail)})
	}
	return columns
}

func textCell(value func(*hook.Member) string) func(*hook.Member) cell {
	return func(m *hook.Member) cell { return cell{text: orDash(value(m))} }
}

// ofMember makes a column that is empty for entries that are not members.
func ofMember(value func(*hook.Member) string) func(*hook.Member) cell {
	return func(m *hook.Member) cell {
		if !m.Named() {
			return cell{text: "-"}
		}
		return cell{text: value(m)}
	}
}

// missingText says what happens while a slot is empty. Members of libxdp chains
// have no choice.
func missingText(m *hook.Member) string {
	if m.Kind == hook.KindLibxdp {
		return hook.MissingContinue.String()
	}
	return m.OnMissing.String()
}

// priorityCell is a dash for an entry without a priority. libxdp's priorities
// begin at 0.
func priorityCell(m *hook.Member) cell {
	if m.Kind == hook.KindLibxdp && m.Program.ID != 0 {
		return cell{text: strconv.Itoa(m.Priority)}
	}
	return number(uint32(m.Priority))
}

// linkCell is the link that attaches an entry, or the reason why there is none.
func linkCell(m *hook.Member) cell {
	switch {
	case m.LinkID != 0:
		return number(m.LinkID)
	case m.Kind == hook.KindLegacy:
		return cell{text: string(hook.KindLegacy)}
	case m.Filter != nil:
		return cell{text: "not protected"}
	}
	return cell{text: "-"} // a dry run
}

// stateCell is a member's state, or the kind of another entry.
func stateCell(m *hook.Member) cell {
	switch {
	case m.State == hook.StateBypassed, m.State == hook.StateOverridden, m.Kind == hook.KindLibxdp && m.State == hook.StateEmpty:
		return cell{string(m.State), red}
	case m.Kind != hook.KindMember:
		return cell{string(m.Kind), yellow}
	case m.State == hook.StateRunning && m.Sealed:
		return cell{"sealed", green}
	case m.State == hook.StateRunning:
		return cell{string(m.State), green}
	}
	return cell{string(m.State), red}
}

func loaded(m *hook.Member) string {
	if m.Program.LoadedAt.IsZero() {
		return ""
	}
	return m.Program.LoadedAt.Local().Format(time.RFC3339)
}

// loader returns the user id that loaded the program.
func loader(m *hook.Member) string {
	if m.Program.ID == 0 {
		return ""
	}
	return strconv.FormatUint(uint64(m.Program.LoadedBy), 10)
}
