package links

import (
	"errors"
	"io/fs"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// Names maps links to members, by the registry, and by the pins where the registry has
// no record. Both may be missing; then all links are foreign.
type Names struct {
	reg    *state.Registry
	err    error // why the registry or the pins could not be read
	pins   *state.Pins
	pinned map[string]string // folder to member; read when it is first needed
	// moving says that stand-ins may be attached. Where there is a bpffs, a pin tells.
	moving bool
}

// OpenNames opens the registry and the pins, as far as they exist; the caller closes
// the Names. An error in reading them is returned by the first question about a link.
func OpenNames(o *target.Opened) *Names {
	n := newNames(o.Pins)
	if o.Pins != nil && n.err == nil {
		n.reg, n.err = openRegistry(o.Pins)
	}
	return n
}

// openRegistry opens the registry. It returns nil, which acts as an empty registry, if
// there is none, or if the registry is of another version: that one stays untouched.
func openRegistry(p *state.Pins) (*state.Registry, error) {
	reg, err := p.OpenRegistry()
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, ebpf.ErrNotSupported) {
		return nil, nil
	}
	return reg, err
}

// namesFor is OpenNames; with the lock held it also creates the registry, for operations
// that add to it. A registry of a later version stays untouched: then the member gets no
// name.
func namesFor(o *target.Opened, l *state.Locked) (*Names, error) {
	if l == nil {
		return OpenNames(o), nil
	}
	n := newNames(o.Pins)
	if n.err != nil {
		return nil, n.err
	}
	var err error
	n.reg, err = l.Registry()
	return n, err
}

func newNames(pins *state.Pins) *Names {
	n := &Names{pins: pins, moving: true}
	if pins != nil {
		var moves []string
		moves, n.err = pins.Moves()
		n.moving = n.err != nil || len(moves) > 0
	}
	return n
}

// Close closes the registry.
func (n *Names) Close() { n.reg.Close() }

// resolve returns the program that a stand-in runs. It returns any other program
// unchanged; also a stand-in with an empty slot, and a program that this process is
// not permitted to open. The error is kernel.ErrAgain when the program is gone: it was
// a stand-in, and the move has ended.
func (n *Names) resolve(prog uint32) (uint32, error) {
	p, err := OpenProgram(prog)
	if errors.Is(err, hook.ErrPermission) || errors.Is(err, hook.ErrIncompatible) {
		return prog, nil
	}
	if err != nil {
		return prog, err
	}
	defer p.Close()
	return kernel.ProgramID(p), nil
}

// entry returns the entry for a program on a hook with the attach type, and its link. The
// error is kernel.ErrAgain when the program is gone meanwhile.
func (n *Names) entry(h hook.Hook, attach ebpf.AttachType, prog, link uint32) (e entry, err error) {
	e = entry{Entry: target.Entry{Program: prog, Link: link}, carried: prog}
	if link == 0 {
		if n.moving {
			e.Program, err = n.resolve(prog)
		}
		return e, err
	}
	if e.rec, err = n.record(attach, link); err != nil {
		return e, err
	}
	member, pinned, err := n.pin(h, link)
	if err != nil {
		return e, err
	}
	e.pinned, e.Stays = pinned, pinned
	// A move of the member may have begun after the pins were read.
	if n.moving || e.rec != nil || pinned {
		if e.Program, err = n.resolve(prog); err != nil {
			return e, err
		}
	}
	switch {
	case e.rec != nil:
		e.Name, e.Priority = e.rec.Name, e.rec.Priority
	case pinned:
		e.Name = member
	}
	return e, nil
}

// record returns the registry's record of a link with the attach type; nil if there is
// none.
func (n *Names) record(attach ebpf.AttachType, link uint32) (*state.Record, error) {
	if n.err != nil {
		return nil, n.err
	}
	rec, err := n.reg.Get(link)
	if rec != nil && rec.Attach != attach {
		rec = nil
	}
	return rec, err
}

// pin returns the member name under which a link is pinned; ok says whether it is.
func (n *Names) pin(h hook.Hook, link uint32) (member string, ok bool, err error) {
	if n.pins == nil {
		return "", false, nil
	}
	if n.pinned == nil {
		if n.pinned, err = pinnedLinks(n.pins); err != nil {
			return "", false, err
		}
	}
	member, ok = n.pinned[state.LinkFolder(h, link)]
	return member, ok && n.pins.Has(state.LinkFolder(h, link), member), nil
}

// IsMember reports whether a link is a member: it is in the registry, or pinned as one.
func (n *Names) IsMember(info *kernel.LinkInfo) (bool, error) {
	rec, err := n.record(info.Attach, info.ID)
	if rec != nil || err != nil {
		return rec != nil, err
	}
	_, pinned, err := n.pin(info.Hook(), info.ID)
	return pinned, err
}

// Forget removes a link's record from the registry.
func (n *Names) Forget(id uint32) error { return n.reg.Delete(id) }

// pinnedLinks returns the member that is pinned in each folder.
func pinnedLinks(pins *state.Pins) (map[string]string, error) {
	folders, err := pins.Links()
	if err != nil {
		return nil, err
	}
	pinned := map[string]string{}
	for _, folder := range folders {
		members, err := pins.Members(folder)
		if err != nil {
			return nil, err
		}
		for _, member := range members {
			pinned[folder] = member
		}
	}
	return pinned, nil
}
