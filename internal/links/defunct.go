package links

import (
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// Defunct describes the member of a link that has lost its device or cgroup, as a
// chain of one member. It returns nil for a link that is no member, or no longer one.
func Defunct(o *target.Opened, li kernel.LinkInfo, names *Names) (*hook.Chain, error) {
	h := li.Hook()
	rec, err := names.record(li.Attach, li.ID)
	if err != nil {
		return nil, err
	}
	name, pinned, err := names.pin(h, li.ID)
	if err != nil {
		return nil, err
	}
	if rec == nil && !pinned || rec != nil && rec.MovedTo != 0 {
		return nil, nil
	}
	e := entry{Entry: target.Entry{Program: li.Program, Link: li.ID, Name: name}, rec: rec, pinned: pinned}
	c := &hook.Chain{Hook: h, Pins: []string{}}
	if rec != nil {
		e.Name = rec.Name
	}
	m := viewEntry(e)
	m.State = hook.StateDefunct
	if rec != nil {
		m.Detail = rec.LastSeen.String()
	}
	if pinned {
		c.Pins = append(c.Pins, o.Pins.List(state.LinkFolder(h, li.ID))...)
	}
	c.Members = []hook.Member{m}
	return c, nil
}
