package main

import (
	"slices"
	"time"

	"github.com/libdispatcher/dispatcher/hook"
)

// The JSON of a chain is a contract: fields may be added, and never change.
// Lists are never null; fields that do not apply are left out.
type jsonChains struct {
	Version int         `json:"version"`
	DryRun  bool        `json:"dry_run,omitempty"`
	Hooks   []jsonChain `json:"hooks"`
}

type jsonChain struct {
	Hook     string    `json:"hook"`
	Target   string    `json:"target"`
	Ifindex  int       `json:"ifindex"`
	CgroupID uint64    `json:"cgroup_id,omitempty"`
	NetNS    jsonNetNS `json:"netns"`          // zero for cgroups
	Mode     string    `json:"mode,omitempty"` // of XDP; left out when nothing is attached
	Revision uint64    `json:"revision,omitempty"`
	// LinkID is left out when no link holds the XDP hook; Style and DispatcherID are
	// left out when there is no chain.
	Style         string   `json:"style,omitempty"`
	ConfigVersion uint8    `json:"config_version,omitempty"` // of libxdp
	LinkID        uint32   `json:"link_id,omitempty"`
	DispatcherID  uint32   `json:"dispatcher_id,omitempty"`
	Protected     bool     `json:"protected"`
	Frags         bool     `json:"frags"`
	Pins          []string `json:"pins"`
	// Extensions are those of the dispatcher.
	Extensions []jsonExtension `json:"extensions,omitempty"`
	Members    []jsonMember    `json:"members"`
	Error      string          `json:"error,omitempty"`
	Held       []jsonHeld      `json:"held,omitempty"` // with --holders
}

type jsonNetNS struct {
	Inode  uint64 `json:"inode"`
	Cookie uint64 `json:"cookie"`
	Name   string `json:"name,omitempty"`
}

type jsonMember struct {
	Name string `json:"name"`
	// Priority and OnMissing are left out for entries that are not members.
	Priority   int             `json:"priority,omitempty"`
	ContinueBy string          `json:"continue_by"`
	ContinueOn []string        `json:"continue_on"`
	OnMissing  string          `json:"on_missing,omitempty"`
	Program    *jsonProgram    `json:"program"` // null for an empty slot
	Persistent bool            `json:"persistent"`
	Protected  bool            `json:"protected"`
	Kind       string          `json:"kind"`
	State      string          `json:"state"`
	Owner      string          `json:"owner,omitempty"`
	LinkID     uint32          `json:"link_id,omitempty"`
	SlotID     uint32          `json:"slot_id,omitempty"`
	TailCalls  bool            `json:"tail_calls"`
	Sealed     bool            `json:"sealed,omitempty"` // of XDP
	Filter     *jsonFilter     `json:"filter,omitempty"`
	From       string          `json:"from,omitempty"`
	Detail     string          `json:"detail,omitempty"`
	Extensions []jsonExtension `json:"extensions,omitempty"`
}

// A jsonExtension is what freplace has put in the place of a function.
type jsonExtension struct {
	Function string       `json:"function"`
	Main     bool         `json:"main"`
	LinkID   uint32       `json:"link_id"`
	Program  *jsonProgram `json:"program"`
}

type jsonFilter struct {
	Parent       uint32 `json:"parent"`
	Chain        uint32 `json:"chain"`
	Pref         uint16 `json:"pref"`
	Protocol     uint16 `json:"protocol"`
	Handle       uint32 `json:"handle"`
	DirectAction bool   `json:"direct_action"`
}

type jsonProgram struct {
	ID       uint32     `json:"id"`
	Name     string     `json:"name"`
	Tag      string     `json:"tag"`
	LoadedAt *time.Time `json:"loaded_at,omitempty"`
	LoadedBy uint32     `json:"loaded_by_uid"`
}

func describeChain(c *hook.Chain, dryRun bool) jsonChain {
	j := jsonChain{
		Hook:          string(c.Hook),
		Target:        c.Target,
		Ifindex:       c.Ifindex,
		CgroupID:      c.CgroupID,
		NetNS:         jsonNetNS(c.NetNS),
		Revision:      c.Revision,
		LinkID:        c.LinkID,
		Style:         string(c.Style),
		ConfigVersion: c.ConfigVersion,
		DispatcherID:  c.DispatcherID,
		Protected:     protected(c, dryRun),
		Frags:         c.Frags,
		Pins:          append([]string{}, slices.Sorted(slices.Values(c.Pins))...),
		Extensions:    describeExtensions(c.Extensions),
		Members:       []jsonMember{},
	}
	if len(c.Members) > 0 && c.Hook == hook.XDP {
		j.Mode = c.Mode.String()
	}
	if c.Err != nil {
		j.Error = why(c.Err)
	}
	for i := range c.Members {
		m := describeMember(&c.Members[i])
		m.ContinueBy = "program"
		if c.Hook == hook.XDP {
			m.ContinueBy = "chain"
		}
		m.Protected = entryProtected(c, &c.Members[i], dryRun)
		j.Members = append(j.Members, m)
	}
	return j
}

func describeMember(m *hook.Member) jsonMember {
	j := jsonMember{
		Name:       m.Name,
		Priority:   m.Priority,
		ContinueOn: []string{},
		Program:    describeProgram(m.Program),
		Persistent: m.Persistent,
		Kind:       string(m.Kind),
		State:      string(m.State),
		Owner:      m.Owner,
		LinkID:     m.LinkID,
		SlotID:     m.SlotID,
		TailCalls:  m.TailCalls,
		Sealed:     m.Sealed,
		Filter:     (*jsonFilter)(m.Filter),
		From:       m.From,
		Detail:     m.Detail,
		Extensions: describeExtensions(m.Extensions),
	}
	for _, v := range m.ContinueOn.List() {
		j.ContinueOn = append(j.ContinueOn, v.String())
	}
	if m.OnMissing != 0 {
		j.OnMissing = m.OnMissing.String()
	}
	return j
}

func describeExtensions(list []hook.Extension) (out []jsonExtension) {
	for _, x := range list {
		out = append(out, jsonExtension{x.Function, x.Main, x.LinkID, describeProgram(x.Program)})
	}
	return out
}

func describeProgram(p hook.Program) *jsonProgram {
	if p.ID == 0 {
		return nil
	}
	j := &jsonProgram{ID: p.ID, Name: p.Name, Tag: p.Tag, LoadedBy: p.LoadedBy}
	if !p.LoadedAt.IsZero() {
		at := p.LoadedAt.UTC().Truncate(time.Second)
		j.LoadedAt = &at
	}
	return j
}
