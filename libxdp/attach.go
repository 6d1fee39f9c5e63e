package libxdp

import (
	"context"
	"errors"
	"io/fs"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// AttachOptions say how a program joins. The zero value joins an existing
// chain, with the settings that the program itself asks for.
type AttachOptions struct {
	// Settings override those of the source. OnMissing has no meaning here.
	hook.Settings
	// Mode is the mode of a chain that Start makes. An existing chain keeps its
	// mode, and it is an error to ask for another one.
	Mode hook.Mode
	// Start makes a chain on a device that has none. Without Start a missing
	// chain is an error, fs.ErrNotExist.
	Start bool
	// Version is the version of a chain that Start makes. libxdp joins only
	// chains of the version that it writes itself (1.3 to 1.5 write 2, and 1.6
	// writes 3), so choose the version of the other tools on this machine. 0
	// chooses the version of the dispatcher that was loaded last on this machine;
	// without one, the version that the installed library (libxdp.so.1.N) writes;
	// without that, MaxVersion. An existing chain keeps its version.
	Version uint8
}

// Attach adds a program to the chain on the device. It returns the new chain and
// the program's id in that chain.
func (d Device) Attach(ctx context.Context, src Source, o AttachOptions) (*Chain, ebpf.ProgramID, error) {
	c, ids, err := d.AttachAll(ctx, []Source{src}, o)
	if err != nil {
		return nil, 0, err
	}
	return c, ids[0], nil
}

// AttachAll adds several programs in one step: all of them or none.
func (d Device) AttachAll(ctx context.Context, sources []Source, o AttachOptions) (c *Chain, ids []ebpf.ProgramID, err error) {
	err = d.at("attach", func(s *site) error {
		join, err := o.join(sources)
		if err != nil {
			return err
		}
		defer join.close()
		if c, err = s.change(ctx, join.edit, o); err != nil {
			return err
		}
		for _, l := range join.programs {
			ids = append(ids, ebpf.ProgramID(kernel.ProgramID(l.prog)))
		}
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	return c, ids, nil
}

// Plan returns the chain that Attach would make, and changes nothing. It does
// not load the program, so the kernel has no say. The new member has no
// program, and the chain no dispatcher.
func (d Device) Plan(ctx context.Context, src Source, o AttachOptions) (c *Chain, err error) {
	err = d.at("attach", func(s *site) error {
		join, err := o.join([]Source{src})
		if err != nil {
			return err
		}
		defer join.close()
		f, err := folderToChange(s.BPFFS)
		if err != nil {
			return err
		}
		return kernel.Retry(ctx, func() error {
			snap, p, err := s.planned(join.edit, o)
			if err != nil {
				return err
			}
			defer snap.close()
			c, err = p.view(snap.device, nil, f)
			return err
		})
	})
	return c, err
}

// joining are the programs that join a chain.
type joining struct {
	AttachOptions
	programs []*loader
}

// join checks the options and returns the new members.
func (o AttachOptions) join(sources []Source) (*joining, error) {
	if len(sources) == 0 {
		return nil, hook.Because(hook.ErrUsage, "there is no program to attach")
	}
	if err := checkSettings(o.Settings); err != nil {
		return nil, err
	}
	if o.Mode > hook.ModeGeneric {
		return nil, hook.Because(hook.ErrUsage, "mode %v: a chain cannot be attached that way", o.Mode)
	}
	if o.Version > MaxVersion {
		return nil, hook.Because(ErrVersion, "version %d: the versions are 1 to %d", o.Version, MaxVersion)
	}
	j := &joining{AttachOptions: o}
	for _, src := range sources {
		j.programs = append(j.programs, &loader{Source: src})
	}
	return j, nil
}

// configFor returns the configuration of a new member.
func configFor(src Source, s hook.Settings) ProgramConfig {
	var c ProgramConfig
	c.configure(s.Or(src.Settings()).Or(hook.Settings{Priority: DefaultPriority, ContinueOn: hook.SetOf(hook.Pass)}))
	c.setFrags(src.Frags())
	return c
}

func (j *joining) edit(p *plan) error {
	if j.Mode != hook.ModeAuto && p.mode != j.Mode {
		return hook.Because(hook.ErrIncompatible, "the chain is in %v mode, and all its members are", p.mode).
			Hint("ask for %v or auto", p.mode)
	}
	for _, l := range j.programs {
		p.entries = append(p.entries, &entry{name: l.Name(), config: configFor(l.Source, j.Settings), source: l})
	}
	return nil
}

// close releases the loaded programs.
func (j *joining) close() {
	for _, l := range j.programs {
		l.prog.Close()
	}
}

// Detach removes a member from the chain. With the last member it detaches the
// dispatcher from the device. [Chain.Find] lists the forms of ref.
func (d Device) Detach(ctx context.Context, ref hook.Ref) error {
	return d.edit(ctx, "detach", func(p *plan) error {
		e, err := p.find(ref)
		if err == nil {
			p.entries = slices.DeleteFunc(p.entries, func(x *entry) bool { return x == e })
		}
		return err
	})
}

// DetachAll detaches the dispatcher with all its members, whatever its version
// and wherever its pins are. Pins in another bpffs stay, and Clean removes them
// there. DetachAll needs no bpffs.
func (d Device) DetachAll(ctx context.Context) error {
	return d.at("detach", func(s *site) error {
		f, err := folderToChange(s.BPFFS)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return s.withChain(ctx, func(snap *snapshot) error { return s.takeOff(ctx, f, snap) })
	})
}

// Set changes a member's priority, and with it the order, and its continue set.
// Zero values change nothing.
func (d Device) Set(ctx context.Context, ref hook.Ref, settings hook.Settings) error {
	if err := checkSettings(settings); err != nil {
		return d.failed("set", err)
	}
	return d.edit(ctx, "set", func(p *plan) error {
		e, err := p.find(ref)
		if err == nil {
			e.config.configure(settings)
		}
		return err
	})
}

// Replace replaces the program of a member; the settings stay. Among members of
// equal priority the name decides the order, so a program with another name may
// run at another position.
func (d Device) Replace(ctx context.Context, ref hook.Ref, src Source) error {
	next := &loader{Source: src}
	defer func() { next.prog.Close() }()
	return d.edit(ctx, "replace", func(p *plan) error {
		e, err := p.find(ref)
		if err != nil {
			return err
		}
		e.name, e.source, e.prog = src.Name(), next, nil
		e.config.setFrags(src.Frags())
		return nil
	})
}

// edit changes an existing chain.
func (d Device) edit(ctx context.Context, op string, edit func(*plan) error) error {
	return d.at(op, func(s *site) error {
		_, err := s.change(ctx, edit, AttachOptions{})
		return err
	})
}
