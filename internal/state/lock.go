package state

import (
	"context"
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// Locked is the folder while this process has its lock. Pins are made and removed only
// then.
type Locked struct {
	*Pins
	file *os.File // nil if not Alone
	// Alone is false if another process did not release the lock in time. Then pins
	// are made and removed as usual, but nothing is removed as a leftover.
	Alone bool
	// spare is a descriptor that is given up while pins are removed: that needs one,
	// and what is undone may have failed for want of descriptors. nil if there is none.
	spare *os.File
}

// Lock makes the folder if there is none, and takes its lock. It waits for at most
// kernel.LockWait. Meanwhile others know what ask returns, if it is not nil; when one of them
// has granted that, Lock returns nil. The caller unlocks it.
func (p *Pins) Lock(ctx context.Context, ask func() *Ask) (*Locked, error) {
	f, err := kernel.OpenFolder(p.dir)
	if err != nil {
		return nil, err
	}
	withdraw := func() {}
	f, alone, err := kernel.Lock(ctx, f, func() (granted <-chan struct{}) {
		if ask == nil {
			return nil
		}
		if a := ask(); a != nil {
			granted, withdraw = p.ask(a)
		}
		return granted
	})
	withdraw()
	if errors.Is(err, kernel.ErrNotNeeded) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	l := &Locked{Pins: p, file: f, Alone: alone}
	if l.spare, err = os.Open(p.dir); err != nil {
		f.Close()
		return nil, kernel.Errno("open "+p.dir, err)
	}
	return l, nil
}

// undisturbed bounds how long a reader waits for those who change something.
const undisturbed = time.Second

// Undisturbed runs fn while nobody changes what is there, as far as they keep to the lock.
// It waits for a second at most; without a bpffs, where nobody has a lock, for a moment.
func (p *Pins) Undisturbed(fn func()) {
	if p == nil {
		time.Sleep(hold)
	} else if f, err := os.OpenFile(p.dir, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0); err == nil {
		ctx, cancel := context.WithTimeout(context.Background(), undisturbed)
		defer cancel()
		if locked, _, err := kernel.Lock(ctx, f, nil); err == nil {
			defer locked.Close()
		}
	}
	fn()
}

// Unlock releases the lock, and wakes who waits for changes.
func (l *Locked) Unlock() {
	l.sign()
	l.spare.Close()
	l.file.Close()
}
