package chains

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
	"github.com/libdispatcher/dispatcher/libxdp"
)

// ErrStyle says that the chain on the device has the other style, or that the request
// asks for the other style: the caller must ask the other family.
var ErrStyle = errors.New("a chain of another style is there")

// A Device is an opened target on the XDP hook.
type Device struct{ *target.Opened }

// A Snapshot is what was on a device at one moment. Close releases it.
type Snapshot struct {
	Device rtnl.Device
	Mode   hook.Mode
	Prog   *ebpf.Program // nil when nothing is attached
	Chain  *state.Chain  // nil when the program is no dispatcher of an owned chain
	Root   root          // nil without an owned chain
	links  []uint32      // the links that carry the program, without an owned chain
	Libxdp bool          // the program is a dispatcher of libxdp
}

// Close closes the program and the root.
func (snap *Snapshot) Close() {
	snap.Prog.Close()
	if snap.Root != nil {
		snap.Root.Close()
	}
}

// Free reports whether nothing was attached.
func (snap *Snapshot) Free() bool { return snap.Prog == nil }

// Begins returns what packets on the device begin with.
func (snap *Snapshot) Begins() (hook.Begins, error) { return snap.Device.Begins(), nil }

// Current reports whether the root link still carries the program of the snapshot. It
// returns true when there is no root link. It asks the link, which costs less than
// reading the device again.
func (snap *Snapshot) Current() bool {
	r, ok := snap.Root.(*linkRoot)
	if !ok {
		return true
	}
	prog, ifindex, err := r.state()
	return err == nil && ifindex != 0 && prog == kernel.ProgramID(snap.Prog)
}

// takes reports whether the loaded program fits the chain.
func (snap *Snapshot) takes(prog *load.Loaded) bool {
	return snap.Chain == nil || snap.Chain.Shape == prog.Shape
}

// Read reads what is on the device; the caller closes the snapshot. The error is
// kernel.ErrAgain when the device changed meanwhile, and fs.ErrNotExist when there is
// no such device.
func (d Device) Read() (snap *Snapshot, err error) {
	err = rtnl.In(d.NS, func(conn *rtnl.Conn) error {
		dev, err := conn.Device(d.Name)
		if err != nil {
			return err
		}
		snap, err = ReadDevice(d.Opened, conn, *dev)
		return err
	})
	return snap, err
}

// ReadDevice is Read for a device that rtnetlink has described already. The caller
// closes the snapshot.
func ReadDevice(o *target.Opened, conn *rtnl.Conn, dev rtnl.Device) (*Snapshot, error) {
	snap := &Snapshot{Device: dev}
	if err := (Device{o}).inspect(snap, conn, dev); err != nil {
		snap.Close()
		return nil, err
	}
	return snap, nil
}

// inspect fills in the snapshot of a device.
func (d Device) inspect(snap *Snapshot, conn *rtnl.Conn, dev rtnl.Device) error {
	on, ok := dev.Software()
	if !ok {
		return nil
	}
	snap.Mode = on.Mode
	var err error
	snap.Prog, err = kernel.OpenProgram(on.Program, "program on the device")
	if errors.Is(err, unix.EPERM) {
		return d.inspectPinned(snap, conn, dev.Index, on, err)
	}
	if err != nil {
		return err
	}
	snap.Chain, err = state.Find(snap.Prog)
	if err != nil && !errors.Is(err, state.ErrNotOurs) {
		return err
	}
	if snap.Chain != nil && snap.Chain.RootLink != 0 {
		if snap.Root, err = d.rootWith(snap.Chain.RootLink, on.Program); snap.Root != nil || err != nil {
			return err
		}
	}
	links, err := d.carrying(on.Program, dev.Index)
	if err != nil {
		return err
	}
	switch {
	case len(links) > 0 && snap.Chain != nil:
		snap.Root, err = d.firstRoot(links, on.Program)
		return err
	case len(links) > 0:
		snap.links = links
		return nil
	}

	// No link carries the program. If it is still there, netlink attached it.
	if err := unchanged(conn, dev.Index, on); err != nil {
		return err
	}
	if snap.Chain != nil {
		snap.Root = &NetlinkRoot{d.NS, dev.Index, on.Mode}
		return nil
	}
	// A dispatcher of an unknown version is a dispatcher of libxdp too.
	_, err = libxdp.ConfigOf(snap.Prog)
	snap.Libxdp = err == nil || errors.Is(err, libxdp.ErrVersion)
	if snap.Libxdp || errors.Is(err, libxdp.ErrNotDispatcher) {
		return nil
	}
	return err
}

// unchanged returns kernel.ErrAgain if the device has another program by now.
func unchanged(conn *rtnl.Conn, index int, on rtnl.XDP) error {
	now, err := conn.DeviceByIndex(index)
	if err != nil {
		return err
	}
	if x, ok := now.Software(); !ok || x != on {
		return kernel.ErrAgain
	}
	return nil
}

// carrying returns the links that carry the program on the device. It looks first
// among the links that were read before: going through all links of the kernel for
// each of many devices takes long ([kernel.XDPLinks]).
func (d Device) carrying(prog uint32, index int) ([]uint32, error) {
	var ids []uint32
	for _, l := range d.Links {
		if l.Type != link.XDPType || l.Program != prog || l.Ifindex != index {
			continue
		}
		r, err := d.rootWith(l.ID, prog)
		if err != nil {
			return nil, err
		}
		if r != nil { // the link still carries the program
			r.Close()
			ids = append(ids, l.ID)
		}
	}
	if len(ids) > 0 {
		return ids, nil
	}
	return kernel.XDPLinks(prog, index)
}

// linkCarrying opens the link that carries the program on the device with the index.
// It returns nil when there is no such link.
func (d Device) linkCarrying(prog uint32, index int) (root, error) {
	ids, err := kernel.XDPLinks(prog, index)
	if err != nil || len(ids) == 0 {
		return nil, err
	}
	return d.firstRoot(ids, prog)
}

// firstRoot opens the first of the links, which must carry the program.
func (d Device) firstRoot(ids []uint32, prog uint32) (root, error) {
	r, err := d.rootWith(ids[0], prog)
	if err == nil && r == nil {
		err = kernel.ErrAgain
	}
	return r, err
}

// rootWith opens a link if it carries the program, and returns nil otherwise.
func (d Device) rootWith(id, prog uint32) (root, error) {
	l, err := kernel.OpenLink(id)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, kernel.Again(err)
	}
	info, err := kernel.LinkInfoOf(l)
	if err != nil || info.Type != link.XDPType || info.Program != prog || info.Gone() {
		l.Close()
		return nil, err
	}
	return &linkRoot{link: l, id: id, pins: d.Pins}, nil
}

// Occupied returns the error for a device that carries no owned chain: ErrBusy, with
// the occupant and a hint.
func (d Device) Occupied(snap *Snapshot) error {
	on := &hook.Occupant{Kind: hook.KindLegacy, Mode: snap.Mode}
	on.Program = kernel.Describe(snap.Prog)
	busy := hook.Busy(on)
	switch len(snap.links) {
	case 0:
		if snap.Libxdp {
			on.Kind = hook.KindLibxdp
			return busy.Hint("\"%s\" moves its members over to an owned chain", d.Command(kernel.Flags{"--style", "owned"}, "convert", "xdp", snap.Device.Name))
		}
		xdp := "xdp"
		if snap.Mode == hook.ModeGeneric {
			xdp = "xdpgeneric"
		}
		return busy.Hint("make it a member with \"%s\", or remove it with \"%s\"",
			d.Command(nil, "adopt", "xdp", snap.Device.Name), kernel.IPCommand(d.NetNS, "link", "set", "dev", snap.Device.Name, xdp, "off"))
	case 1:
		on.Kind, on.LinkID = hook.KindForeign, snap.links[0]
		return busy.Hint("\"%s\" tells more; \"%s\" makes it a member, \"%s\" frees the hook", d.Command(nil, "holders", "xdp", snap.Device.Name),
			d.CommandByLink("adopt", on.LinkID), d.CommandByLink("detach", on.LinkID, "--force"))
	}
	on.Kind = hook.KindForeign
	return busy.Hint("\"%s\" tells more", d.Command(nil, "holders", "xdp", snap.Device.Name))
}

// taken returns the error for a device without an owned chain: ErrStyle for a chain
// of libxdp, else ErrBusy.
func (d Device) taken(snap *Snapshot) error {
	if snap.Libxdp {
		return ErrStyle
	}
	return d.Occupied(snap)
}

// Describe returns what the snapshot knows of the chain, without the members.
func (snap *Snapshot) Describe(o *target.Opened) *hook.Chain {
	return &hook.Chain{
		Hook: o.Hook, Target: snap.Device.Name, Ifindex: snap.Device.Index,
		NetNS: o.NS.ID(), Begins: snap.Device.Begins(), Mode: snap.Mode, Pins: []string{}, Members: []hook.Member{},
	}
}

// View describes a snapshot for users. The error is ErrStyle for a chain of libxdp,
// and kernel.ErrAgain when a slot disappeared meanwhile.
func (d Device) View(snap *Snapshot) (*hook.Chain, error) {
	c := snap.Describe(d.Opened)
	if snap.Free() {
		return c, nil
	}
	if snap.Libxdp {
		return nil, ErrStyle
	}
	if snap.Chain == nil {
		m := hook.Member{Kind: hook.KindLegacy, State: hook.StateRunning}
		if len(snap.links) > 0 {
			m.Kind = hook.KindForeign
			c.LinkID = snap.links[0]
		}
		m.Program, m.TailCalls = target.Describe(snap.Prog)
		m.Name = m.Program.Name
		c.Members = append(c.Members, m)
		if c.LinkID != 0 && d.Pins != nil {
			beside, err := displaced(d.Pins, state.ChainFolder(c.LinkID, 0))
			if err != nil {
				return nil, err
			}
			c.Members = append(c.Members, beside...)
		}
		return c, nil
	}
	return c, viewChain(c, snap.Prog, snap.Chain, snap.Root, nil, d.Pins)
}

// displaced describes the members that are pinned beside a link which does not carry
// their chain any more.
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

// viewChain adds the members of an owned chain to c, and its dispatcher, link and pins. own
// are slots that this process has open.
func viewChain(c *hook.Chain, prog *ebpf.Program, chain *state.Chain, r root, own map[uint32]*ebpf.Map, pins *state.Pins) error {
	var linkID uint32
	if r != nil {
		linkID = r.LinkID()
	}
	c.Style, c.DispatcherID, c.LinkID, c.Frags = hook.StyleOwned, kernel.ProgramID(prog), linkID, chain.Shape.Frags
	folder := state.ChainFolder(linkID, chain.ID)
	if pins != nil {
		if paths := pins.List(folder); paths != nil {
			c.Pins = paths
		}
	}
	slots := slotsOf(r, chain)
	defer slots.Close()
	for _, slot := range chain.Slots {
		pinned := pins != nil && pins.Has(folder, slot.Name)
		open := own[slot.MapID]
		if open == nil {
			var err error
			if open, err = slots.Open(slot.MapID, pinned); err != nil {
				return kernel.Again(err)
			}
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

// viewMember describes the member with the open slot.
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
	// A sealed program runs, whatever is in the slot.
	if linked := s.Sealed.Program; linked != 0 && m.Program.ID != linked {
		m.Program, m.State = hook.Program{ID: linked}, hook.StateRunning
	}
	return m, err
}

// slotProgram describes the program in a slot. It returns zero values for an empty
// slot.
func slotProgram(slot *ebpf.Map) (p hook.Program, tail bool, err error) {
	id, err := state.Occupant(slot)
	if err != nil || id == 0 {
		return p, false, err
	}
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
	if errors.Is(err, fs.ErrNotExist) {
		return p, false, nil // the owner is gone, and the program with it
	}
	if errors.Is(err, unix.EPERM) { // the id is what a process may know without CAP_SYS_ADMIN
		return hook.Program{ID: id}, false, nil
	}
	if err != nil {
		return p, false, kernel.Errno(fmt.Sprintf("program id %d", id), err)
	}
	defer prog.Close()
	p, tail = target.Describe(prog)
	return p, tail, nil
}
