package libxdp

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
)

// Read returns the chain on the device. The error is fs.ErrNotExist when
// nothing is attached, and [ErrNotDispatcher] when it is something else. With
// [ErrVersion] Read also returns what can be known of the chain.
//
// Read finds members by their pins in BPFFS. It finds members without pins
// there by their links to the dispatcher (Linux 5.13), so it can also read a
// chain with its pins in another bpffs. It takes no lock.
func (d Device) Read(ctx context.Context) (c *Chain, err error) {
	err = d.at("read", func(s *site) error {
		return s.withChain(ctx, func(snap *snapshot) error {
			c = snap.chain
			return snap.refused
		})
	})
	return c, err
}

// withChain runs fn with the chain on the device, until it succeeds.
func (s *site) withChain(ctx context.Context, fn func(snap *snapshot) error) error {
	return kernel.Retry(ctx, func() error {
		snap, err := s.read()
		if err != nil {
			return err
		}
		defer snap.close()
		switch {
		case snap.free():
			return hook.Because(fs.ErrNotExist, "nothing is attached")
		case snap.chain == nil:
			return s.occupied(snap)
		}
		return fn(snap)
	})
}

// ReadProgram returns the chain of a dispatcher that was found on a device with
// that index. The chain's Device and Mode are not set. The errors are those of
// [Device.Read].
func ReadProgram(prog *ebpf.Program, ifindex int, bpffs string) (*Chain, error) {
	snap := &snapshot{prog: prog, device: rtnl.Device{Index: ifindex}}
	err := snap.look(cmp.Or(bpffs, kernel.DefaultBPFFS))
	snap.prog = nil // the caller owns it
	snap.close()
	if err != nil {
		return nil, err
	}
	return snap.chain, snap.refused
}

// snapshot is what was on a device at one moment.
type snapshot struct {
	device rtnl.Device
	mode   hook.Mode
	prog   *ebpf.Program // nil when nothing is attached
	chain  *Chain        // nil when it is not a dispatcher
	parts  []part        // of the chain's members
	// refused says why the chain cannot be changed.
	refused error
}

// part is what is known about a slot of the dispatcher.
type part struct {
	prog *ebpf.Program // nil when it is not known
	link uint32        // 0 when there is none
}

func (s *snapshot) close() {
	if s.prog != nil {
		s.prog.Close()
	}
	for _, p := range s.parts {
		p.prog.Close()
	}
}

func (s *snapshot) free() bool { return s.prog == nil }

// read reads the site's device. It returns kernel.ErrAgain when the device changed
// meanwhile.
func (s *site) read() (*snapshot, error) {
	snap := &snapshot{}
	err := rtnl.In(s.ns, func(conn *rtnl.Conn) error {
		d, err := conn.Device(s.Name)
		if err != nil {
			return err
		}
		snap.device = *d
		on, ok := d.Software()
		if !ok {
			return nil
		}
		snap.mode = on.Mode
		if snap.prog, err = ebpf.NewProgramFromID(ebpf.ProgramID(on.Program)); err != nil {
			return kernel.Again(kernel.Errno("program on the device", err))
		}
		if err := snap.look(s.BPFFS); err == nil {
			snap.chain.Device, snap.chain.Mode = snap.device.Name, snap.mode
		} else if !errors.Is(err, ErrNotDispatcher) {
			return kernel.Again(err)
		}
		// If the dispatcher was replaced meanwhile, its pins are gone.
		now, err := conn.DeviceByIndex(d.Index)
		if err != nil {
			return kernel.Again(err)
		}
		if x, ok := now.Software(); !ok || x != on {
			return kernel.ErrAgain
		}
		return nil
	})
	if err != nil {
		snap.close()
		return nil, err
	}
	return snap, nil
}

// look fills in the chain of the program.
func (s *snapshot) look(bpffs string) error {
	c := &Chain{Ifindex: s.device.Index, Pins: []string{}, Members: []Member{}}
	var err error
	c.Config, err = ConfigOf(s.prog)
	if errors.Is(err, ErrVersion) {
		s.refused = err
	} else if err != nil {
		return err
	}
	c.Dispatcher = kernel.Describe(s.prog)
	n := len(c.Config.Programs)
	if s.refused != nil {
		n = MaxMembers // as many as are found
	}
	s.parts = make([]part, n)
	dir := folderIn(bpffs).of(s.device.Index, c.Dispatcher.ID)
	_, err = os.Stat(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return kernel.Errno("pins of the dispatcher", err)
	}
	if err == nil {
		c.Folder, c.Pins = dir, pinsIn(dir)
		if err := s.byPins(dir, c.Dispatcher.ID); err != nil {
			return err
		}
	}
	if err := s.byLinks(c.Dispatcher.ID); err != nil {
		return err
	}
	for slot, p := range s.parts {
		if s.refused != nil && p.prog == nil {
			continue
		}
		m := Member{Slot: slot, LinkID: p.link, Missing: p.link == 0, ContinueOn: hook.Never}
		if p.prog != nil {
			if m.Name, err = functionName(p.prog); err != nil {
				return err
			}
			m.Program = kernel.Describe(p.prog)
		}
		if s.refused == nil {
			m.configure(c.Config.Programs[slot])
		}
		c.Members = append(c.Members, m)
	}
	s.chain = c
	return nil
}

// configure sets what the dispatcher's configuration says about a member.
func (m *Member) configure(p ProgramConfig) {
	m.Priority, m.ContinueOn = int(p.Priority), p.ContinueOn()
	m.Frags = p.Flags&unix.BPF_F_XDP_HAS_FRAGS != 0
	m.DevBound = p.Flags&unix.BPF_F_XDP_DEV_BOUND_ONLY != 0
}

// byPins opens the pins in the dispatcher's folder.
func (s *snapshot) byPins(dir string, dispatcher uint32) error {
	for n := range s.parts {
		prog, err := ebpf.LoadPinnedProgram(dir+"/"+progPin(n), nil)
		if err == nil {
			s.parts[n].prog = prog
		} else if !errors.Is(err, fs.ErrNotExist) {
			return kernel.Errno("pin of a member", err)
		}
		l, err := link.LoadPinnedLink(dir+"/"+linkPin(n), nil)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return kernel.Errno("pin of a member's link", err)
		}
		info, err := l.Info()
		l.Close()
		if err != nil {
			return kernel.Errno("link of a member", err)
		}
		target := info.Tracing()
		if target == nil || target.TargetObjectId != 0 && target.TargetObjectId != dispatcher {
			continue // no pin of a member
		}
		s.parts[n].link = uint32(info.ID)
		if prog != nil && kernel.ProgramID(prog) == uint32(info.Program) {
			continue
		}
		// The link says what runs, whatever the program's pin is.
		runs, err := ebpf.NewProgramFromID(info.Program)
		if err != nil {
			return kernel.Errno("program of a member", err)
		}
		s.parts[n].prog.Close()
		s.parts[n].prog = runs
	}
	return nil
}

// byLinks searches all links for links of slots that have no pin. Before Linux
// 5.13 links do not report their target.
func (s *snapshot) byLinks(dispatcher uint32) error {
	if !slices.ContainsFunc(s.parts, func(p part) bool { return p.link == 0 }) {
		return nil
	}
	slots, err := s.slots()
	if err != nil {
		return err
	}
	var it link.Iterator
	defer it.Close()
	for it.Next() {
		info, err := it.Link.Info()
		if err != nil || info.Type != link.TracingType {
			continue // gone meanwhile, or irrelevant
		}
		target := info.Tracing()
		if target == nil || target.TargetObjectId != dispatcher {
			continue
		}
		slot, ok := slots[uint32(target.TargetBtfId)]
		if !ok || slot >= len(s.parts) || s.parts[slot].link != 0 {
			continue
		}
		prog, err := ebpf.NewProgramFromID(info.Program)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return kernel.Errno("program of a member", err)
		}
		if prog.Type() != ebpf.Extension { // a tracing program, such as xdpdump's, is not a member
			prog.Close()
			continue
		}
		s.parts[slot].prog.Close()
		s.parts[slot] = part{prog, uint32(info.ID)}
	}
	return kernel.Errno("list links", it.Err())
}

// slots returns the slots of the dispatcher by the type of their function.
func (s *snapshot) slots() (map[uint32]int, error) {
	handle, err := s.prog.Handle()
	if err != nil {
		return nil, kernel.Errno("types of the dispatcher", err)
	}
	defer handle.Close()
	types, err := handle.Spec(nil)
	if err != nil {
		return nil, kernel.Errno("types of the dispatcher", err)
	}
	slots := map[uint32]int{}
	for n := range s.parts {
		if id, ok := functionID(types, stubName(n, len(s.parts))); ok {
			slots[id] = n
		}
	}
	if s.refused != nil { // their number is not known
		if id, ok := functionID(types, mainFunction); ok {
			slots[id] = 0
		}
	}
	return slots, nil
}

// occupied returns the error for a device that something else holds. A link
// also holds the device: no netlink call replaces a link's program.
func (s *site) occupied(snap *snapshot) error {
	on := &hook.Occupant{Kind: hook.KindLegacy, Mode: snap.mode, Program: kernel.Describe(snap.prog)}
	links, _ := kernel.XDPLinks(on.Program.ID, snap.device.Index)
	busy := hook.Because(hook.ErrBusy, "%w", ErrNotDispatcher).
		Hint("libxdp joins its own dispatchers only; what is there must go first")
	if snap.chain != nil { // then the dispatcher is fine, and a link is in the way
		on.Kind = hook.KindForeign
		busy = hook.Because(hook.ErrBusy, "a dispatcher of libxdp's that a link carries is not to be changed by libxdp's protocol")
	}
	if len(links) > 0 {
		on.Kind, on.LinkID = hook.KindForeign, links[0]
		busy = busy.Hint("the device is free when the holder of link %d closes it; \"%s\" names the holder", on.LinkID,
			kernel.Command("", s.BPFFS, kernel.Flags{"--link", fmt.Sprint(on.LinkID)}, "holders"))
	}
	return busy.HeldBy(on)
}

// functionID returns the id of a function in BTF.
func functionID(types *btf.Spec, name string) (uint32, bool) {
	var f *btf.Func
	if types.TypeByName(name, &f) != nil {
		return 0, false
	}
	id, err := types.TypeID(f)
	return uint32(id), err == nil
}
