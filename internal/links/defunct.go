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
	e, err := names.entry(h, li.Attach, li.Program, li.ID)
	if err != nil || e.Name == "" {
		return nil, err
	}
	m := viewEntry(e)
	m.State = hook.StateDefunct
	if e.rec != nil {
		m.Detail = e.rec.LastSeen.String()
	}
	c := &hook.Chain{Hook: h, Pins: []string{}, Members: []hook.Member{m}}
	if e.pinned {
		c.Pins = append(c.Pins, o.Pins.List(state.LinkFolder(h, li.ID))...)
	}
	return c, nil
}
