package links

import (
	"errors"
	"io/fs"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// names tells whose the links are: from the registry, and where that has
// nothing to say from the pins. Both may be missing; then links are foreign.
type Names struct {
	reg    *state.Registry
	err    error // why the registry or the pins could not be read
	pins   *state.Pins
	pinned map[string]string // folder to member, once it is needed
	// moving: stand-ins may be attached. Where there is a bpffs, a pin says so.
	moving bool
}

// openNames opens what there is of them. What cannot be read is an error once
// somebody asks for a link.
func OpenNames(o *target.Opened) *Names {
	n := newNames(o.Pins)
	if o.Pins != nil && n.err == nil {
		n.reg, n.err = openRegistry(o.Pins)
	}
	return n
}

// openRegistry opens the registry; nil, as if it were empty, where there is none
// or one of another version, which is left alone.
func openRegistry(p *state.Pins) (*state.Registry, error) {
	reg, err := p.OpenRegistry()
	if errors.Is(err, fs.ErrNotExist) || Unsupported(err) {
		return nil, nil
	}
	return reg, err
}

// namesFor is openNames, and with the lock what an operation needs that adds to the
// registry. A registry of a later version is left alone: the member has no name then.
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

func (n *Names) Close() { n.reg.Close() }

// resolve returns the program that a stand-in runs, and any other as it is: one
// that cannot be opened for want of privileges, and a stand-in with nothing behind
// it, too. kernel.ErrAgain when it is gone: a stand-in whose time is over.
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

// entry tells whose a program on the spot is. kernel.ErrAgain when it has gone since.
func (n *Names) entry(op *opened, prog, link uint32) (e entry, err error) {
	e = entry{Entry: target.Entry{Program: prog, Link: link}, carried: prog}
	if link == 0 {
		if n.moving {
			e.Program, err = n.resolve(prog)
		}
		return e, err
	}
	if e.rec, err = n.record(op.kind.Attach, link); err != nil {
		return e, err
	}
	member, pinned, err := n.pin(op.Hook, link)
	if err != nil {
		return e, err
	}
	e.pinned, e.Stays = pinned, pinned
	// A member of ours may be about to be moved since the pins were looked at.
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

// record is what the registry has of a link with that attach type.
func (n *Names) record(attach attachType, link uint32) (*state.Record, error) {
	if n.err != nil {
		return nil, n.err
	}
	rec, err := n.reg.Get(link)
	if rec != nil && rec.Attach != attach {
		rec = nil
	}
	return rec, err
}

// pin returns the name under which a link is pinned.
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

// pinnedLinks returns the member of each folder.
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
