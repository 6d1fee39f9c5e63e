package main

import (
	"context"
	"path/filepath"
	"time"

	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// lockNote is after how long the user is told who has a lock.
const lockNote = time.Second

// noteLock says once which process has the lock that this command waits for.
func (a *app) noteLock(ctx context.Context) {
	tick := time.NewTicker(lockNote)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		for _, folder := range []string{"libdispatcher", "xdp"} { // ours, and libxdp's
			if path := filepath.Join(a.bpffs, folder); kernel.LockWaits(path) {
				a.note("waiting for the lock of %s%s, for at most %v", path, kernel.LockedBy(path), kernel.LockWait)
				return
			}
		}
	}
}
