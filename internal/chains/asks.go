package chains

import (
	"slices"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// toJoin returns the ask of a process that waits to join the chain of the snapshot. A closed
// door is not left to others: it would drop packets after its owner has given up.
func toJoin(snap *Snapshot, member dispatch.Slot, req target.Request) func() *state.Ask {
	return func() *state.Ask {
		if snap.Chain == nil || snap.Root.LinkID() == 0 || member.OnMissing != hook.MissingContinue {
			return nil
		}
		return &state.Ask{Chain: snap.Chain.ID, Member: member, Shape: snap.Chain.Shape, Position: req.Position, Priority: req.Priority}
	}
}

// toLeave is the ask of a member that leaves. A pinned member is not left to others: the
// order to detach it must not outlive who gave it.
func (h *handle) toLeave() *state.Ask {
	c, i, err := h.find()
	if err != nil || c.Slots[i].Persistent {
		return nil
	}
	return &state.Ask{Chain: h.chainID, Leave: true, Member: dispatch.Slot{MapID: h.slotID}}
}

// grant does to the chain what is asked, and leaves out what cannot be done: who asks gets
// the lock in time, and finds out why. It adds the slots of new members to those that are open,
// and returns what it has granted.
func grant(c *state.Chain, asks []*state.Ask, open map[uint32]*ebpf.Map, opened *state.Slots, empty map[uint32]bool) (granted []*state.Ask) {
	for _, a := range asks {
		i := c.Index(a.Member.MapID)
		if a.Leave {
			if i >= 0 {
				c.Remove(i)
				granted = append(granted, a)
			}
			continue
		}
		if i >= 0 || a.Shape != c.Shape {
			continue
		}
		slot, err := opened.Open(a.Member.MapID, false)
		if err != nil {
			continue // its owner is gone
		}
		if prog, err := state.Occupant(slot); err != nil || prog == 0 {
			continue
		}
		was := slices.Clone(c.Slots)
		req := target.Request{Settings: hook.Settings{Priority: a.Priority}, Position: a.Position}
		if insert(a.Member, req, func(dispatch.Slot) bool { return true })(c, empty) != nil {
			c.Slots = was
			continue
		}
		open[a.Member.MapID] = slot
		granted = append(granted, a)
	}
	return granted
}
