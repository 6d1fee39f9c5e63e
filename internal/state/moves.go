package state

import (
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/internal/kernel"
)

const movePrefix = "move_"

// PinMove pins the slot of a move's stand-ins, so that they keep running the program
// if this process is killed. old is the link that is moved, or 0. PinMove returns the
// name of the pin.
func (l *Locked) PinMove(slot *ebpf.Map, old uint32) (string, error) {
	name := fmt.Sprintf("%s%d_%d_%d", movePrefix, old, os.Getpid(), time.Now().UnixNano())
	return name, pinClone(slot, l.Path(name))
}

// ParseMove returns the link in the name of a pin that PinMove made.
func ParseMove(name string) (old uint32) {
	_, _ = fmt.Sscanf(name, movePrefix+"%d_", &old)
	return old
}

// RemoveMove removes a pin that PinMove made.
func (l *Locked) RemoveMove(name string) { _ = os.Remove(l.Path(name)) }

// Moves returns the names of the pins that PinMove made. Each is a move that is not
// finished.
func (p *Pins) Moves() ([]string, error) {
	entries, err := entriesOf(p.dir, movePrefix)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, err
}

// Succeed pins a member's new link, in the folder to, and moves the pins of the
// member's maps there from the folder of the old link.
func (l *Locked) Succeed(from, to, member string, link Pinner) error {
	move, err := l.mapsOf(from, member) // first, for it may fail
	if err == nil {
		err = l.Add(to, nil, MemberPins{Name: member, Link: link})
	}
	if err != nil {
		return err
	}
	return move(to, member)
}

// MoveMaps moves the pins of maps from the folder of one member, from and was, to the
// folder of another, to and name. The first folder need not exist.
func (l *Locked) MoveMaps(from, was, to, name string) error {
	move, err := l.mapsOf(from, was)
	if err != nil {
		return err
	}
	return move(to, name)
}

// mapsOf finds the pins of a member's maps. What it returns moves them.
func (l *Locked) mapsOf(folder, member string) (move func(to, name string) error, err error) {
	dir := l.Path(folder, memberPrefix+escape(member))
	entries, err := entriesOf(dir, mapPrefix)
	return func(to, name string) error {
		for _, e := range entries {
			if err := os.Rename(filepath.Join(dir, e.Name()), l.Path(to, memberPrefix+escape(name), e.Name())); err != nil {
				return kernel.Errno("move pins", err)
			}
		}
		return nil
	}, err
}
