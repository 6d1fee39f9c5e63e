package attach

import (
	"errors"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/state"
)

// names tells whose the links are: from the registry, and where that has
// nothing to say from the pins. Both may be missing; then links are foreign.
type names struct {
	reg    *state.Registry
	pins   *state.Pins
	pinned map[string]string // folder to member, once it is needed
	// moving: stand-ins may be attached. Where there is a bpffs, a pin says so.
	moving bool
}

// names opens what there is of them.
func (s *site) names() *names {
	n := newNames(s.pins)
	if s.pins != nil {
		n.reg, _ = s.pins.OpenRegistry()
	}
	return n
}

// namesToWrite is names for an operation that adds to the registry, under the
// lock. A registry of a later version is left alone: the member has no name then.
func (s *site) namesToWrite(l *state.Locked) (*names, error) {
	if l == nil {
		return s.names(), nil
	}
	n := newNames(s.pins)
	var err error
	if n.reg, err = l.Registry(); err != nil && !unsupported(err) {
		return nil, err
	}
	return n, nil
}

func newNames(pins *state.Pins) *names {
	return &names{pins: pins, moving: pins == nil || len(pins.Moves()) > 0}
}

func (n *names) close() { n.reg.Close() }

// resolve returns the program that a stand-in runs, and any other as it is.
// kernel.ErrAgain when it is gone: a stand-in whose time is over.
func (n *names) resolve(prog uint32) (uint32, error) {
	p, err := real(prog)
	if errors.Is(err, kernel.ErrAgain) {
		return prog, err
	}
	if err != nil {
		return prog, nil
	}
	defer p.Close()
	return programID(p), nil
}

// entry tells whose a program on the spot is. kernel.ErrAgain when it has gone since.
func (n *names) entry(sp *spot, prog, link uint32) (e entry, err error) {
	e = entry{prog: prog, carried: prog, link: link}
	if link == 0 {
		if n.moving {
			e.prog, err = n.resolve(prog)
		}
		return e, err
	}
	e.rec = n.record(sp.kind.Attach, link)
	member, pinned := n.pin(sp.hook, link)
	e.pinned = pinned
	// A member of ours may be about to be moved since the pins were looked at.
	if n.moving || e.rec != nil || pinned {
		if e.prog, err = n.resolve(prog); err != nil {
			return e, err
		}
	}
	switch {
	case e.rec != nil:
		e.name = e.rec.Name
	case pinned:
		e.name = member
	}
	return e, nil
}

// record is what the registry has of a link with that attach type.
func (n *names) record(attach attachType, link uint32) *state.Record {
	if rec := n.reg.Get(link); rec != nil && rec.Attach == attach {
		return rec
	}
	return nil
}

// pin returns the name under which a link is pinned.
func (n *names) pin(h hook.Hook, link uint32) (member string, ok bool) {
	if n.pins == nil {
		return "", false
	}
	if n.pinned == nil {
		n.pinned = map[string]string{}
		for _, folder := range n.pins.Links() {
			for _, member := range n.pins.Members(folder) {
				n.pinned[folder] = member
			}
		}
	}
	member, ok = n.pinned[state.LinkFolder(h, link)]
	return member, ok && n.pins.Has(state.LinkFolder(h, link), member)
}
