package libxdp

import (
	"context"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
)

// An Incoming is a member of a chain to build.
type Incoming struct {
	Source     Source
	Priority   int             // 0: the source's own
	ContinueOn hook.VerdictSet // 0: the source's own
}

// BuildOptions say how to build a chain.
type BuildOptions struct {
	Version uint8 // as in AttachOptions
}

// Built is a chain that is complete and pinned, but not on its device. It has the
// lock of libxdp's folder until Commit or Discard, so that nothing removes its
// pins; other processes wait for the lock.
type Built struct {
	// Dispatcher is the program to attach to the device.
	Dispatcher *ebpf.Program
	Chain      *Chain

	locked *locked
	parts  *built
	join   joining
}

// Build makes a chain for the device, whatever is on it, for a caller that
// attaches the chain in its own way.
func (d Device) Build(ctx context.Context, members []Incoming, o BuildOptions) (done *Built, err error) {
	err = d.at("build", func(s *site) error {
		f, err := folderToChange(s.BPFFS)
		if err != nil {
			return err
		}
		var join joining
		var begin *newChain
		for _, m := range members {
			var one joining
			opts := AttachOptions{Settings: hook.Settings{Priority: m.Priority, ContinueOn: m.ContinueOn}, Version: o.Version, Start: true}
			if one, begin, err = opts.edit([]Source{m.Source}); err != nil {
				return err
			}
			join = append(join, one...)
		}
		if begin == nil {
			return hook.Because(hook.ErrUsage, "a chain has one member at least")
		}
		if done, err = s.prepare(ctx, f, join, begin); err != nil {
			join.close()
		}
		return err
	})
	return done, err
}

func (s *site) prepare(ctx context.Context, f folder, join joining, o *newChain) (*Built, error) {
	dev, err := s.device()
	if err != nil {
		return nil, err
	}
	version, err := o.choose()
	if err != nil {
		return nil, err
	}
	p := &plan{config: Config{Version: version}}
	if err := join.edit(p); err != nil {
		return nil, err
	}
	if err := p.sort(); err != nil {
		return nil, err
	}
	b, err := s.build(p, dev.Index)
	if err != nil {
		return nil, err
	}
	c, err := p.view(*dev, b, f)
	if err != nil {
		b.close()
		return nil, err
	}
	l, err := f.lock(ctx)
	if err != nil {
		b.close()
		return nil, err
	}
	if err := l.pin(c.Folder, b.links, b.progs); err != nil {
		b.close()
		l.unlock()
		return nil, err
	}
	c.Pins = pinsIn(c.Folder)
	return &Built{Dispatcher: b.prog, Chain: c, locked: l, parts: b, join: join}, nil
}

// Commit ends the work when the dispatcher is on the device. The chain stays,
// and leftovers of dead processes are removed.
func (b *Built) Commit() error {
	defer b.close()
	b.locked.tidy(&snapshot{device: rtnl.Device{Index: b.Chain.Ifindex}}, b.Chain)
	return nil
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
