package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/libdispatcher/dispatcher/internal/mapdata"
	"github.com/libdispatcher/dispatcher/internal/typed"
)

// A shownMap is a map with the entries to show.
type shownMap struct {
	*mapdata.Map
	entries []mapdata.Entry
	zero    int   // entries of an array that are not shown
	err     error // why there are none
}

// printMaps shows maps, or what is in them.
func (a *app) printMaps(maps []*mapdata.Map, entries bool) error {
	if len(maps) == 0 {
		a.note("the program has no maps")
	}
	if !entries && a.format != formatJSON {
		if len(maps) == 0 {
			return nil
		}
		rows := [][]cell{heads("MAP", "TYPE", "KEY", "VALUE", "ROOM", "ID")}
		for _, m := range maps {
			rows = append(rows, []cell{{text: orDash(m.Name)}, {text: m.Type.String()}, {text: m.Key.String()}, {text: m.Value.String()}, number(m.MaxEntries), number(m.ID)})
		}
		return a.printTable(rows)
	}
	shown := make([]shownMap, 0, len(maps))
	for _, m := range maps {
		s := shownMap{Map: m}
		if entries {
			err := s.read(a.verbose)
			if err != nil && (len(maps) == 1 || !errors.Is(err, mapdata.ErrNoKeys)) {
				return fmt.Errorf("map %s (%v): %w", m.Name, m.Type, err)
			}
			s.err = err
		}
		shown = append(shown, s)
	}
	return a.printEntries(shown)
}

// read reads the entries; those of an array that are zero only if all are wanted.
func (s *shownMap) read(all bool) error {
	array := strings.HasSuffix(s.Type.String(), "Array") && s.MaxEntries > 1
	return s.Each(func(e mapdata.Entry) error {
		if array && !all && e.Zero() {
			s.zero++
			return nil
		}
		s.entries = append(s.entries, e)
		return nil
	})
}

func (a *app) printEntries(maps []shownMap) error {
	if a.format == formatJSON {
		j := struct {
			Version int       `json:"version"`
			Maps    []jsonMap `json:"maps"`
		}{schema, make([]jsonMap, 0, len(maps))}
		for _, m := range maps {
			j.Maps = append(j.Maps, m.describe())
		}
		return a.printJSON(j)
	}
	var b strings.Builder
	for i, m := range maps {
		if i > 0 {
			b.WriteByte('\n')
		}
		fmt.Fprintf(&b, "%s (id %d): %v, %v to %v\n", m.Name, m.ID, m.Type, m.Key, m.Value)
		var rows [][]cell
		for _, e := range m.entries {
			rows = append(rows, []cell{{text: typed.Words(m.Key.Value(e.Key))}, {text: typed.Words(m.Value.Value(e.Value))}})
			for cpu, v := range e.PerCPU {
				if a.verbose {
					rows = append(rows, []cell{{text: fmt.Sprintf("  cpu %d", cpu)}, {text: typed.Words(m.Value.Value(v))}})
				}
			}
		}
		a.table(&b, "  ", rows)
		switch {
		case m.err != nil:
			fmt.Fprintf(&b, "  %v\n", m.err)
		case m.zero > 0:
			fmt.Fprintf(&b, "  %d entries are zero (-v shows them)\n", m.zero)
		case len(m.entries) == 0:
			b.WriteString("  empty\n")
		}
	}
	return a.print(b.String())
}

type jsonMap struct {
	ID         uint32      `json:"id"`
	Name       string      `json:"name"`
	Type       string      `json:"type"`
	KeyType    string      `json:"key_type"`
	ValueType  string      `json:"value_type"`
	MaxEntries uint32      `json:"max_entries"`
	Frozen     bool        `json:"frozen"`
	Entries    []jsonEntry `json:"entries"`
}

type jsonEntry struct {
	Key   any   `json:"key"`
	Value any   `json:"value"`
	CPUs  []any `json:"cpus,omitempty"`
}

func (m *shownMap) describe() jsonMap {
	j := jsonMap{
		ID: m.ID, Name: m.Name, Type: m.Type.String(), KeyType: m.Key.String(), ValueType: m.Value.String(),
		MaxEntries: m.MaxEntries, Frozen: m.Frozen, Entries: make([]jsonEntry, 0, len(m.entries)),
	}
	for _, e := range m.entries {
		entry := jsonEntry{Key: m.Key.Value(e.Key), Value: m.Value.Value(e.Value)}
		for _, v := range e.PerCPU {
			entry.CPUs = append(entry.CPUs, m.Value.Value(v))
		}
		j.Entries = append(j.Entries, entry)
	}
	return j
}
