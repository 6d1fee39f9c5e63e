package main

import (
	"time"

	"github.com/libdispatcher/dispatcher/hook"
)

// The JSON of an event is a contract, like the JSON of a chain.
type jsonEvent struct {
	Version        int            `json:"version"`
	Time           time.Time      `json:"time"`
	Event          string         `json:"event"`
	jsonTarget                    // where
	From           *jsonTarget    `json:"from,omitempty"`
	Kind           string         `json:"kind,omitempty"`
	Name           string         `json:"name"`
	LinkID         uint32         `json:"link_id,omitempty"`
	Before         *jsonMember    `json:"before"`
	After          *jsonMember    `json:"after"`
	PositionBefore int            `json:"position_before,omitempty"`
	PositionAfter  int            `json:"position_after,omitempty"`
	Entries        int            `json:"entries"`
	By             *jsonMember    `json:"by,omitempty"`
	Extension      *jsonExtension `json:"extension,omitempty"`
	Who            *jsonProcess   `json:"who,omitempty"`
	Error          string         `json:"error,omitempty"`
}

type jsonTarget struct {
	Hook     string    `json:"hook"`
	Target   string    `json:"target"`
	Ifindex  int       `json:"ifindex"`
	CgroupID uint64    `json:"cgroup_id,omitempty"`
	NetNS    jsonNetNS `json:"netns"`
}

type jsonProcess struct {
	PID  int    `json:"pid"`
	Comm string `json:"comm"`
	Call string `json:"call"`
}

func describeEvent(e *hook.Event) jsonEvent {
	j := jsonEvent{
		Version: schema, Time: e.Time.UTC(), Event: string(e.Kind), jsonTarget: describeTarget(&e.EventTarget),
		Kind: string(e.Entry), Name: e.Name, LinkID: e.LinkID,
		PositionBefore: e.PositionBefore, PositionAfter: e.PositionAfter, Entries: e.Entries,
		Who: (*jsonProcess)(e.Who), Error: oneLine(e.Err),
	}
	if e.Extension != nil {
		j.Extension = &describeExtensions([]hook.Extension{*e.Extension})[0]
	}
	if e.From != nil {
		from := describeTarget(e.From)
		j.From = &from
	}
	entry := func(m *hook.Member) *jsonMember {
		if m == nil {
			return nil
		}
		d := describeMember(m)
		d.ContinueBy = "program"
		d.Protected = m.Protected()
		if e.Hook == hook.XDP {
			d.ContinueBy, d.Protected = "chain", e.LinkID != 0 && m.State != hook.StateBypassed
		}
		return &d
	}
	j.Before, j.After, j.By = entry(e.Before), entry(e.After), entry(e.By)
	return j
}

func describeTarget(p *hook.EventTarget) jsonTarget {
	return jsonTarget{string(p.Hook), p.Target, p.Ifindex, p.CgroupID, jsonNetNS(p.NetNS)}
}
