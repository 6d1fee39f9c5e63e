package attach

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/libxdp"
)

// A Place is where to attach: a hook of a device or a cgroup, and the bpffs to
// pin in.
type Place struct {
	Hook   hook.Hook
	Target string
	NetNS  string
	BPFFS  string
}

// A Request is what a program that joins a chain asks for.
type Request struct {
	Name string
	hook.Settings
	hook.Position
	Mode       hook.Mode
	Persistent bool
	Owner      string
	// Style of the chain to start on a free device, and to insist on elsewhere.
	Style hook.Style
	// ConfigVersion of a chain of libxdp that is started; 0 chooses.
	ConfigVersion uint8
}

// site is an opened Place.
type site struct {
	Place
	ns    *kernel.NetNS
	pins  *state.Pins // nil where there is no bpffs
	links []LinkInfo  // known from before; may be nil
}

func (p Place) open() (*site, error) {
	if _, err := hook.Parse(string(p.Hook)); err != nil {
		return nil, hook.Because(hook.ErrUsage, "%w", err)
	}
	if p.Hook.OnCgroup() && p.NetNS != "" {
		return nil, hook.Because(hook.ErrUsage, "a cgroup is in no network namespace; leave %q out", p.NetNS)
	}
	ns, err := kernel.OpenNetNS(p.NetNS)
	if err != nil {
		return nil, err
	}
	s := &site{Place: p, ns: ns}
	s.pins, err = state.OpenPins(p.BPFFS)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		ns.Close()
		return nil, err
	}
	return s, nil
}

func (s *site) close() { s.ns.Close() }

// command is a line that runs the dispatcher command at the place, for hints.
func (p Place) command(args ...string) string { return kernel.Command(p.NetNS, p.BPFFS, args...) }

// commandByLink is command for a verb about a link, which is in no namespace.
func (p Place) commandByLink(verb string, id uint32, args ...string) string {
	words := []string{verb, "--link", strconv.FormatUint(uint64(id), 10)}
	return kernel.Command("", p.BPFFS, append(words, args...)...)
}

// noBPFFS is the refusal to pin where that is not possible.
func (s *site) noBPFFS() error {
	return hook.Because(fs.ErrNotExist, "a persistent member is pinned, and there is no bpffs at %s", s.BPFFS).
		Hint("mount one with \"%s\"", kernel.MountCommand(s.BPFFS))
}

// check completes a request and refuses what can be refused without looking.
func (r *Request) check(s *site) error {
	for _, err := range []error{r.Settings.Check(), r.Settings.CheckFor(s.Hook), r.Position.Check()} {
		if err != nil {
			return hook.Because(hook.ErrUsage, "%w", err)
		}
	}
	if r.Mode != hook.ModeAuto && s.Hook != hook.XDP {
		return hook.Because(hook.ErrUsage, "mode %v: only XDP has modes", r.Mode)
	}
	if r.Name != "" {
		if err := hook.CheckName(r.Name); err != nil {
			return hook.Because(hook.ErrUsage, "%w", err)
		}
	}
	if r.Owner == "" {
		r.Owner = executable()
	} else if err := hook.CheckName(r.Owner); err != nil {
		return hook.Because(hook.ErrUsage, "owner: %w", err)
	}
	if r.Mode > hook.ModeGeneric {
		return hook.Because(hook.ErrUsage, "mode %v: a chain cannot be attached that way", r.Mode)
	}
	switch {
	case r.Style != "" && s.Hook != hook.XDP:
		return hook.Because(hook.ErrUsage, "style %v: only XDP has styles", r.Style)
	case r.ConfigVersion != 0 && r.Style != hook.StyleLibxdp:
		return hook.Because(hook.ErrUsage, "config version %d: only a chain of libxdp has one", r.ConfigVersion)
	case r.ConfigVersion > libxdp.MaxVersion:
		return hook.Because(hook.ErrUsage, "config version %d: libxdp's are 1 to %d", r.ConfigVersion, libxdp.MaxVersion)
	}
	if r.Persistent && s.pins == nil && s.Hook.Family() != "tc" { // filters are not pinned
		return s.noBPFFS()
	}
	return nil
}

func executable() string {
	path, err := os.Executable()
	if name := filepath.Base(path); err == nil && hook.CheckName(name) == nil {
		return name
	}
	return ""
}

// locked runs fn with the lock of the pins, where there are any, and with what
// dead processes left behind removed. fn must not wait.
func (s *site) locked(ctx context.Context, fn func(*state.Locked) error) error {
	if s.pins == nil {
		return fn(nil)
	}
	l, err := s.pins.Lock(ctx)
	if err != nil {
		return err
	}
	defer l.Unlock()
	sweep(l)
	return fn(l)
}
