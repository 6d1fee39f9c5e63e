package target

import (
	"os"
	"path/filepath"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/libxdp"
)

// A Request is what a program that joins a chain asks for.
type Request struct {
	Name string
	hook.Settings
	hook.Position
	Mode       hook.Mode
	Persistent bool
	Owner      string
	// Override allows that the program switches off the one of a cgroup above.
	Override bool
	// Style is the style of the chain to start on a free device. On any other device
	// the chain must have that style.
	Style hook.Style
	// ConfigVersion is the version of a libxdp chain that is started; 0 chooses.
	ConfigVersion uint8
}

// An AdoptRequest is what a program that is attached without a link asks for
// when it becomes a member.
type AdoptRequest struct {
	Request
	NoGap bool
	// Entry is the program to adopt. It may be empty where there is only one.
	Entry hook.Ref
}

// Check completes the request. It returns ErrUsage for what can be refused without
// reading the hook, and fs.ErrNotExist if a persistent member has no bpffs.
func (r *Request) Check(o *Opened) error {
	if err := usage(r.Settings.Check(), r.Settings.CheckFor(o.Hook), r.Position.Check()); err != nil {
		return err
	}
	if r.Mode != hook.ModeAuto && o.Hook != hook.XDP {
		return hook.Because(hook.ErrUsage, "mode %v: only XDP has modes", r.Mode)
	}
	if r.Name != "" {
		if err := usage(hook.CheckName(r.Name)); err != nil {
			return err
		}
	}
	if r.Owner == "" {
		r.Owner = Executable()
	} else if err := hook.CheckName(r.Owner); err != nil {
		return hook.Because(hook.ErrUsage, "owner: %w", err)
	}
	if r.Mode > hook.ModeGeneric {
		return hook.Because(hook.ErrUsage, "mode %v: a chain cannot be attached that way", r.Mode)
	}
	switch {
	case r.Style != "" && o.Hook != hook.XDP:
		return hook.Because(hook.ErrUsage, "style %v: only XDP has styles", r.Style)
	case r.Override && !o.Hook.OnCgroup():
		return hook.Because(hook.ErrUsage, "override: only a program on a cgroup takes the place of another")
	case r.ConfigVersion != 0 && r.Style != hook.StyleLibxdp:
		return hook.Because(hook.ErrUsage, "config version %d: only a chain of libxdp has one", r.ConfigVersion)
	case r.ConfigVersion > libxdp.MaxVersion:
		return hook.Because(hook.ErrUsage, "config version %d: libxdp's are 1 to %d", r.ConfigVersion, libxdp.MaxVersion)
	}
	if r.Persistent && o.Pins == nil && o.Hook.Family() != "tc" { // filters are not pinned
		return o.NoBPFFS()
	}
	return nil
}

// Executable returns the name of the running executable, or "" if that is no valid
// name for an owner.
func Executable() string {
	path, err := os.Executable()
	if name := filepath.Base(path); err == nil && hook.CheckName(name) == nil {
		return name
	}
	return ""
}

// usage returns the first error as ErrUsage.
func usage(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return hook.Because(hook.ErrUsage, "%w", err)
		}
	}
	return nil
}

// NameFor returns the requested name, else the program's name. It returns ErrUsage
// when the program's name is no valid member name.
func (r *Request) NameFor(prog *load.Loaded) (string, error) {
	if r.Name != "" {
		return r.Name, nil
	}
	if err := hook.CheckName(prog.Name); err != nil {
		return "", hook.Because(hook.ErrUsage, "the program's name will not do for the member: %w; choose one", err)
	}
	return prog.Name, nil
}
