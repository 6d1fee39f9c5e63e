package state

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/internal/kernel"
)

const movePrefix = "move_"

// PinMove pins the slot that stand-ins run a program from, so that they go on
// doing that when this process is killed. old is the link that is moved, or 0.
// It returns the name of the pin.
func (l *Locked) PinMove(slot *ebpf.Map, old uint32) (string, error) {
	name := fmt.Sprintf("%s%d_%d_%d", movePrefix, old, os.Getpid(), time.Now().UnixNano())
	return name, pinClone(slot, l.Path(name))
}

// ParseMove returns the link in the name of such a pin.
func ParseMove(name string) (old uint32) {
	_, _ = fmt.Sscanf(name, movePrefix+"%d_", &old)
	return old
}

// RemoveMove removes such a pin.
func (l *Locked) RemoveMove(name string) { _ = os.Remove(l.Path(name)) }

// Moves returns the names of those pins: moves that were not finished.
func (p *Pins) Moves() ([]string, error) {
	entries, err := entriesOf(p.dir, movePrefix)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, err
}

// Succeed pins the link that takes the place of a member's pinned one, and
// gives it the pins of the member's maps.
func (l *Locked) Succeed(from, to, member string, link Pinner) error {
	if err := l.Add(to, nil, MemberPins{Name: member, Link: link}); err != nil {
		return err
	}
	return l.MoveMaps(from, member, to, member)
}

// MoveMaps gives the folder of a member, to and name, the pins of the maps in
// that of another, which may have no such folder any more.
func (l *Locked) MoveMaps(from, was, to, name string) error {
	dir := l.Path(from, memberPrefix+escape(was))
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		if err == nil && strings.HasPrefix(e.Name(), mapPrefix) {
			err = os.Rename(filepath.Join(dir, e.Name()), l.Path(to, memberPrefix+escape(name), e.Name()))
		}
	}
	return kernel.Errno("move pins", err)
}
