package chains

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/state"
)

// pinned opens the dispatcher with the id by its pins. The error says also why it could not
// be opened by its id.
func (r *linkRoot) pinned(id uint32, refused error) (*state.Dispatcher, error) {
	if r.pins == nil {
		return nil, refused
	}
	d, err := r.pins.Dispatcher(r.folder(), id)
	if errors.Is(err, fs.ErrNotExist) {
		if now, _, err := r.state(); err == nil && now != id {
			return nil, kernel.ErrAgain // its pins went with it
		}
		err = hook.Because(refused, "program %d is not pinned beside the members of its chain, so it takes CAP_SYS_ADMIN to open it: %w", id, refused).
			Hint("the next change by a process with CAP_SYS_ADMIN pins it")
	}
	return d, err
}

// folder is the folder of the chain's pins.
func (r *linkRoot) folder() string { return state.ChainFolder(r.id, 0) }

// PinDispatcher pins the dispatcher that the root carries beside the members of the chain,
// unless that was done when it was swapped in: the folder of the chain is new, or was made by
// a version without these pins.
func PinDispatcher(root root) {
	r, ok := root.(*linkRoot)
	if !ok || r.pins == nil {
		return
	}
	id, _, err := r.state()
	if err != nil || r.pins.HasDispatcher(r.folder(), id) {
		return
	}
	if k := r.knows(id); k != nil {
		if d, err := k.Clone(); err == nil {
			r.pins.PinDispatcher(r.folder(), d)
			d.Close()
		}
		return
	}
	prog, err := kernel.OpenProgram(id, "dispatcher")
	if err != nil {
		return
	}
	defer prog.Close()
	if d, err := state.OpenDispatcher(prog); err == nil {
		r.pins.PinDispatcher(r.folder(), d)
		d.Close()
	}
}

// swapIn puts a dispatcher into the root in the place of old. Where the chain has pins, the
// new one is pinned before, and the old one's pins are removed after: a process that dies in between
// leaves both, and the root tells which counts.
func swapIn(r root, step string, next *state.Dispatcher, old *ebpf.Program) error {
	l, ok := r.(*linkRoot)
	if ok {
		l.pins.PinDispatcher(l.folder(), next)
	}
	kernel.Step(step + ": before")
	err := r.Swap(next.Program, old)
	if err == nil {
		kernel.Step(step + ": after")
	}
	if ok {
		gone := old
		if err != nil {
			gone = next.Program
		}
		l.pins.UnpinDispatcher(l.folder(), kernel.ProgramID(gone))
	}
	return err
}

// slotsOf returns what opens the slots of a chain.
func slotsOf(r root, c *state.Chain) state.Slots {
	l, ok := r.(*linkRoot)
	if !ok {
		return state.Slots{}
	}
	return state.Slots{Pinned: func(id uint32) (*ebpf.Map, error) {
		i := c.Index(id)
		if i < 0 { // of a member that asks to join
			return nil, hook.ErrPermission
		}
		s := c.Slots[i]
		if l.pins != nil {
			m, err := l.pins.Slot(l.folder(), s.Name, id)
			if !errors.Is(err, fs.ErrNotExist) {
				return m, err
			}
		}
		err := hook.Because(hook.ErrPermission, "member %q is owned by a process and not pinned, so it takes CAP_SYS_ADMIN to open its slot", s.Name)
		if s.Persistent && l.pins != nil { // it is about to be pinned, or in another bpffs
			return nil, fmt.Errorf("%w: %w", kernel.ErrAgain, err)
		}
		return nil, err
	}}
}

// inspectPinned is inspect for a process that may not open the program by its id: a root link
// that is pinned tells which chain it is. refused is the error for the id.
func (d Device) inspectPinned(snap *Snapshot, conn *rtnl.Conn, index int, on rtnl.XDP, refused error) error {
	r, err := d.pinnedRoot(on.Program, index)
	if err != nil {
		return err
	}
	if r == nil {
		if err := unchanged(conn, index, on); err != nil {
			return err
		}
		return fmt.Errorf("program %d is on the device, and no pin says of which chain: %w", on.Program, refused)
	}
	snap.Root = r
	if snap.Prog, err = r.open(on.Program); err == nil {
		snap.Chain, err = find(r, snap.Prog)
	}
	return err
}

// pinnedRoot opens the root link that is pinned, and carries the program on a device with the
// index. It returns nil when there is none.
func (d Device) pinnedRoot(prog uint32, index int) (*linkRoot, error) {
	if d.Pins == nil {
		return nil, nil
	}
	folders, err := d.Pins.Chains()
	if err != nil {
		return nil, err
	}
	for _, folder := range folders {
		r, err := openPinnedRoot(d.Pins, folder)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if has, ifindex, err := r.state(); err == nil && has == prog && int(ifindex) == index {
			return r, nil
		}
		r.Close()
	}
	return nil, nil
}
