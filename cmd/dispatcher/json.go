package main

import (
	"slices"

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
	hook.Chain
	Mode      string       `json:"mode,omitempty"` // of XDP; left out when nothing is attached
	Protected bool         `json:"protected"`
	Members   []jsonMember `json:"members"`
	Error     string       `json:"error,omitempty"`
	Held      []jsonHeld   `json:"held,omitempty"` // with --holders
}

type jsonMember struct {
	*hook.Member
	ContinueBy string   `json:"continue_by"`
	ContinueOn []string `json:"continue_on"`
	OnMissing  string   `json:"on_missing,omitempty"` // left out for entries that are not members
	Protected  bool     `json:"protected"`
}

func describeChain(c hook.Chain, dryRun bool) jsonChain {
	j := jsonChain{Chain: c, Protected: protected(&c, dryRun), Members: []jsonMember{}}
	j.Pins = append([]string{}, slices.Sorted(slices.Values(c.Pins))...)
	if len(c.Members) > 0 && c.Hook == hook.XDP {
		j.Mode = c.Mode.String()
	}
	if c.Err != nil {
		j.Error = why(c.Err)
	}
	for i := range c.Members {
		m := &c.Members[i]
		j.Members = append(j.Members, describeMember(c.Hook, m, entryProtected(&c, m, dryRun)))
	}
	return j
}

func describeMember(h hook.Hook, m *hook.Member, protected bool) jsonMember {
	j := jsonMember{Member: m, ContinueBy: "program", ContinueOn: []string{}, Protected: protected}
	if h == hook.XDP {
		j.ContinueBy = "chain"
	}
	for _, v := range m.ContinueOn.List() {
		j.ContinueOn = append(j.ContinueOn, v.String())
	}
	if m.OnMissing != 0 {
		j.OnMissing = m.OnMissing.String()
	}
	return j
}
