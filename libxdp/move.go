package libxdp

import (
	"context"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/internal/rtnl"
)

// Built is a chain that is complete and pinned, but not on its device. It has the
// lock of libxdp's folder until Commit or Discard, so that nothing removes its
// pins; other processes wait for the lock.
type Built struct {
	// Dispatcher is the program to attach to the device.
	Dispatcher *ebpf.Program
	Chain      *Chain

	locked *locked
	parts  *built
	join   *joining
}

// Build makes a chain for the device, whatever is on it, for a caller that
// attaches the chain in its own way. version is as in AttachOptions.
func (d Device) Build(ctx context.Context, sources []Source, version uint8) (done *Built, err error) {
	err = d.at("build", func(s *site) error {
		f, err := folderToChange(s.BPFFS)
		if err != nil {
			return err
		}
		join, err := AttachOptions{Version: version, Start: true}.join(sources)
		if err != nil {
			return err
		}
		if done, err = s.prepare(ctx, f, join); err != nil {
			join.close()
		}
		return err
	})
	return done, err
}

func (s *site) prepare(ctx context.Context, f folder, join *joining) (done *Built, err error) {
	dev, err := s.device()
	if err != nil {
		return nil, err
	}
	p, err := s.edited(&snapshot{device: *dev}, join.edit, join.AttachOptions)
	if err != nil {
		return nil, err
	}
	b, err := s.build(p, dev.Index)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			b.close()
		}
	}()
	c, err := p.view(*dev, b, f)
	if err != nil {
		return nil, err
	}
	l, err := f.lock(ctx)
	if err != nil {
		return nil, err
	}
	if err := l.pin(c.Folder, b.links, b.progs); err != nil {
		l.unlock()
		return nil, err
	}
	c.Pins = pinsIn(c.Folder)
	return &Built{Dispatcher: b.prog, Chain: c, locked: l, parts: b, join: join}, nil
}

// Commit ends the work when the dispatcher is on the device. The chain stays,
// and leftovers of dead processes are removed.
func (b *Built) Commit() {
	defer b.close()
	b.locked.tidy(&snapshot{device: rtnl.Device{Index: b.Chain.Ifindex}}, b.Chain)
}

// Discard removes the pins, and with them the chain.
func (b *Built) Discard() error {
	defer b.close()
	return b.locked.unpin(b.Chain.Folder)
}

func (b *Built) close() {
	b.parts.close()
	b.join.close()
	b.locked.unlock()
}
