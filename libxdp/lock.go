package libxdp

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// lockWait bounds the wait for the lock. libxdp waits for ever; but it has the
// lock only while it reads, makes or removes pins, so whoever has it for this
// long has been stopped.
const lockWait = 5 * time.Second

// locked is the folder of libxdp while this process has its lock.
type locked struct {
	folder
	file *os.File
	// alone is false when the lock could not be had in time: then nothing that
	// looks left over is touched. That the right dispatcher is replaced is not
	// the lock's business, but the kernel's.
	alone bool
}

// lock makes the folder if need be and takes its lock as libxdp does.
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
	l := &locked{folder: f, file: file}
	if err := l.wait(ctx); err != nil {
		file.Close()
		return nil, err
	}
	return l, nil
}

// wait waits for the lock for at most lockWait.
func (l *locked) wait(ctx context.Context) error {
	deadline := time.Now().Add(lockWait)
	for wait := time.Millisecond; ; wait = min(2*wait, 5*time.Millisecond) {
		err := unix.Flock(int(l.file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		l.alone = err == nil
		if l.alone {
			return nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return kernel.Errno("lock "+l.path, err)
		}
		if time.Now().After(deadline) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for the lock of %s: %w", l.path, ctx.Err())
		case <-time.After(wait):
		}
	}
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
	_ = l.wait(context.Background())
}

func (l *locked) unlock() { l.file.Close() }
