package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/state"
)

// readRegistry reads the registry, if one exists.
func (e *exam) readRegistry() {
	reg, err := e.pins.OpenRegistry()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return
	case errors.Is(err, ebpf.ErrNotSupported):
		e.badRegistry(err)
		return
	case err == nil:
		e.records, err = recordsOf(reg)
		reg.Close()
	}
	if err != nil {
		e.add(hook.Finding{Check: "registry", Level: hook.LevelBroken, Text: "the names of links cannot be read: " + oneLine(err)})
	}
}

// recordsOf returns all records by their links. A record that is damaged or of a later
// version is nil.
func recordsOf(reg *state.Registry) (map[uint32]*state.Record, error) {
	links, err := reg.Links()
	records := map[uint32]*state.Record{}
	for _, id := range links {
		if err == nil {
			records[id], err = reg.Get(id)
		}
	}
	return records, err
}

// names looks at the names of members that have their own links.
func (e *exam) names() {
	var gone, unknown []string
	for _, id := range slices.Sorted(maps.Keys(e.records)) {
		rec := e.records[id]
		switch {
		case rec != nil && e.links[rec.MovedTo].ID != 0: // kept for processes that still hold the old link
		case e.links[id].ID == 0:
			gone = append(gone, fmt.Sprint(id))
		case rec == nil:
			unknown = append(unknown, fmt.Sprint(id))
		}
	}
	if len(gone) > 0 {
		e.add(hook.Finding{
			Check: "record", Level: hook.LevelNote, Mend: e.recover(),
			Text: "names of links that do not exist any more, which the next change removes: " + strings.Join(gone, ", "),
		})
	}
	if len(unknown) > 0 {
		e.drift("registry", "", "%s: the records of these links are damaged, or of a later version: %s", e.pins.RegistryPath(), strings.Join(unknown, ", "))
	}
}

// halfMoves looks for links that still exist although a move has replaced them: the
// last step of the move, which releases the old link, is missing. If both links are
// pinned, both stay.
func (e *exam) halfMoves() {
	moves, err := e.pins.Moves()
	settled := err == nil && len(moves) == 0
	for _, id := range slices.Sorted(maps.Keys(e.records)) {
		rec, link := e.records[id], e.links[id]
		if rec == nil || link.ID == 0 || link.Gone() {
			continue
		}
		old := e.links[rec.MovedFrom]
		if old.ID == 0 || old.Gone() {
			continue
		}
		e.unsettled[id], e.unsettled[old.ID] = true, true
		h := old.Hook()
		if !settled || !e.pins.Has(state.LinkFolder(h, id), rec.Name) || !e.pins.Has(state.LinkFolder(h, old.ID), rec.Name) {
			continue // the check of the pins reports it
		}
		e.add(hook.Finding{
			Check: "move", Level: hook.LevelDrift, Member: rec.Name, Mend: e.recover(),
			Text: fmt.Sprintf("the move from link %d to link %d was not finished, its process died: both run", old.ID, id),
		})
	}
}

// badRegistry reports a registry that cannot be used: one of another version, which that
// version can read, or another object in its place.
func (e *exam) badRegistry(err error) {
	path := e.pins.RegistryPath()
	if m, err := ebpf.LoadPinnedMap(path, nil); err == nil {
		defer m.Close()
		if info, err := m.Info(); err == nil && info.Name == state.RegistryName {
			e.drift("registry", "", "%s is of another version of libdispatcher: to this one links have no names", path)
			return
		}
	}
	mend := e.recover()
	if st, err := os.Lstat(path); err == nil && st.IsDir() {
		mend = kernel.Shell("rm", "-r", path)
	}
	e.drift("registry", mend, "%s is not a registry, and links have no names: %s", path, oneLine(err))
}
