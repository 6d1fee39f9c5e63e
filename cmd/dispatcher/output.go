package main

import (
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/libdispatcher/dispatcher/hook"
)

// The JSON of a chain is a contract: fields are added and never change. Lists
// are never null; what does not apply is left out.
type jsonChains struct {
	Version int         `json:"version"`
	DryRun  bool        `json:"dry_run,omitempty"`
	Hooks   []jsonChain `json:"hooks"`
}

type jsonChain struct {
	Hook    string    `json:"hook"`
	Target  string    `json:"target"`
	Ifindex int       `json:"ifindex"`
	NetNS   jsonNetNS `json:"netns"`
	Mode    string    `json:"mode,omitempty"` // left out when nothing is attached
	// LinkID is left out when no link holds the hook, DispatcherID when what
	// is attached is not a chain of libdispatcher's.
	LinkID       uint32       `json:"link_id,omitempty"`
	DispatcherID uint32       `json:"dispatcher_id,omitempty"`
	Protected    bool         `json:"protected"`
	Frags        bool         `json:"frags"`
	Pins         []string     `json:"pins"`
	Members      []jsonMember `json:"members"`
}

type jsonNetNS struct {
	Inode  uint64 `json:"inode"`
	Cookie uint64 `json:"cookie"`
}

type jsonMember struct {
	Name string `json:"name"`
	// Priority and OnMissing are left out for what is not a member.
	Priority   int          `json:"priority,omitempty"`
	ContinueOn []string     `json:"continue_on"`
	OnMissing  string       `json:"on_missing,omitempty"`
	Program    *jsonProgram `json:"program"` // null for an empty slot
	Persistent bool         `json:"persistent"`
	Kind       string       `json:"kind"`
	State      string       `json:"state"`
	Owner      string       `json:"owner,omitempty"`
	SlotID     uint32       `json:"slot_id,omitempty"`
	TailCalls  bool         `json:"tail_calls"`
}

type jsonProgram struct {
	ID       uint32     `json:"id"`
	Name     string     `json:"name"`
	Tag      string     `json:"tag"`
	LoadedAt *time.Time `json:"loaded_at,omitempty"`
}

func describeChain(c *hook.Chain, dryRun bool) jsonChain {
	j := jsonChain{
		Hook:         string(c.Hook),
		Target:       c.Target,
		Ifindex:      c.Ifindex,
		NetNS:        jsonNetNS{c.NetNS.Inode, c.NetNS.Cookie},
		LinkID:       c.LinkID,
		DispatcherID: c.DispatcherID,
		Protected:    protected(c, dryRun),
		Frags:        c.Frags,
		Pins:         append([]string{}, c.Pins...),
		Members:      []jsonMember{},
	}
	if len(c.Members) > 0 {
		j.Mode = c.Mode.String()
	}
	for _, m := range c.Members {
		j.Members = append(j.Members, describeMember(m))
	}
	return j
}

func describeMember(m hook.Member) jsonMember {
	j := jsonMember{
		Name:       m.Name,
		Priority:   m.Priority,
		ContinueOn: []string{},
		Program:    describeProgram(m.Program),
		Persistent: m.Persistent,
		Kind:       string(m.Kind),
		State:      string(m.State),
		Owner:      m.Owner,
		SlotID:     m.SlotID,
		TailCalls:  m.TailCalls,
	}
	for _, v := range m.ContinueOn.List() {
		j.ContinueOn = append(j.ContinueOn, v.String())
	}
	if m.OnMissing != 0 {
		j.OnMissing = m.OnMissing.String()
	}
	return j
}

func describeProgram(p hook.Program) *jsonProgram {
	if p.ID == 0 {
		return nil
	}
	j := &jsonProgram{ID: p.ID, Name: p.Name, Tag: p.Tag}
	if !p.LoadedAt.IsZero() {
		at := p.LoadedAt.UTC().Truncate(time.Second)
		j.LoadedAt = &at
	}
	return j
}

// printChains prints what is attached, or would be after a dry run.
func (a *app) printChains(chains []hook.Chain, dryRun bool) error {
	if a.format == formatJSON {
		out := jsonChains{Version: schema, DryRun: dryRun, Hooks: []jsonChain{}}
		for i := range chains {
			out.Hooks = append(out.Hooks, describeChain(&chains[i], dryRun))
		}
		return a.printJSON(out)
	}
	if len(chains) == 0 {
		a.note("nothing is attached")
	}
	var b strings.Builder
	for i := range chains {
		c := &chains[i]
		if len(c.Members) == 0 {
			a.note("nothing is attached to %s %s", c.Hook, c.Target)
			continue
		}
		if b.Len() > 0 {
			b.WriteByte('\n')
		}
		a.chain(&b, c, dryRun)
	}
	return a.print(b.String())
}

// chain writes a chain that has members: a line about the hook, and one for each.
func (a *app) chain(b *strings.Builder, c *hook.Chain, dryRun bool) {
	wide := a.format == formatWide
	b.WriteString(strings.Join(headline(c, wide, dryRun), "  ") + "\n")

	header := heads("PRIO", "NAME", "PROGRAM", "ID", "CONTINUE", "MISSING", "STATE", "OWNER")
	if wide {
		header = append(header, heads("TAG", "LOADED", "SLOT", "PERSISTENT", "TAILCALLS")...)
	}
	rows := [][]cell{header}
	for i := range c.Members {
		rows = append(rows, row(&c.Members[i], wide))
	}
	a.table(b, "  ", rows)
	if wide {
		for _, pin := range c.Pins {
			b.WriteString("  pin " + pin + "\n")
		}
	}
}

func headline(c *hook.Chain, wide, dryRun bool) []string {
	where := fmt.Sprintf("%s %s (ifindex %d)", c.Hook, c.Target, c.Ifindex)
	if c.Ifindex == 0 {
		where = fmt.Sprintf("%s (the device is gone)", c.Hook)
	}
	parts := []string{where, c.Mode.String()}
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
	case c.Members[0].Kind == hook.KindForeign:
		parts = append(parts, "held by another tool")
	case protected(c, dryRun):
		parts = append(parts, "protected")
	default:
		parts = append(parts, "not protected, may be adopted")
	}
	if dryRun {
		parts = append(parts, "dry run")
	}
	if wide {
		parts = append(parts, fmt.Sprintf("netns %d", c.NetNS.Inode))
	}
	return parts
}

// protected tells whether others cannot replace what is attached. In a dry run
// a chain's first member would bring the link that is not there yet.
func protected(c *hook.Chain, dryRun bool) bool {
	return c.Protected() || dryRun && len(c.Members) == 1
}

func row(m *hook.Member, wide bool) []cell {
	prio, continueOn, missing := "-", "-", "-"
	if m.Kind == hook.KindMember {
		prio, continueOn, missing = strconv.Itoa(m.Priority), m.ContinueOn.String(), m.OnMissing.String()
	}
	cells := []cell{{text: prio}, {text: orDash(m.Name)}, {text: orDash(m.Program.Name)}, number(m.Program.ID),
		{text: continueOn}, {text: missing}, stateCell(m), {text: orDash(m.Owner)}}
	if wide {
		loaded := "-"
		if !m.Program.LoadedAt.IsZero() {
			loaded = m.Program.LoadedAt.Local().Format(time.RFC3339)
		}
		cells = append(cells, cell{text: orDash(m.Program.Tag)}, cell{text: loaded}, number(m.SlotID), yes(m.Persistent), yes(m.TailCalls))
	}
	return cells
}

// stateCell is the state, and for what is not a member the kind.
func stateCell(m *hook.Member) cell {
	switch {
	case m.Kind != hook.KindMember:
		return cell{string(m.Kind), yellow}
	case m.State == hook.StateRunning:
		return cell{string(m.State), green}
	}
	return cell{string(m.State), red}
}

// A cell of a table; color may be empty.
type cell struct{ text, color string }

func heads(texts ...string) []cell {
	cells := make([]cell, 0, len(texts))
	for _, t := range texts {
		cells = append(cells, cell{text: t})
	}
	return cells
}

func number(n uint32) cell {
	if n == 0 {
		return cell{text: "-"}
	}
	return cell{text: strconv.FormatUint(uint64(n), 10)}
}

func yes(b bool) cell {
	if b {
		return cell{text: "yes"}
	}
	return cell{text: "no"}
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// table writes rows with columns as wide as need be, and nothing after the
// last one of a line.
func (a *app) table(b *strings.Builder, indent string, rows [][]cell) {
	var widths []int
	for _, r := range rows {
		for i, c := range r {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(c.text))
		}
	}
	for _, r := range rows {
		b.WriteString(indent)
		for i, c := range r {
			b.WriteString(a.paint(a.stdout, c.text, c.color))
			if i < len(r)-1 {
				b.WriteString(strings.Repeat(" ", widths[i]-utf8.RuneCountInString(c.text)+2))
			}
		}
		b.WriteByte('\n')
	}
}
