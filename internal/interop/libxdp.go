package interop

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/chains"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/target"
	"github.com/libdispatcher/dispatcher/libxdp"
)

// behindLibxdp is the family of chains that libxdp keeps.
type Family struct{}

// An interopDevice is a device that has, or is to have, a chain of libxdp.
type device struct{ chains.Device }

func deviceOf(o *target.Opened) device { return device{chains.On(o)} }

// libxdp is the device as that package knows it.
func (d device) libxdp() libxdp.Device {
	return libxdp.Device{Name: d.Name, NetNS: d.NetNS, BPFFS: d.BPFFS}
}

// A component is a program that is to join a chain of libxdp.
type component struct {
	src    load.Source
	about  load.Description
	asked  hook.Settings
	old    uint32 // the program whose place and maps it takes; 0 for none
	bpffs  string
	loaded *load.Loaded
	id     uint32 // of the program that was loaded for the chain
}

var _ libxdp.Source = (*component)(nil)

// component describes the program of src, and refuses what such a chain cannot
// keep.
func (d device) component(src load.Source, req target.Request) (*component, error) {
	src, about, err := load.Describe(load.PinningIn(src, d.BPFFS))
	if err != nil {
		return nil, err
	}
	c := &component{src: src, about: about, asked: req.Settings, bpffs: d.BPFFS}
	if req.Name != "" && req.Name != about.Name {
		return nil, hook.Because(hook.ErrUsage, "a chain of libxdp keeps no names: a member is called as its function, here %q", about.Name).
			Hint("leave the name out")
	}
	return c, noSlots(req.Settings)
}

// noSlots refuses what only slots have.
func noSlots(settings hook.Settings) error {
	if settings.OnMissing != 0 && settings.OnMissing != hook.MissingContinue {
		return hook.Because(hook.ErrUsage, "on-missing %v: a chain of libxdp has no slots that could be empty; it goes on where a member is gone", settings.OnMissing)
	}
	return nil
}

func (c *component) Name() string { return c.about.Name }

func (c *component) Frags() bool { return c.about.Shape.Frags }

func (c *component) Settings() hook.Settings {
	return c.asked.Or(c.about.Defaults).WithDefaults()
}

// Load loads the program to take the place of a function of the dispatcher.
func (c *component) Load(target *ebpf.Program, function string) (*ebpf.Program, error) {
	c.discard()
	src, release, err := inheriting(c.src, c.old)
	if err != nil {
		return nil, err
	}
	defer release()
	loaded, err := src.Load(load.Want{Hook: hook.XDP, Extension: &load.Extension{Target: target, Function: function}})
	if err != nil {
		return nil, err
	}
	c.loaded = loaded
	prog, err := c.extension(target, function)
	if err != nil {
		return nil, fmt.Errorf("program %q: %w", loaded.Name, err)
	}
	c.id = kernel.ProgramID(prog)
	return prog, nil
}

// extension returns what takes the place of the function, for the caller to
// close; what else was loaded stays with c.
func (c *component) extension(target *ebpf.Program, function string) (*ebpf.Program, error) {
	if !c.about.Loaded {
		return c.loaded.Program.Clone()
	}
	from, err := libxdp.FromProgram(c.loaded.Program, c.bpffs, c.about.Shape.Frags)
	if err != nil {
		return nil, err
	}
	defer from.Close()
	return from.Load(target, function)
}

// Close drops what was loaded and is not used after all.
func (c *component) Close() { c.discard() }

func (c *component) discard() {
	if c.loaded != nil {
		c.loaded.Discard()
		c.loaded = nil
	}
}

// attach makes the program a member behind libxdp's dispatcher, or starts one.
func (Family) Attach(ctx context.Context, o *target.Opened, src load.Source, req target.Request) (target.Handle, error) {
	d := deviceOf(o)
	if !req.Persistent {
		return nil, hook.Because(hook.ErrUsage, "nobody owns a member of a chain of libxdp: it stays when its process ends, and so it can only be persistent").
			Hint("ask for that (Persistent; without --hold), or move the device over to an owned chain with \"%s\"", o.Command("convert", "xdp", o.Name, "--style", "owned"))
	}
	if !req.Position.IsZero() {
		return nil, byPriorityOnly()
	}
	c, err := d.component(src, req)
	if err != nil {
		return nil, err
	}
	_, id, err := d.libxdp().Attach(ctx, c, libxdp.AttachOptions{
		Settings: c.Settings(), Mode: req.Mode, Version: req.ConfigVersion, Start: req.Style == hook.StyleLibxdp,
	})
	if err != nil {
		c.discard()
		return nil, otherStyle(err)
	}
	h := &handle{Base: target.Base{Opened: o, Loaded: c.loaded}, id: uint32(id)}
	o.NS.Release()
	return h, nil
}

func byPriorityOnly() error {
	return hook.Because(hook.ErrUsage, "a chain of libxdp is ordered by priority, and of equals by name: there is no other place to ask for").
		Hint("choose a priority")
}

// cause takes the frame off an error of package libxdp, whose functions are the
// top for others only.
func Cause(err error) error {
	if e, ok := err.(*hook.Error); ok {
		return e.Err
	}
	return err
}

// otherStyle marks the error of a chain of libxdp that has gone meanwhile.
func otherStyle(err error) error {
	err = Cause(err)
	if errors.Is(err, libxdp.ErrNotDispatcher) {
		return fmt.Errorf("%w: %w", chains.ErrStyle, err)
	}
	return err
}

// plan describes the chain as attach would make it. The program is
// not loaded: it can be loaded for one dispatcher only.
func (Family) Plan(ctx context.Context, o *target.Opened, src load.Source, req target.Request) (*hook.Chain, error) {
	d := deviceOf(o)
	c, err := d.component(src, req)
	if err != nil {
		return nil, err
	}
	planned, err := d.libxdp().Plan(ctx, c, libxdp.AttachOptions{
		Settings: c.Settings(), Mode: req.Mode, Version: req.ConfigVersion, Start: req.Style == hook.StyleLibxdp,
	})
	if err != nil {
		return nil, otherStyle(err)
	}
	chain := &hook.Chain{Hook: o.Hook, Target: planned.Device, Ifindex: planned.Ifindex, NetNS: o.NS.ID(), Pins: []string{}, Members: []hook.Member{}}
	viewLibxdp(chain, planned)
	return chain, nil
}

// adopt is refused: what netlink attached becomes a member of an owned chain.
func (Family) Adopt(_ context.Context, o *target.Opened, _ target.AdoptRequest) (target.Handle, error) {
	return nil, chains.ErrStyle
}

// detach takes one member out, or all for an empty ref.
func (Family) Detach(ctx context.Context, o *target.Opened, ref hook.Ref, _ bool) error {
	d := deviceOf(o)
	if ref == "" {
		return otherStyle(d.libxdp().DetachAll(ctx))
	}
	return otherStyle(d.libxdp().Detach(ctx, ref))
}

// open finds a member by its name or program.
func (Family) Open(ctx context.Context, o *target.Opened, ref hook.Ref) (target.Handle, error) {
	d := deviceOf(o)
	c, err := d.libxdp().Read(ctx)
	if err != nil {
		return nil, otherStyle(err)
	}
	m, err := c.Find(ref)
	if err != nil {
		return nil, err
	}
	h := &handle{Base: target.Base{Opened: o}, id: m.Program.ID}
	o.NS.Release()
	return h, nil
}

// viewLibxdp describes a chain of libxdp.
func viewLibxdp(c *hook.Chain, from *libxdp.Chain) {
	c.Style, c.ConfigVersion, c.DispatcherID = hook.StyleLibxdp, from.Config.Version, from.Dispatcher.ID
	c.Frags, c.Mode = from.Config.Frags, from.Mode
	c.Pins = append(c.Pins, from.Pins...)
	for _, m := range from.Members {
		v := hook.Member{
			Kind: hook.KindLibxdp, Name: m.Name, Program: m.Program, LinkID: m.LinkID,
			Settings:   hook.Settings{Priority: m.Priority, ContinueOn: m.ContinueOn},
			Persistent: from.Folder != "", State: hook.StateRunning,
		}
		if m.Missing {
			v.State = hook.StateEmpty
		}
		c.Members = append(c.Members, v)
	}
}

// read describes the chain on the device; errStyle when it is not one of libxdp's.
func (Family) Read(ctx context.Context, o *target.Opened) (c *hook.Chain, err error) {
	d := deviceOf(o)
	err = kernel.Retry(ctx, func() error {
		snap, err := d.Read()
		if err != nil {
			return err
		}
		defer snap.Close()
		c, err = LibxdpChain(o, snap)
		return err
	})
	return c, err
}

// LibxdpChain describes the chain of libxdp that was read; errStyle when it is none.
func LibxdpChain(o *target.Opened, snap *chains.Snapshot) (*hook.Chain, error) {
	lc, err := deviceOf(o).libxdpOf(snap)
	switch {
	case err != nil:
		return nil, err
	case lc == nil:
		return nil, chains.ErrStyle
	}
	c := snap.Describe(o)
	viewLibxdp(c, lc)
	return c, nil
}

// libxdpOf reads the chain behind a dispatcher of libxdp that is on a device; nil
// when it is none.
func (d device) libxdpOf(snap *chains.Snapshot) (*libxdp.Chain, error) {
	if !snap.Libxdp {
		return nil, nil
	}
	c, err := libxdp.ReadProgram(snap.Prog, snap.Device.Index, d.BPFFS)
	if errors.Is(err, libxdp.ErrNotDispatcher) || errors.Is(err, fs.ErrNotExist) {
		return nil, kernel.ErrAgain
	}
	if c != nil {
		c.Mode = snap.Mode
	}
	return c, err
}
