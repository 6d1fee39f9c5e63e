package kernel

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/internal/procfs"
)

func openDir(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.Open(path)
	qt.Assert(t, qt.IsNil(err))
	return f
}

// soon waits until so, for a bounded time.
func soon(t *testing.T, so func() bool) {
	t.Helper()
	for range 1000 {
		if so() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatal("it did not come to that")
}

// waiters is how many wait for the lock, as the kernel sees it.
func waiters(t *testing.T, dir string) int {
	t.Helper()
	l, err := procfs.LockOf(dir)
	qt.Assert(t, qt.IsNil(err))
	return len(l.Waiting)
}

// Who comes first has the lock first, and nobody passes another by.
func TestLockInTurn(t *testing.T) {
	if !Since(5, 13) {
		t.Skip("before Linux 5.13 /proc/locks shows only the first of those who wait")
	}
	const many = 8
	dir := t.TempDir()
	first, locked, err := Lock(t.Context(), openDir(t, dir), nil)
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.IsTrue(locked))
	turns := make(chan int, many)
	for i := range many {
		folder := openDir(t, dir)
		go func() {
			got, locked, err := Lock(t.Context(), folder, nil)
			if err != nil || !locked {
				i = -1
			}
			turns <- i
			got.Close()
		}()
		soon(t, func() bool { return waiters(t, dir) == i+1 })
	}
	first.Close()
	for i := range many {
		qt.Check(t, qt.Equals(<-turns, i))
	}
	soon(t, func() bool { queuesMu.Lock(); defer queuesMu.Unlock(); return len(queues) == 0 })
}

// Who gives up says who has the lock. What waits on in the kernel has the turn of the next who comes.
func TestLockGivenUp(t *testing.T) {
	dir := t.TempDir()
	held := openDir(t, dir)
	qt.Assert(t, qt.IsNil(unix.Flock(int(held.Fd()), unix.LOCK_EX)))
	for range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		folder, locked, err := Lock(ctx, openDir(t, dir), nil)
		cancel()
		qt.Check(t, qt.ErrorIs(err, context.DeadlineExceeded))
		qt.Check(t, qt.IsTrue(folder == nil && !locked))
		qt.Check(t, qt.IsTrue(strings.Contains(fmt.Sprint(err), fmt.Sprintf(" (pid %d ", os.Getpid()))), qt.Commentf("%v", err))
		soon(t, func() bool { return waiters(t, dir) == 1 })
	}
	time.AfterFunc(10*time.Millisecond, func() { held.Close() })
	got, locked, err := Lock(t.Context(), openDir(t, dir), nil)
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.IsTrue(locked))
	got.Close()
	soon(t, func() bool { queuesMu.Lock(); defer queuesMu.Unlock(); return len(queues) == 0 })
}
