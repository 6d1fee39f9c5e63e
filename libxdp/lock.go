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
// new dispatcher is on the device and the pins of the old one are gone, so that
// nobody cleans up in between.
func (f folder) lock(ctx context.Context) (*locked, error) {
	if err := os.Mkdir(f.path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, kernel.Errno("make the folder of libxdp", err)
	}
	file, err := os.Open(f.path)
	if err != nil {
		return nil, kernel.Errno("lock", err)
	}
	deadline := time.Now().Add(lockWait)
	for wait := time.Millisecond; ; wait = min(2*wait, 5*time.Millisecond) {
		err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return &locked{f, file, true}, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			file.Close()
			return nil, kernel.Errno("lock "+f.path, err)
		}
		if time.Now().After(deadline) {
			return &locked{f, file, false}, nil
		}
		select {
		case <-ctx.Done():
			file.Close()
			return nil, fmt.Errorf("waiting for the lock of %s: %w", f.path, ctx.Err())
		case <-time.After(wait):
		}
	}
}

func (l *locked) unlock() { l.file.Close() }
