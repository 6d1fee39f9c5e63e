package chains

import (
	"errors"
	"io/fs"
	"math/rand/v2"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/procfs"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// ChainOf returns the chain of the dispatcher with the program id, and nil for another
// program. The error is kernel.ErrAgain when there is no program with the id.
func ChainOf(prog uint32) (*state.Chain, error) {
	p, err := kernel.OpenProgram(prog, "the program of the link")
	if err != nil {
		return nil, err
	}
	defer p.Close()
	chain, err := state.Find(p)
	if errors.Is(err, state.ErrNotOurs) {
		return nil, nil
	}
	return chain, err
}

// AdoptLink puts a chain into an XDP link, with the link's program as the first member.
// On success the handle owns the link, and the caller closes the handle; on an error
// the link stays the caller's. The error is fs.ErrExist when the link carries a chain
// already.
func AdoptLink(o *target.Opened, locked *state.Locked, l kernel.RawLink, id uint32, req target.Request) (target.Handle, error) {
	s, r := Device{o}, &linkRoot{link: l, id: id, pins: o.Pins}
	old, err := r.Program()
	if err != nil {
		return nil, err
	}
	defer old.Close()
	switch _, err := state.Find(old); {
	case err == nil:
		return nil, hook.Because(fs.ErrExist, "link %d carries a chain of libdispatcher already", r.id).
			Hint("attach adds members to it")
	case !errors.Is(err, state.ErrNotOurs):
		return nil, kernel.Again(err) // it may be a chain of a later version
	}
	prog, err := load.Program{Program: old}.Load(load.Want{Hook: hook.XDP, Adopt: true})
	if err != nil {
		return nil, err
	}
	slot, member, err := newMember(req, prog)
	if err != nil {
		return nil, err
	}
	h := &handle{Base: target.Base{Opened: s.Opened}, root: r, slot: slot, slotID: member.MapID, chainID: rand.Uint64()}
	chain := &state.Chain{
		ID: h.chainID, RootLink: r.id, LastSeen: s.lastSeenOf(r, old),
		Plan: dispatch.Plan{Shape: prog.Shape, Slots: []dispatch.Slot{member}},
	}
	back, err := s.takeBack(locked, chain)
	for _, m := range back {
		defer m.Close()
	}
	var dispatcher *state.Dispatcher
	if err == nil {
		back[member.MapID] = slot
		dispatcher, err = state.Build(chain, inOrder(chain, back), nil)
	}
	if err == nil {
		defer dispatcher.Close()
		err = swapIn(r, "swap", dispatcher, old)
	}
	if err != nil {
		slot.Close() // the link stays the caller's
		return nil, err
	}
	switch {
	case req.Persistent:
		err = s.pinAdopted(locked, h, member.Name)
	case locked != nil: // a pin of this name belongs to a displaced member
		err = locked.Remove(h.folder(), member.Name)
	}
	if err != nil {
		undo := r.Swap(old, dispatcher.Program)
		slot.Close()
		return nil, kernel.Undo(err, undo)
	}
	return h, nil
}

// takeBack adds the displaced members to the chain: they were pinned beside the link
// before another program was put into it. Their settings are lost with their old
// chain. It returns their slots by their ids; the caller closes them.
func (d Device) takeBack(locked *state.Locked, chain *state.Chain) (map[uint32]*ebpf.Map, error) {
	slots := map[uint32]*ebpf.Map{}
	if locked == nil {
		return slots, nil
	}
	folder := state.ChainFolder(chain.RootLink, 0)
	members, err := locked.Members(folder)
	if err != nil {
		return slots, err
	}
	for _, name := range members {
		if name == chain.Slots[0].Name || chain.Named(name) >= 0 {
			continue // the name is in the chain already
		}
		m, err := ebpf.LoadPinnedMap(locked.HeldPath(folder, name), nil)
		if procfs.Exhausted(err) {
			return slots, kernel.Errno("pin of member "+name, err)
		}
		if err != nil {
			continue // not the pin of a slot
		}
		if m.Type() != ebpf.ProgramArray || m.MaxEntries() != 1 {
			m.Close()
			continue
		}
		id, err := kernel.MapID(m)
		if err != nil {
			m.Close()
			return slots, err
		}
		slots[id] = m
		back := dispatch.Slot{MapID: id, Name: name, Persistent: true, Settings: hook.Settings{}.WithDefaults()}
		if err := chain.Insert(back, hook.Position{}, 0); err != nil {
			return slots, err
		}
	}
	return slots, nil
}

// pinAdopted pins a chain. It pins a link opened anew: the link's maker may have pinned
// the given one elsewhere.
func (d Device) pinAdopted(locked *state.Locked, h *handle, name string) error {
	twin, err := kernel.OpenLink(h.root.LinkID())
	if err != nil {
		return err
	}
	defer twin.Close()
	if err := locked.Add(h.folder(), twin, state.MemberPins{Name: name, Slot: h.slot}); err != nil {
		return err
	}
	PinDispatcher(h.root)
	return nil
}

// lastSeenOf returns where an XDP link is, as far as that is known.
func (d Device) lastSeenOf(r *linkRoot, prog *ebpf.Program) state.LastSeen {
	var seen state.LastSeen
	_, index, err := r.state()
	if err != nil {
		return seen
	}
	ns, err := findXDP(int(index), kernel.ProgramID(prog), func(d *rtnl.Device, mode hook.Mode) { seen.Target, seen.Mode = d.Name, mode })
	if err != nil {
		return state.LastSeen{}
	}
	seen.NetNS = ns.ID()
	ns.Close()
	return seen
}
