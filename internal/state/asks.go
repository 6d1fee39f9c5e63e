package state

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

const askPrefix = "ask_"

// An Ask is what a process that waits for the lock wants of a chain: that its member joins,
// or leaves. Who has the lock grants the asks of all that wait with one dispatcher, since
// loading a dispatcher takes most of the time of a change. An ask is worth as much as its
// slot: who dies while it waits leaves a slot that is empty, or gone.
type Ask struct {
	Chain    uint64
	Leave    bool
	Member   dispatch.Slot // to leave: MapID only
	Shape    dispatch.Shape
	Position hook.Position
	Priority int // that was asked for; 0: none
}

func (a *Ask) name() string { return fmt.Sprintf("%s%016x_%010d", askPrefix, a.Chain, a.Member.MapID) }

// ask makes the ask known, as the text of a symbolic link, and returns what withdraws it. The
// channel is closed when it has been granted; nil for a member that is pinned, which takes
// the lock. An ask that cannot be made known costs time, nothing else.
func (p *Pins) ask(a *Ask) (granted <-chan struct{}, withdraw func()) {
	text, err := json.Marshal(a)
	path := p.Path(a.name())
	if err != nil || os.Symlink(string(text), path) != nil {
		return nil, func() {}
	}
	kernel.Step("ask: made")
	remove := func() { _ = os.Remove(path) }
	if a.Member.Persistent {
		return nil, remove
	}
	gone, err := watchFor(path, unix.IN_DELETE_SELF)
	if err != nil {
		return nil, remove
	}
	done := make(chan struct{})
	go func() {
		_, _ = gone.Read(make([]byte, 4096))
		close(done)
	}()
	return done, func() {
		remove()
		gone.Close()
	}
}

// Granted removes the ask, which wakes who waits for it.
func (l *Locked) Granted(a *Ask) { _ = os.Remove(l.Path(a.name())) }

// Asks returns what is asked of a chain, by the age of the slots. l may be nil.
func (l *Locked) Asks(chain uint64) []*Ask {
	if l == nil {
		return nil
	}
	entries, _ := entriesOf(l.dir, fmt.Sprintf("%s%016x_", askPrefix, chain))
	var asks []*Ask
	for _, e := range entries {
		text, err := os.Readlink(l.Path(e.Name()))
		a := &Ask{}
		if err == nil && json.Unmarshal([]byte(text), a) == nil && a.name() == e.Name() {
			asks = append(asks, a)
		}
	}
	return asks
}

// stale tells whether the file is an ask that nobody waits for any more.
func stale(e fs.DirEntry) bool {
	if !strings.HasPrefix(e.Name(), askPrefix) {
		return false
	}
	i, err := e.Info()
	if err != nil {
		return false // it is gone
	}
	var chain uint64
	var slot uint32
	_, err = fmt.Sscanf(e.Name(), askPrefix+"%16x_%d", &chain, &slot)
	return err != nil || !kernel.MapMayExist(slot) || time.Since(i.ModTime()) >= 2*kernel.LockWait
}
