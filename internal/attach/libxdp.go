package attach

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/libxdp"
)

// errStyle: by now the device has a chain of the other style.
var errStyle = errors.New("a chain of another style is there")

// style tells who keeps the chain that a program would join: that of the chain
// that is there, and on a free device what was asked for.
func (s *site) style(asked hook.Style) (hook.Style, error) {
	snap, err := s.read()
	if err != nil {
		return "", err
	}
	defer snap.close()
	switch {
	case snap.libxdp:
		if asked == hook.StyleOwned {
			return "", s.occupied(snap)
		}
		return hook.StyleLibxdp, nil
	case snap.chain != nil && !snap.chain.Closed && asked == hook.StyleLibxdp:
		return "", hook.Because(hook.ErrIncompatible, "the chain on %s is an owned one, and a device has one chain", snap.device.Name).
			Hint("join it (leave the style out), or move it over with \"%s\"", s.command("convert", "xdp", snap.device.Name, "--style", "libxdp"))
	case snap.chain == nil && !snap.free(), asked != hook.StyleLibxdp:
		return hook.StyleOwned, nil
	}
	return hook.StyleLibxdp, nil
}

// inStyle runs what is to be done on an owned chain, or on one of libxdp,
// whichever is there or asked for.
func (s *site) inStyle(ctx context.Context, asked hook.Style, owned, libxdp func() error) error {
	const tries = 10 // devices do not change their style all the time
	var err error
	for range tries {
		if err = ctx.Err(); err != nil {
			break
		}
		var style hook.Style
		if err = kernel.Retry(ctx, func() (err error) { style, err = s.style(asked); return err }); err != nil {
			return err
		}
		fn := owned
		if style == hook.StyleLibxdp {
			fn = libxdp
		}
		if err = fn(); !errors.Is(err, errStyle) {
			return err
		}
	}
	return hook.Because(hook.ErrChanged, "gave up: %w", err)
}

// taken is the reason why an owned chain cannot be changed: there is none.
func (s *site) taken(snap *snapshot) error {
	if snap.libxdp {
		return errStyle
	}
	return s.occupied(snap)
}

// libxdp is the device of the site as that package knows it.
func (s *site) libxdp() libxdp.Device {
	return libxdp.Device{Name: s.Target, NetNS: s.NetNS, BPFFS: s.BPFFS}
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
func (s *site) component(src load.Source, req Request) (*component, error) {
	src, about, err := load.Describe(load.PinningIn(src, s.BPFFS))
	if err != nil {
		return nil, err
	}
	c := &component{src: src, about: about, asked: req.Settings, bpffs: s.BPFFS}
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

// attachLibxdp makes the program a member behind libxdp's dispatcher, or starts
// one.
func (s *site) attachLibxdp(ctx context.Context, src load.Source, req Request) (Handle, error) {
	if !req.Persistent {
		return nil, hook.Because(hook.ErrUsage, "nobody owns a member of a chain of libxdp: it stays when its process ends, and so it can only be persistent").
			Hint("ask for that (Persistent; without --hold), or move the device over to an owned chain with \"%s\"", s.command("convert", "xdp", s.Target, "--style", "owned"))
	}
	if !req.Position.IsZero() {
		return nil, byPriorityOnly()
	}
	c, err := s.component(src, req)
	if err != nil {
		return nil, err
	}
	_, id, err := s.libxdp().Attach(ctx, c, libxdp.AttachOptions{
		Settings: c.Settings(), Mode: req.Mode, Version: req.ConfigVersion, Start: req.Style == hook.StyleLibxdp,
	})
	if err != nil {
		c.discard()
		return nil, otherStyle(err)
	}
	h := &libxdpHandle{unowned: unowned{site: s, loaded: c.loaded}, id: uint32(id)}
	s.ns.Release()
	return h, nil
}

func byPriorityOnly() error {
	return hook.Because(hook.ErrUsage, "a chain of libxdp is ordered by priority, and of equals by name: there is no other place to ask for").
		Hint("choose a priority")
}

// cause takes the frame off an error of package libxdp, whose functions are the
// top for others only.
func cause(err error) error {
	if e, ok := err.(*hook.Error); ok {
		return e.Err
	}
	return err
}

// otherStyle marks the error of a chain of libxdp that has gone meanwhile.
func otherStyle(err error) error {
	err = cause(err)
	if errors.Is(err, libxdp.ErrNotDispatcher) {
		return fmt.Errorf("%w: %w", errStyle, err)
	}
	return err
}

// planLibxdp describes the chain as attachLibxdp would make it. The program is
// not loaded: it can be loaded for one dispatcher only.
func (s *site) planLibxdp(ctx context.Context, src load.Source, req Request) (*hook.Chain, error) {
	c, err := s.component(src, req)
	if err != nil {
		return nil, err
	}
	planned, err := s.libxdp().Plan(ctx, c, libxdp.AttachOptions{
		Settings: c.Settings(), Mode: req.Mode, Version: req.ConfigVersion, Start: req.Style == hook.StyleLibxdp,
	})
	if err != nil {
		return nil, otherStyle(err)
	}
	chain := &hook.Chain{Hook: s.Hook, Target: planned.Device, Ifindex: planned.Ifindex, NetNS: s.ns.ID(), Pins: []string{}, Members: []hook.Member{}}
	viewLibxdp(chain, planned)
	return chain, nil
}

// detachLibxdp takes one member out, or all for an empty ref.
func (s *site) detachLibxdp(ctx context.Context, ref hook.Ref) error {
	if ref == "" {
		return otherStyle(s.libxdp().DetachAll(ctx))
	}
	return otherStyle(s.libxdp().Detach(ctx, ref))
}

// openLibxdp finds a member by its name or program.
func (s *site) openLibxdp(ctx context.Context, ref hook.Ref) (Handle, error) {
	c, err := s.libxdp().Read(ctx)
	if err != nil {
		return nil, otherStyle(err)
	}
	m, err := c.Find(ref)
	if err != nil {
		return nil, err
	}
	h := &libxdpHandle{unowned: unowned{site: s}, id: m.Program.ID}
	s.ns.Release()
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

// libxdpOf reads the chain behind a dispatcher of libxdp that is on a device; nil
// when it is none.
func (s *site) libxdpOf(snap *snapshot) (*libxdp.Chain, error) {
	if !snap.libxdp {
		return nil, nil
	}
	c, err := libxdp.ReadProgram(snap.prog, snap.device.Index, s.BPFFS)
	if errors.Is(err, libxdp.ErrNotDispatcher) || errors.Is(err, fs.ErrNotExist) {
		return nil, kernel.ErrAgain
	}
	if c != nil {
		c.Mode = snap.mode
	}
	return c, err
}
