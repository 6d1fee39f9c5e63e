package libxdp

import (
	"context"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// locked is the folder of libxdp while this process has its lock.
type locked struct {
	folder
	file *os.File // nil if not alone
	// alone is false when the lock could not be taken in time. Then nothing is
	// removed as a leftover. The kernel, not the lock, guarantees that the
	// right dispatcher is replaced.
	alone bool
}

// lock makes the folder if needed and takes its lock as libxdp does. libxdp
// waits without a limit, but it keeps the lock only while it reads, makes or
// removes pins, so a process that keeps the lock longer than kernel.LockWait has
// been stopped.
//
// libxdp releases the lock between pinning and attaching. This package keeps it
// until the new dispatcher is on the device, so that nothing removes the pins in
// between.
func (f folder) lock(ctx context.Context) (*locked, error) {
	file, err := kernel.OpenFolder(f.path)
	if err != nil {
		return nil, err
	}
	file, alone, err := kernel.Lock(ctx, file, nil)
	if err != nil {
		return nil, err
	}
	return &locked{f, file, alone}, nil
}

// moment is enough for a waiting process to take the lock.
const moment = 2 * time.Millisecond

// giveWay lets waiting processes have the lock for a moment, and takes it
// again. libxdp first reads what is on the device, and then waits for the lock
// to read the pins. A process that read the device before it changed now finds
// the pins of the old dispatcher, and learns from the kernel that the device
// changed. Without these pins it would mistake the chain for something else.
func (l *locked) giveWay() {
	if !l.alone {
		return
	}
	_ = unix.Flock(int(l.file.Fd()), unix.LOCK_UN)
	time.Sleep(moment)
	// The device has changed, so the work must be finished with or without the
	// lock.
	l.file, l.alone, _ = kernel.Lock(context.Background(), l.file, nil)
}

func (l *locked) unlock() { l.file.Close() }
