package attach

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/libxdp"
)

// snapshot is what was on a device at one moment.
type snapshot struct {
	device rtnl.Device
	mode   hook.Mode
	prog   *ebpf.Program // nil when nothing is attached
	chain  *state.Chain  // nil when it is not ours
	root   root          // nil when it is not ours
	links  []uint32      // that carry the program, when it is not ours
	libxdp bool          // it is a dispatcher of libxdp
}

func (s *snapshot) close() {
	if s.prog != nil {
		s.prog.Close()
	}
	if s.root != nil {
		s.root.close()
	}
}

func (s *snapshot) free() bool { return s.prog == nil }

// read looks at the device of the site. kernel.ErrAgain when it changed under its eyes.
func (s *site) read() (*snapshot, error) {
	snap := &snapshot{}
	err := rtnl.In(s.ns, func(conn *rtnl.Conn) error {
		d, err := conn.Device(s.Target)
		if err != nil {
			return err
		}
		return s.inspect(snap, conn, *d)
	})
	if err != nil {
		snap.close()
		return nil, err
	}
	return snap, nil
}

// inspect fills in the snapshot of a device.
func (s *site) inspect(snap *snapshot, conn *rtnl.Conn, d rtnl.Device) error {
	snap.device = d
	on, ok := d.Software()
	if !ok {
		return nil
	}
	snap.mode = on.Mode
	var err error
	if snap.prog, err = ebpf.NewProgramFromID(ebpf.ProgramID(on.Program)); err != nil {
		return kernel.Again(kernel.Errno("program on the device", err))
	}
	snap.chain, err = state.Find(snap.prog)
	if err != nil && !errors.Is(err, state.ErrNotOurs) {
		return err
	}
	if snap.chain != nil && snap.chain.RootLink != 0 {
		if snap.root, err = rootWith(snap.chain.RootLink, on.Program); snap.root != nil || err != nil {
			return err
		}
	}
	links, err := s.carrying(on.Program, d.Index)
	if err != nil {
		return err
	}
	switch {
	case len(links) > 0 && snap.chain != nil:
		if snap.root, err = rootWith(links[0], on.Program); err == nil && snap.root == nil {
			err = kernel.ErrAgain
		}
		return err
	case len(links) > 0:
		snap.links = links
		return nil
	}

	// No link carries it. Unless it was exchanged just now, netlink did it.
	now, err := conn.DeviceByIndex(d.Index)
	if err != nil {
		return err
	}
	if x, ok := now.Software(); !ok || x != on {
		return kernel.ErrAgain
	}
	if snap.chain != nil {
		snap.root = &netlinkRoot{s.ns, d.Index, on.Mode}
		return nil
	}
	// Whatever its version: it is attached as libxdp does it.
	_, err = libxdp.ConfigOf(snap.prog)
	snap.libxdp = err == nil || errors.Is(err, libxdp.ErrVersion)
	if snap.libxdp || errors.Is(err, libxdp.ErrNotDispatcher) {
		return nil
	}
	return err
}

// carrying is [kernel.XDPLinks], but asks first what is known of all links: for each of
// many devices to go through all links takes long.
func (s *site) carrying(prog uint32, index int) ([]uint32, error) {
	var ids []uint32
	for _, l := range s.links {
		if l.Type != link.XDPType || l.Program != prog || l.Ifindex != index {
			continue
		}
		r, err := rootWith(l.ID, prog)
		if err != nil {
			return nil, err
		}
		if r != nil { // it still does
			r.close()
			ids = append(ids, l.ID)
		}
	}
	if len(ids) > 0 {
		return ids, nil
	}
	return kernel.XDPLinks(prog, index)
}

// linkCarrying opens the link that carries a program on a device with that
// index, nil when there is none.
func linkCarrying(prog uint32, index int) (root, error) {
	ids, err := kernel.XDPLinks(prog, index)
	if err != nil || len(ids) == 0 {
		return nil, err
	}
	r, err := rootWith(ids[0], prog)
	if err == nil && r == nil {
		err = kernel.ErrAgain
	}
	return r, err
}

// rootWith opens a link if it carries the program, nil otherwise.
func rootWith(id, prog uint32) (root, error) {
	l, err := openLink(id)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, kernel.Again(err)
	}
	info, err := describeLink(l)
	if err != nil || info.Type != link.XDPType || info.Program != prog || info.Gone() {
		l.Close()
		return nil, err
	}
	return &linkRoot{l, id}, nil
}

// occupied is the error for a hook that is held by something that is not ours.
func (s *site) occupied(snap *snapshot) error {
	on := &hook.Occupant{Kind: hook.KindLegacy, Mode: snap.mode}
	on.Program = kernel.Describe(snap.prog)
	busy := hook.Busy(on)
	switch len(snap.links) {
	case 0:
		if snap.libxdp {
			on.Kind = hook.KindLibxdp
			return busy.Hint("\"%s\" moves its members over to an owned chain", s.command("convert", "xdp", snap.device.Name, "--style", "owned"))
		}
		xdp := "xdp"
		if snap.mode == hook.ModeGeneric {
			xdp = "xdpgeneric"
		}
		return busy.Hint("make it a member with \"%s\", or remove it with \"%s\"",
			s.command("adopt", "xdp", snap.device.Name), kernel.IPCommand(s.NetNS, "link", "set", "dev", snap.device.Name, xdp, "off"))
	case 1:
		on.Kind, on.LinkID = hook.KindForeign, snap.links[0]
		return busy.Hint("\"%s\" tells more; \"%s\" makes it a member, \"%s\" frees the hook", s.command("holders", "xdp", snap.device.Name),
			s.commandByLink("adopt", on.LinkID), s.commandByLink("detach", on.LinkID, "--force"))
	}
	on.Kind = hook.KindForeign
	return busy.Hint("\"%s\" tells more", s.command("holders", "xdp", snap.device.Name))
}

// describe reads what the kernel says about a program, and whether it makes
// tail calls.
func describe(prog *ebpf.Program) (hook.Program, bool) {
	info, err := prog.Info()
	if err != nil {
		return hook.Program{}, false
	}
	p := kernel.DescribeInfo(info)
	if info.Name == dispatch.ProgramName || isStandIn(info.Name) {
		return p, false // theirs are slots, which had better not be opened, see state.Slots
	}
	ids, _ := info.MapIDs()
	return p, tailCalls(ids)
}

func tailCalls(maps []ebpf.MapID) bool {
	for _, id := range maps {
		m, err := ebpf.NewMapFromID(id)
		if err != nil {
			continue
		}
		t := m.Type()
		m.Close()
		if t == ebpf.ProgramArray {
			return true
		}
	}
	return false
}

// view describes a snapshot for users.
func (s *site) view(snap *snapshot) (*hook.Chain, error) {
	c := &hook.Chain{
		Hook: s.Hook, Target: snap.device.Name, Ifindex: snap.device.Index,
		NetNS: s.ns.ID(), Mode: snap.mode, Pins: []string{}, Members: []hook.Member{},
	}
	if snap.free() {
		return c, nil
	}
	if lc, err := s.libxdpOf(snap); lc != nil || err != nil {
		if lc != nil {
			viewLibxdp(c, lc)
		}
		return c, err
	}
	if snap.chain == nil {
		m := hook.Member{Kind: hook.KindLegacy, State: hook.StateRunning}
		if len(snap.links) > 0 {
			m.Kind = hook.KindForeign
			c.LinkID = snap.links[0]
		}
		m.Program, m.TailCalls = describe(snap.prog)
		m.Name = m.Program.Name
		c.Members = append(c.Members, m)
		if c.LinkID != 0 && s.pins != nil {
			beside, err := displaced(s.pins, state.ChainFolder(c.LinkID, 0))
			if err != nil {
				return nil, err
			}
			c.Members = append(c.Members, beside...)
		}
		return c, nil
	}
	return c, viewChain(c, snap.prog, snap.chain, snap.root.linkID(), s.pins)
}

// displaced returns the members that are pinned beside a link that carries
// their chain no more.
func displaced(pins *state.Pins, folder string) ([]hook.Member, error) {
	names, err := pins.Members(folder)
	var members []hook.Member
	for _, name := range names {
		m := hook.Member{Name: name, Kind: hook.KindMember, State: hook.StateDisplaced, Persistent: true}
		if slot, err := ebpf.LoadPinnedMap(pins.HeldPath(folder, name), nil); err == nil {
			m.Program, m.TailCalls, _ = slotProgram(slot)
			m.SlotID, _ = kernel.MapID(slot)
			slot.Close()
		}
		members = append(members, m)
	}
	return members, err
}

// viewChain describes a chain of ours.
func viewChain(c *hook.Chain, prog *ebpf.Program, chain *state.Chain, linkID uint32, pins *state.Pins) error {
	info, err := prog.Info()
	if err != nil {
		return kernel.Errno("dispatcher", err)
	}
	id, _ := info.ID()
	c.Style, c.DispatcherID, c.LinkID, c.Frags = hook.StyleOwned, uint32(id), linkID, chain.Shape.Frags
	folder := state.ChainFolder(linkID, chain.ID)
	if pins != nil {
		if paths := pins.List(folder); paths != nil {
			c.Pins = paths
		}
	}
	var slots state.Slots
	defer slots.Close()
	for _, slot := range chain.Slots {
		pinned := pins != nil && pins.Has(folder, slot.Name)
		open, err := slots.Open(slot.MapID, pinned)
		if err != nil {
			return kernel.Again(err)
		}
		m, err := viewMember(slot, open, pinned)
		if err != nil {
			return err
		}
		if c.Ifindex == 0 {
			m.State = hook.StateDefunct
		}
		c.Members = append(c.Members, m)
	}
	return nil
}

// viewMember describes a member whose slot is open.
func viewMember(s dispatch.Slot, slot *ebpf.Map, pinned bool) (hook.Member, error) {
	m := hook.Member{
		Name: s.Name, Settings: s.Settings, Kind: hook.KindMember, State: hook.StateEmpty,
		Owner: s.Owner, SlotID: s.MapID, Persistent: s.Persistent || pinned,
		Sealed: s.Sealed.Program != 0,
	}
	var err error
	m.Program, m.TailCalls, err = slotProgram(slot)
	if m.Program.ID != 0 {
		m.State = hook.StateRunning
	}
	// What is linked runs, whatever became of the slot.
	if linked := s.Sealed.Program; linked != 0 && m.Program.ID != linked {
		m.Program, m.State = hook.Program{ID: linked}, hook.StateRunning
	}
	return m, err
}

// slotProgram describes the program in a slot; the zero value when it is empty.
func slotProgram(slot *ebpf.Map) (p hook.Program, tail bool, err error) {
	id, err := state.Occupant(slot)
	if err != nil || id == 0 {
		return p, false, err
	}
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
	if errors.Is(err, fs.ErrNotExist) {
		return p, false, nil // its owner went, and the program with it
	}
	if err != nil {
		return p, false, kernel.Errno(fmt.Sprintf("program id %d", id), err)
	}
	defer prog.Close()
	p, tail = describe(prog)
	return p, tail, nil
}
