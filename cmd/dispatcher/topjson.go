package main

import (
	"math"
	"time"

	"github.com/libdispatcher/dispatcher/hook"
)

// The JSON of a sample is a contract, like the JSON of a chain.
type jsonSamples struct {
	Version int          `json:"version"`
	Time    time.Time    `json:"time"`
	Hooks   []jsonSample `json:"hooks"`
}

type jsonSample struct {
	hook.EventTarget
	Method      hook.Method     `json:"method"`
	ElapsedNs   int64           `json:"elapsed_ns"`
	ClockNs     int64           `json:"clock_ns,omitempty"`
	Interrupted bool            `json:"interrupted"`
	Whole       *jsonCounts     `json:"whole"`
	Members     []jsonCountedBy `json:"members"`
	Error       string          `json:"error,omitempty"`
}

// jsonCountedBy is an entry with its counts.
type jsonCountedBy struct {
	Name     string       `json:"name"`
	Priority int          `json:"priority,omitempty"`
	Kind     hook.Kind    `json:"kind"`
	State    hook.State   `json:"state"`
	Program  hook.Program `json:"program"`
	LinkID   uint32       `json:"link_id,omitempty"`
	SlotID   uint32       `json:"slot_id,omitempty"`
	Counts   *jsonCounts  `json:"counts"`
}

type jsonCounts struct {
	Runs          uint64        `json:"runs"`
	TimeNs        int64         `json:"time_ns"`
	RunsPerSecond int64         `json:"runs_per_second"` // rounded, like the next fields
	NsPerRun      int64         `json:"ns_per_run"`
	Verdicts      *jsonVerdicts `json:"verdicts,omitempty"`
	Empty         *uint64       `json:"empty,omitempty"`
}

type jsonVerdicts struct {
	Aborted  uint64 `json:"aborted"`
	Drop     uint64 `json:"drop"`
	Pass     uint64 `json:"pass"`
	TX       uint64 `json:"tx"`
	Redirect uint64 `json:"redirect"`
	Other    uint64 `json:"other"`
}

func describeSamples(samples []hook.Sample, now time.Time) jsonSamples {
	j := jsonSamples{Version: schema, Time: now.UTC(), Hooks: []jsonSample{}}
	for i := range samples {
		j.Hooks = append(j.Hooks, describeSample(&samples[i]))
	}
	return j
}

func describeSample(s *hook.Sample) jsonSample {
	c := &s.Chain
	j := jsonSample{
		EventTarget: c.At(), Method: s.Method, ElapsedNs: s.Elapsed.Nanoseconds(), ClockNs: s.Clock.Nanoseconds(),
		Interrupted: s.Interrupted, Members: []jsonCountedBy{},
	}
	if s.Err != nil {
		j.Error = why(s.Err)
	}
	j.Whole = describeCounts(s.Whole, s)
	if j.Whole != nil {
		j.Whole.Verdicts, j.Whole.Empty = nil, nil // the members' are known
	}
	for i := range c.Members {
		m := &c.Members[i]
		j.Members = append(j.Members, jsonCountedBy{m.Name, m.Priority, m.Kind, m.State, m.Program, m.LinkID, m.SlotID, describeCounts(s.Entries[i], s)})
	}
	return j
}

// describeCounts returns nil for an entry that was not measured.
func describeCounts(c hook.Counts, s *hook.Sample) *jsonCounts {
	if !c.Known {
		return nil
	}
	j := &jsonCounts{
		Runs: c.Runs, TimeNs: c.Time.Nanoseconds(),
		RunsPerSecond: int64(math.Round(ratePerSecond(c.Runs, s.Elapsed))), NsPerRun: c.PerRun().Nanoseconds(),
	}
	if s.Method == hook.MethodChain {
		v := &c.Verdicts
		j.Verdicts = &jsonVerdicts{v[hook.Aborted], v[hook.Drop], v[hook.Pass], v[hook.TX], v[hook.Redirect], c.Other}
		j.Empty = &c.Empty
	}
	return j
}
