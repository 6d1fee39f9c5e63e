package libxdp

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
)

// planned reads the device and applies an edit to its chain, or to one that is to start.
func (s *site) planned(edit func(*plan) error, o AttachOptions) (*snapshot, *plan, error) {
	snap, err := s.read()
	if err != nil {
		return nil, nil, err
	}
	p, err := s.edited(snap, edit, o)
	if err != nil {
		snap.close()
		return nil, nil, err
	}
	return snap, p, nil
}

func (s *site) edited(snap *snapshot, edit func(*plan) error, o AttachOptions) (*plan, error) {
	var p *plan
	switch {
	case snap.free() && !o.Start:
		return nil, hook.Because(fs.ErrNotExist, "nothing is attached")
	case snap.free():
		version, err := o.version()
		if err != nil {
			return nil, err
		}
		p = &plan{config: Config{Version: version}, mode: o.Mode}
	case snap.chain == nil:
		return nil, s.occupied(snap)
	case snap.refused != nil:
		return nil, hook.WithHint(snap.refused, "a program that knows that version can change it; so can taking all of it off")
	default:
		if err := snap.elsewhere(s.BPFFS); err != nil {
			return nil, err
		}
		p = snap.plan()
	}
	if err := edit(p); err != nil {
		return nil, err
	}
	return p, p.sort()
}

// elsewhere returns the refusal to change a chain with its pins in another
// bpffs: there the old dispatcher would stay forever.
func (s *snapshot) elsewhere(bpffs string) error {
	if s.chain.Folder != "" {
		return nil
	}
	if slices.ContainsFunc(s.chain.Members, func(m Member) bool { return !m.Missing }) {
		return hook.Because(hook.ErrBusy, "the chain runs, but its pins are not in %s", folderIn(bpffs).path).
			Hint("they are in another bpffs, whose path is to be given, or a process keeps the programs without pins; all of the chain can be taken off nevertheless")
	}
	return nil
}

// change edits the chain on the device. It builds and pins the new chain,
// replaces the old one in one step, and removes the old one's pins.
func (s *site) change(ctx context.Context, edit func(*plan) error, o AttachOptions) (c *Chain, err error) {
	f, err := folderToChange(s.BPFFS)
	if err != nil {
		return nil, err
	}
	busy := 0
	err = kernel.Retry(ctx, func() error {
		snap, p, err := s.planned(edit, o)
		if err != nil {
			return err
		}
		defer snap.close()
		if len(p.entries) == 0 {
			return s.takeOff(ctx, f, snap)
		}
		b, err := s.build(p, snap.device.Index)
		if err != nil {
			return err
		}
		defer b.close()
		if c, err = p.view(snap.device, b, f); err != nil {
			return err
		}
		err = s.install(ctx, f, snap, c, b)
		if errors.Is(err, errHeld) {
			busy++
			if links, _ := kernel.XDPLinks(snap.chain.Dispatcher.ID, snap.device.Index); busy == maxBusy || len(links) > 0 {
				return s.occupied(snap)
			}
			return fmt.Errorf("%w: %w", kernel.ErrAgain, err)
		}
		c.Pins = pinsIn(c.Folder)
		return err
	})
	if err != nil {
		return nil, err
	}
	return c, nil
}

// errHeld: a link holds the device, or held it a moment ago.
var errHeld = errors.New("a link holds the device")

// maxBusy bounds the tries when a link was in the way but is not found.
const maxBusy = 20

// install pins the new chain and replaces the snapshot's program on the device
// by its dispatcher.
func (s *site) install(ctx context.Context, f folder, snap *snapshot, c *Chain, b *built) error {
	l, err := f.lock(ctx)
	if err != nil {
		return err
	}
	defer l.unlock()
	if err := l.pin(c.Folder, b.links, b.progs); err != nil {
		return err
	}
	kernel.Step("attach: pinned")
	if err := s.exchange(snap, b.prog, c.Mode); err != nil {
		return kernel.Undo(err, l.unpin(c.Folder))
	}
	kernel.Step("attach: attached")
	l.giveWay()
	l.tidy(snap, c)
	if c.Mode == hook.ModeAuto {
		if d, err := s.device(); err == nil {
			on, _ := d.Software()
			c.Mode = on.Mode
		}
	}
	return nil
}

// device reads the site's device.
func (s *site) device() (d *rtnl.Device, err error) {
	err = rtnl.In(s.ns, func(conn *rtnl.Conn) (err error) {
		d, err = conn.Device(s.Name)
		return err
	})
	return d, err
}

// takeOff detaches the dispatcher from the device and removes its pins, if any.
func (s *site) takeOff(ctx context.Context, f folder, snap *snapshot) error {
	var l *locked
	if f != (folder{}) {
		var err error
		if l, err = f.lock(ctx); err != nil {
			return err
		}
		defer l.unlock()
	}
	kernel.Step("detach: before")
	if err := s.exchange(snap, nil, snap.mode); errors.Is(err, errHeld) {
		return s.occupied(snap)
	} else if err != nil {
		return err
	}
	kernel.Step("detach: detached")
	if l != nil {
		l.giveWay()
		l.tidy(snap, nil)
	}
	return nil
}

// exchange replaces the snapshot's program on the device by next, or by
// nothing. It returns kernel.ErrAgain when the device has another program by
// now.
func (s *site) exchange(snap *snapshot, next *ebpf.Program, mode hook.Mode) error {
	fd, old := -1, -1
	if next != nil {
		fd = next.FD()
	}
	if !snap.free() {
		old = snap.prog.FD()
	}
	err := rtnl.In(s.ns, func(conn *rtnl.Conn) error {
		return conn.ReplaceXDP(snap.device.Index, fd, old, mode)
	})
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EEXIST), errors.Is(err, unix.EBUSY) && snap.free():
		return fmt.Errorf("%w: %w", kernel.ErrAgain, err)
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w: %w", errHeld, err)
	case next == nil && !errors.Is(err, unix.ENODEV):
		return kernel.Errno("take the dispatcher off the device", err)
	}
	return kernel.RefusedXDP(s.Name, mode, rtnl.Reason(err), err)
}
