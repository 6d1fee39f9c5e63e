package kernel

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// LockWait bounds the wait for a lock. The lock only saves retries, and a process
// that is stopped while it has the lock must not stop all others.
const LockWait = 5 * time.Second

// Lock takes the lock of an open folder (flock). The lock ends when the folder is
// closed. Lock waits for at most LockWait and returns false if others still had the
// lock then.
func Lock(ctx context.Context, folder *os.File) (bool, error) {
	deadline := time.Now().Add(LockWait)
	for wait := time.Millisecond; ; wait = min(2*wait, 5*time.Millisecond) {
		err := unix.Flock(int(folder.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return true, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return false, Errno("lock "+folder.Name(), err)
		}
		if time.Now().After(deadline) {
			return false, nil
		}
		select {
		case <-ctx.Done():
			return false, fmt.Errorf("waiting for the lock of %s: %w", folder.Name(), ctx.Err())
		case <-time.After(wait):
		}
	}
}
