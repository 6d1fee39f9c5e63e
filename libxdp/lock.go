package libxdp

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// locked is the folder of libxdp while this process has its lock.
type locked struct {
	folder
	file *os.File
	// alone is false when the lock could not be had in time: then nothing that
	// looks left over is touched. That the right dispatcher is replaced is not
	// the lock's business, but the kernel's.
	alone bool
}

// lock makes the folder if need be and takes its lock as libxdp does. That waits
// for ever; but it has the lock only while it reads, makes or removes pins, so
// whoever has it for longer than kernel.LockWait has been stopped.
//
// libxdp lets go of it between pinning and attaching; here it is held until the
// new dispatcher is on the device, so that nobody cleans up in between.
func (f folder) lock(ctx context.Context) (*locked, error) {
	if err := os.Mkdir(f.path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, kernel.Errno("make the folder of libxdp", err)
	}
	file, err := os.Open(f.path)
	if err != nil {
		return nil, kernel.Errno("lock", err)
	}
	alone, err := kernel.Lock(ctx, file)
	if err != nil {
		file.Close()
		return nil, err
	}
	return &locked{f, file, alone}, nil
}

// moment is enough for a process that waits for the lock to take it.
const moment = 2 * time.Millisecond

// giveWay lets those have the lock who wait for it, and takes it again. libxdp
// first asks what is on the device, and then waits for the lock to read the
// pins. Who asked before the device changed finds those of the old dispatcher
// now, and learns of the change from the kernel; without them it would take the
// chain for something else.
func (l *locked) giveWay() {
	if !l.alone {
		return
	}
	_ = unix.Flock(int(l.file.Fd()), unix.LOCK_UN)
	time.Sleep(moment)
	// The device has changed: there is no way back, with the lock or without.
	l.alone, _ = kernel.Lock(context.Background(), l.file)
}

func (l *locked) unlock() { l.file.Close() }
