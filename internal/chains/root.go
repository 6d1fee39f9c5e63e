package chains

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// A root carries the dispatcher of a chain: a root link, or netlink's attachment.
type root interface {
	// LinkID returns the id of the link, 0 for a root that is not a link.
	LinkID() uint32
	// Program returns the program that the root carries; the caller closes it. The
	// error is hook.ErrDefunct when the device is gone, and target.ErrDetached when
	// the chain was closed and taken off the device.
	Program() (*ebpf.Program, error)
	// Swap replaces old by next. The error is kernel.ErrAgain when the root does not
	// carry old any more.
	Swap(next, old *ebpf.Program) error
	// Release takes old off the device.
	Release(old *ebpf.Program) error
	// Pinner returns the link to pin, nil for a root that is not a link.
	Pinner() interface{ Pin(string) error }
	// Close closes the descriptor of the link.
	Close()
}

// linkRoot is a root link: while it exists netlink cannot replace the dispatcher.
type linkRoot struct {
	link kernel.RawLink
	id   uint32
	// refused says why the link is in generic mode, if the driver was asked for native mode.
	refused string
	pins    *state.Pins // nil without a bpffs
	known   *known
}

// known is what this process has put into its root link, where it may not open programs by
// their ids.
type known struct {
	*state.Dispatcher
	chain *state.Chain
}

// know remembers the dispatcher that this process has just put into the root. Elsewhere an
// open dispatcher would be a burden: it makes the emptying of its slots slower, see
// [state.Slots].
func know(r root, d *state.Dispatcher, chain *state.Chain) {
	l, ok := r.(*linkRoot)
	if !ok || kernel.HasCapability(unix.CAP_SYS_ADMIN) {
		return
	}
	l.forget()
	if twin, err := d.Clone(); err == nil { // else the next look is refused
		l.known = &known{twin, chain}
	}
}

func (r *linkRoot) forget() {
	if r.known != nil {
		r.known.Close()
		r.known = nil
	}
}

// knows returns what this process has put into the link, if it is the program with the id.
func (r *linkRoot) knows(id uint32) *known {
	if r.known != nil && kernel.ProgramID(r.known.Program) == id {
		return r.known
	}
	return nil
}

// find reads the chain of a dispatcher that the root carries: by the ids of the maps, or
// where this process may not open those, by the pins.
func find(r root, prog *ebpf.Program) (*state.Chain, error) {
	l, ok := r.(*linkRoot)
	if !ok {
		return state.Find(prog)
	}
	if k := l.knows(kernel.ProgramID(prog)); k != nil {
		return k.chain, nil
	}
	chain, err := state.Find(prog)
	if !errors.Is(err, unix.EPERM) {
		return chain, err
	}
	d, err := l.pinned(kernel.ProgramID(prog), err)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.Chain()
}

func newLinkRoot(l link.Link, pins *state.Pins) (*linkRoot, error) {
	raw, err := kernel.AsRaw(l)
	if err != nil {
		return nil, err
	}
	info, err := raw.Info()
	if err != nil {
		l.Close()
		return nil, kernel.Errno("root link", err)
	}
	if info.Type != link.XDPType {
		l.Close()
		return nil, fmt.Errorf("link %d is of type %v, not XDP", info.ID, info.Type)
	}
	return &linkRoot{link: raw, id: uint32(info.ID), pins: pins}, nil
}

func openLinkRoot(id uint32, pins *state.Pins) (*linkRoot, error) {
	l, err := kernel.OpenLink(id)
	if err != nil {
		return nil, err
	}
	return newLinkRoot(l, pins)
}

func (r *linkRoot) LinkID() uint32                         { return r.id }
func (r *linkRoot) Pinner() interface{ Pin(string) error } { return r.link }

func (r *linkRoot) Close() {
	r.forget()
	r.link.Close()
}

// state returns the program and the device of the link. ifindex 0 says that the device
// is gone; the program is then the last one that the link carried.
func (r *linkRoot) state() (prog, ifindex uint32, err error) {
	info, err := r.link.Info()
	if err != nil {
		return 0, 0, kernel.Errno("root link", err)
	}
	return uint32(info.Program), info.XDP().Ifindex, nil
}

func (r *linkRoot) Program() (*ebpf.Program, error) {
	id, ifindex, err := r.state()
	if err != nil {
		return nil, err
	}
	prog, err := r.open(id)
	if err != nil {
		return nil, err
	}
	if ifindex == 0 {
		defer prog.Close()
		if c, err := find(r, prog); err == nil && c.Closed {
			return nil, target.ErrDetached
		}
		return nil, target.ErrGone
	}
	return prog, nil
}

// open opens the dispatcher with the id.
func (r *linkRoot) open(id uint32) (*ebpf.Program, error) {
	if k := r.knows(id); k != nil {
		prog, err := k.Program.Clone()
		return prog, kernel.Errno("dispatcher", err)
	}
	prog, err := kernel.OpenProgram(id, "dispatcher")
	if !errors.Is(err, unix.EPERM) {
		return prog, err
	}
	d, err := r.pinned(id, err)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	prog, err = d.Program.Clone()
	return prog, kernel.Errno("dispatcher", err)
}

func (r *linkRoot) Swap(next, old *ebpf.Program) error {
	err := r.link.UpdateArgs(link.RawLinkUpdateOptions{New: next, Old: old, Flags: unix.BPF_F_REPLACE})
	switch {
	case errors.Is(err, unix.EPERM): // the link does not carry old (bpf_xdp_link_update)
		return kernel.ErrAgain
	case errors.Is(err, unix.ENOLINK):
		return target.ErrGone
	}
	return kernel.Errno("exchange the dispatcher", err)
}

func (r *linkRoot) Release(*ebpf.Program) error {
	return kernel.Errno("detach the root link", r.link.Detach())
}

// A NetlinkRoot is the root of a chain that is attached through netlink. The chain
// works in the same way, but any process may replace it.
type NetlinkRoot struct {
	ns    *kernel.NetNS // borrowed
	Index int
	Mode  hook.Mode
}

// OnNetlink returns the root for a dispatcher that netlink carries, or will carry, on
// the device. It borrows the network namespace of o.
func (snap *Snapshot) OnNetlink(o *target.Opened) *NetlinkRoot {
	return &NetlinkRoot{o.NS, snap.Device.Index, snap.Mode}
}

// LinkID returns 0, as there is no link.
func (r *NetlinkRoot) LinkID() uint32                         { return 0 }
func (r *NetlinkRoot) Pinner() interface{ Pin(string) error } { return nil }
func (r *NetlinkRoot) Close()                                 {}

// Program opens the program that netlink carries on the device; the caller closes it.
// The error is hook.ErrDefunct when the device is gone or carries nothing.
func (r *NetlinkRoot) Program() (prog *ebpf.Program, err error) {
	err = rtnl.In(r.ns, func(c *rtnl.Conn) error {
		d, err := c.DeviceByIndex(r.Index)
		if errors.Is(err, fs.ErrNotExist) {
			return hook.Because(hook.ErrDefunct, "%w", err)
		}
		if err != nil {
			return err
		}
		x, ok := d.Software()
		if !ok {
			return target.ErrGone
		}
		prog, err = ebpf.NewProgramFromID(ebpf.ProgramID(x.Program))
		return kernel.Again(err)
	})
	return prog, err
}

// Attach puts prog on the device, which must be free.
func (r *NetlinkRoot) Attach(prog *ebpf.Program) error { return r.set(prog.FD(), -1) }

// Swap replaces old by next. The error is kernel.ErrAgain when the device does not carry
// old any more.
func (r *NetlinkRoot) Swap(next, old *ebpf.Program) error {
	return kernel.Errno("exchange the dispatcher", raced(r.set(next.FD(), old.FD())))
}

// Release takes old off the device. The error is Swap's.
func (r *NetlinkRoot) Release(old *ebpf.Program) error {
	return kernel.Errno("detach the dispatcher", raced(r.set(-1, old.FD())))
}

func (r *NetlinkRoot) set(fd, old int) error {
	return rtnl.In(r.ns, func(c *rtnl.Conn) error { return c.ReplaceXDP(r.Index, fd, old, r.Mode) })
}

// raced returns kernel.ErrAgain for an error of netlink which says that the device
// carries something else now. EBUSY means a link: it took the device just now, or its
// last pin was removed and the kernel has not released it yet.
func raced(err error) error {
	if errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EBUSY) {
		return kernel.ErrAgain
	}
	return err
}
