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
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
	"github.com/libdispatcher/dispatcher/libxdp"
)

// Family is the family of chains that libxdp keeps.
type Family struct{}

// A device has a chain of libxdp, or will get one.
type device struct{ chains.Device }

func deviceOf(o *target.Opened) device { return device{chains.Device{Opened: o}} }

// libxdp returns the device as a Device of package libxdp.
func (d device) libxdp() libxdp.Device {
	return libxdp.Device{Name: d.Name, NetNS: d.NetNS, BPFFS: d.BPFFS}
}

// A component is a program that joins a chain of libxdp.
type component struct {
	src    load.Source
	about  load.Description
	asked  hook.Settings
	old    uint32 // the program that the component replaces, maps included; 0 for none
	bpffs  string
	begins func() (hook.Begins, error)
	loaded *load.Loaded
	id     uint32 // of the program that was loaded for the chain
}

var _ libxdp.Source = (*component)(nil)

// component describes the program of src. It refuses settings that a chain of libxdp
// cannot keep.
func (d device) component(src load.Source, req target.Request) (*component, error) {
	src, about, err := load.Describe(load.PinningIn(src, d.BPFFS))
	if err != nil {
		return nil, err
	}
	c := &component{src: src, about: about, asked: req.Settings, bpffs: d.BPFFS, begins: d.Begins}
	if req.Name != "" && req.Name != about.Name {
		return nil, hook.Because(hook.ErrUsage, "a chain of libxdp keeps no names: a member is called as its function, here %q", about.Name).
			Hint("leave the name out")
	}
	return c, noSlots(req.Settings)
}

// noSlots refuses settings that only slots have.
func noSlots(settings hook.Settings) error {
	if settings.OnMissing != 0 && settings.OnMissing != hook.MissingContinue {
		return hook.Because(hook.ErrUsage, "on-missing %v: a chain of libxdp has no slots that could be empty; it goes on where a member is gone", settings.OnMissing)
	}
	return nil
}

// Name returns the name of the program's function.
func (c *component) Name() string { return c.about.Name }

// Frags tells whether the program takes multi-buffer packets.
func (c *component) Frags() bool { return c.about.Shape.Frags }

// Settings returns the requested settings, with the program's own as defaults.
func (c *component) Settings() hook.Settings {
	return c.asked.Or(c.about.Defaults).WithDefaults()
}

// Load loads the program so that it can replace a function of the dispatcher. The
// caller closes the result.
func (c *component) Load(target *ebpf.Program, function string) (*ebpf.Program, error) {
	c.Close()
	var old *load.Loaded
	if c.old != 0 {
		prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(c.old))
		if err != nil {
			return nil, kernel.Again(err)
		}
		old = load.Own(prog)
		defer old.Close()
	}
	loaded, err := load.Successor(c.src, old, load.Want{Hook: hook.XDP, Begins: c.begins, Extension: &load.Extension{Target: target, Function: function}})
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

// extension loads the program that replaces the function. The caller closes it;
// everything else that was loaded stays with c.
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

// Close discards what was loaded and is not used after all.
func (c *component) Close() {
	if c.loaded != nil {
		c.loaded.Discard()
		c.loaded = nil
	}
}

// Attach makes the program a member behind libxdp's dispatcher, or starts a
// dispatcher. It returns ErrStyle when the chain on the device is not libxdp's.
func (Family) Attach(ctx context.Context, o *target.Opened, src load.Source, req target.Request) (target.Handle, error) {
	d := deviceOf(o)
	if !req.Persistent {
		return nil, hook.Because(hook.ErrUsage, "nobody owns a member of a chain of libxdp: it stays when its process ends, and so it can only be persistent").
			Hint("ask for that (Persistent; without --hold), or move the device over to an owned chain with \"%s\"", o.Command(kernel.Flags{"--style", "owned"}, "convert", "xdp", o.Name))
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
		c.Close()
		return nil, otherStyle(err)
	}
	return &handle{Base: target.Base{Opened: o, Loaded: c.loaded}, id: uint32(id)}, nil
}

func byPriorityOnly() error {
	return hook.Because(hook.ErrUsage, "a chain of libxdp is ordered by priority, and of equals by name: there is no other place to ask for").
		Hint("choose a priority")
}

// Cause returns the Cause in an error of package libxdp. Users call that package too,
// so its functions return a complete hook.Error, which must not be wrapped again.
func Cause(err error) error {
	if e, ok := err.(*hook.Error); ok {
		return e.Err
	}
	return err
}

// otherStyle turns the error for a chain of libxdp that is gone into ErrStyle.
func otherStyle(err error) error {
	err = Cause(err)
	if errors.Is(err, libxdp.ErrNotDispatcher) {
		return fmt.Errorf("%w: %w", chains.ErrStyle, err)
	}
	return err
}

// Plan describes the chain that Attach would make. It does not load the program: an
// extension is loaded for one dispatcher only.
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
	if chain.Begins, err = o.Begins(); err != nil {
		return nil, err
	}
	return chain, nil
}

// Adopt is refused: what netlink attached becomes a member of an owned chain.
func (Family) Adopt(*target.Opened, *state.Locked, target.AdoptRequest) (target.Handle, error) {
	return nil, chains.ErrStyle
}

// Detach removes one member, or all members for an empty ref.
func (Family) Detach(ctx context.Context, o *target.Opened, ref hook.Ref, _ bool) error {
	d := deviceOf(o)
	if ref == "" {
		return otherStyle(d.libxdp().DetachAll(ctx))
	}
	return otherStyle(d.libxdp().Detach(ctx, ref))
}

// Open opens a member by its name or program. The Handle takes over the opened target.
func (Family) Open(o *target.Opened, ref hook.Ref) (target.Handle, error) {
	d := deviceOf(o)
	snap, err := d.Read()
	if err != nil {
		return nil, err
	}
	defer snap.Close()
	c, err := d.libxdpOf(snap)
	if err != nil {
		return nil, err
	}
	m, err := c.Find(ref)
	if err != nil {
		return nil, err
	}
	return &handle{Base: target.Base{Opened: o}, id: m.Program.ID}, nil
}

// viewLibxdp fills c in with the description of a chain of libxdp.
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

// Read describes the chain on the device. It returns ErrStyle when the chain is not
// libxdp's.
func (Family) Read(o *target.Opened) (*hook.Chain, error) {
	snap, err := deviceOf(o).Read()
	if err != nil {
		return nil, err
	}
	defer snap.Close()
	return LibxdpChain(o, snap)
}

// LibxdpChain describes the chain in a snapshot. It returns ErrStyle when the chain
// is not libxdp's.
func LibxdpChain(o *target.Opened, snap *chains.Snapshot) (*hook.Chain, error) {
	lc, err := deviceOf(o).libxdpOf(snap)
	if err != nil {
		return nil, err
	}
	c := snap.Describe(o)
	viewLibxdp(c, lc)
	return c, nil
}

// libxdpOf reads the chain behind the dispatcher of libxdp on the device. It returns
// ErrStyle when the program there is not such a dispatcher.
func (d device) libxdpOf(snap *chains.Snapshot) (*libxdp.Chain, error) {
	if !snap.Libxdp {
		return nil, chains.ErrStyle
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
