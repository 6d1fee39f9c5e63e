package main

import (
	"encoding/hex"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/packet"
)

// The JSON of explain is a contract, like the JSON of a chain.
type jsonExplained struct {
	Version int `json:"version"`
	hook.EventTarget
	Style      hook.Style   `json:"style,omitempty"`
	ToldApart  bool         `json:"told_apart"`
	Members    []jsonMember `json:"members"`
	Packets    []jsonPacket `json:"packets"`
	Summary    jsonSum      `json:"summary"`
	Expected   string       `json:"expected,omitempty"`
	Unexpected int          `json:"unexpected"`
}

type jsonPacket struct {
	Number  int        `json:"number"`
	Length  int        `json:"length"`
	Text    string     `json:"text"`
	Data    string     `json:"data"`
	Verdict string     `json:"verdict,omitempty"`
	By      string     `json:"by,omitempty"`
	Onward  hook.Hook  `json:"onward,omitempty"`
	Error   string     `json:"error,omitempty"`
	Steps   []jsonStep `json:"steps"`
}

type jsonStep struct {
	Member   string      `json:"member"`
	Program  uint32      `json:"program_id,omitempty"`
	Outcome  string      `json:"outcome"`
	Returned *int32      `json:"returned,omitempty"`
	Says     string      `json:"says,omitempty"`
	GoesOn   bool        `json:"goes_on"`
	Change   *jsonChange `json:"change,omitempty"`
}

type jsonChange struct {
	Head     int        `json:"head"`
	Tail     int        `json:"tail"`
	Meta     int        `json:"metadata"`
	Mark     *uint32    `json:"mark,omitempty"`
	Priority *uint32    `json:"priority,omitempty"`
	Edits    []jsonEdit `json:"edits"`
	Text     string     `json:"text"`
	Data     string     `json:"data"`
}

type jsonEdit struct {
	Offset int    `json:"offset"`
	Before string `json:"before"`
	After  string `json:"after"`
}

type jsonSum struct {
	Packets   int           `json:"packets"`
	Truncated int           `json:"truncated"`
	NotRun    int           `json:"not_run"`
	Outcomes  []jsonOutcome `json:"outcomes"`
}

type jsonOutcome struct {
	Verdict string `json:"verdict"`
	By      string `json:"by,omitempty"`
	Packets int    `json:"packets"`
}

func (x *explained) asJSON(p *packet.Captured, t *hook.Trace, by string) jsonPacket {
	j := jsonPacket{Number: x.count, Length: p.Length, Text: packet.Describe(p.Data, x.chain.Begins), Data: hex.EncodeToString(p.Data), Steps: []jsonStep{}}
	if t.Err != nil {
		j.Error = why(t.Err)
	} else {
		j.Verdict, j.By, j.Onward = t.Verdict.String(), by, t.Onward
	}
	for i := range t.Steps {
		s := &t.Steps[i]
		js := jsonStep{Member: x.name(s), Outcome: string(s.Outcome), Says: s.Says, GoesOn: s.GoesOn}
		if s.Member >= 0 {
			js.Program = x.chain.Members[s.Member].Program.ID
		} else {
			js.Member, js.Program = "", x.chain.DispatcherID
		}
		if s.Outcome == hook.OutcomeRan {
			returned := int32(s.Returned)
			js.Returned = &returned
			if c := &s.Change; !c.IsZero() {
				jc := &jsonChange{
					Head: c.Head, Tail: c.Tail, Meta: c.Meta, Mark: c.Mark, Priority: c.Priority,
					Edits: []jsonEdit{}, Text: packet.Describe(s.Packet, x.chain.Begins), Data: hex.EncodeToString(s.Packet),
				}
				for _, e := range c.Edits {
					jc.Edits = append(jc.Edits, jsonEdit{e.Offset, hex.EncodeToString(e.Before), hex.EncodeToString(e.After)})
				}
				js.Change = jc
			}
		}
		j.Steps = append(j.Steps, js)
	}
	return j
}

// all returns the whole object.
func (x *explained) all() jsonExplained {
	j := jsonExplained{
		Version: schema, EventTarget: x.chain.At(), Style: x.chain.Style,
		ToldApart: x.whole == "", Members: describeChain(*x.chain, false).Members, Packets: append([]jsonPacket{}, x.json...), Unexpected: x.unexpected,
		Summary: jsonSum{Packets: x.count, Truncated: x.truncated, NotRun: x.notRun, Outcomes: []jsonOutcome{}},
	}
	if x.expected != nil {
		j.Expected = x.expected.String()
	}
	for _, o := range x.sorted() {
		j.Summary.Outcomes = append(j.Summary.Outcomes, jsonOutcome{o.verdict.String(), o.by, x.outcomes[o]})
	}
	return j
}
