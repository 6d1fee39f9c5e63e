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
	// Style of the chain to start on a free device, and to insist on elsewhere.
	Style hook.Style
	// ConfigVersion of a chain of libxdp that is started; 0 chooses.
	ConfigVersion uint8
}

// An AdoptRequest is what a program that is attached without a link asks for
// when it becomes a member.
type AdoptRequest struct {
	Request
	NoGap bool
	// Entry is which one; may be empty where there is one only.
	Entry hook.Ref
}

// check completes a request and refuses what can be refused without looking.
func (r *Request) Check(o *Opened) error {
	if err := checkSettings(o.Hook, r.Settings); err != nil {
		return err
	}
	if err := r.Position.Check(); err != nil {
		return hook.Because(hook.ErrUsage, "%w", err)
	}
	if r.Mode != hook.ModeAuto && o.Hook != hook.XDP {
		return hook.Because(hook.ErrUsage, "mode %v: only XDP has modes", r.Mode)
	}
	if r.Name != "" {
		if err := hook.CheckName(r.Name); err != nil {
			return hook.Because(hook.ErrUsage, "%w", err)
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

func Executable() string {
	path, err := os.Executable()
	if name := filepath.Base(path); err == nil && hook.CheckName(name) == nil {
		return name
	}
	return ""
}

func checkSettings(h hook.Hook, s hook.Settings) error {
	for _, err := range []error{s.Check(), s.CheckFor(h)} {
		if err != nil {
			return hook.Because(hook.ErrUsage, "%w", err)
		}
	}
	return nil
}

// nameFor returns the name that was asked for, else the program's.
func (r *Request) NameFor(prog *load.Loaded) (string, error) {
	if r.Name != "" {
		return r.Name, nil
	}
	if err := hook.CheckName(prog.Name); err != nil {
		return "", hook.Because(hook.ErrUsage, "the program's name will not do for the member: %w; choose one", err)
	}
	return prog.Name, nil
}
