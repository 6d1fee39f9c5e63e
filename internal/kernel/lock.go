package kernel

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/internal/procfs"
)

// LockWait bounds the wait for a lock. The lock only saves retries, and a process
// that is stopped while it has the lock must not stop all others.
const LockWait = 5 * time.Second

// ErrNotNeeded: what the lock was wanted for is done.
var ErrNotNeeded = errors.New("the lock is not needed any more")

// Lock takes the lock of an open folder (flock), in turn: it waits in the kernel, which
// gives the lock to the processes in the order in which they came. It returns the file that
// has the lock, folder or another of the same folder in its place; the lock ends when that
// is closed. Lock waits for at most LockWait and returns false if others still had the lock
// then. On an error it has closed folder. If it has to wait it calls waits first, unless that
// is nil, and waits no longer than until the channel is closed that waits returns: then the
// error is ErrNotNeeded.
func Lock(ctx context.Context, folder *os.File, waits func() <-chan struct{}) (_ *os.File, locked bool, err error) {
	err = unix.Flock(int(folder.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	switch {
	case err == nil:
		return folder, true, nil
	case !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR):
		err = Errno("lock "+folder.Name(), err)
		folder.Close()
		return nil, false, err
	}
	path := folder.Name()
	turn, err := queueFor(folder)
	if err != nil {
		folder.Close()
		return nil, false, err
	}
	var enough <-chan struct{}
	if waits != nil {
		enough = waits()
	}
	late := time.NewTimer(LockWait)
	defer late.Stop()
	select {
	case got := <-turn.got:
		return got.file, got.err == nil, got.err
	case <-late.C:
	case <-ctx.Done():
	case <-enough:
		err = ErrNotNeeded
	}
	if got, ok := turn.leave(); ok { // it came at the last moment
		return got.file, got.err == nil, got.err
	}
	if ctx.Err() != nil {
		return nil, false, fmt.Errorf("waiting for the lock of %s%s: %w", path, LockedBy(path), ctx.Err())
	}
	return nil, false, err
}

// A queue has those of this process who wait for the lock of one folder. Nothing can end a
// flock that waits in the kernel, so the waiting is left to a goroutine with a file of its
// own. If nobody wants the lock any more, that goroutine goes on waiting, and the next who
// comes has its place: so a process has never more of them than it has had calls at once.
type queue struct {
	turns   []*turn
	waiting int // goroutines
}

type turn struct {
	id  fileID
	got chan lockResult
}

type lockResult struct {
	file *os.File
	err  error
}

type fileID struct{ dev, ino uint64 }

var (
	queuesMu sync.Mutex
	queues   = map[fileID]*queue{}
)

// queueFor takes a place in the queue for the folder's lock. It takes over the folder.
func queueFor(folder *os.File) (*turn, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(folder.Fd()), &st); err != nil {
		return nil, Errno("lock "+folder.Name(), err)
	}
	t := &turn{fileID{st.Dev, st.Ino}, make(chan lockResult, 1)}
	queuesMu.Lock()
	defer queuesMu.Unlock()
	q := queues[t.id]
	if q == nil {
		q = &queue{}
		queues[t.id] = q
	}
	q.turns = append(q.turns, t)
	if q.waiting >= len(q.turns) {
		folder.Close()
		return t, nil
	}
	q.waiting++
	go q.wait(t.id, folder)
	return t, nil
}

// wait waits for the lock, and gives it to the first in the queue.
func (q *queue) wait(id fileID, folder *os.File) {
	err := unix.EINTR
	for err == unix.EINTR {
		err, _ = unix.Flock(int(folder.Fd()), unix.LOCK_EX).(unix.Errno)
	}
	got := lockResult{file: folder}
	if err != 0 {
		got = lockResult{err: Errno("lock "+folder.Name(), err)}
	}
	queuesMu.Lock()
	defer queuesMu.Unlock()
	if q.waiting--; q.waiting == 0 {
		delete(queues, id)
	}
	if len(q.turns) == 0 || got.err != nil {
		folder.Close()
	}
	if len(q.turns) > 0 {
		q.turns[0].got <- got
		q.turns = q.turns[1:]
	}
}

// leave gives the place up, unless the turn has come.
func (t *turn) leave() (lockResult, bool) {
	queuesMu.Lock()
	defer queuesMu.Unlock()
	if q := queues[t.id]; q != nil {
		if i := slices.Index(q.turns, t); i >= 0 {
			q.turns = slices.Delete(q.turns, i, i+1)
			return lockResult{}, false
		}
	}
	return <-t.got, true
}

// LockedBy says in words which process has the lock of a folder: " (pid 812 app has it)";
// empty if none has it, or it cannot be seen from here.
func LockedBy(folder string) string {
	l, err := procfs.LockOf(folder)
	if err != nil || l.Holder == 0 {
		return ""
	}
	return fmt.Sprintf(" (pid %d %s has it)", l.Holder, procfs.Command(l.Holder))
}

// LockWaits tells whether this process waits for the lock of a folder.
func LockWaits(folder string) bool {
	l, err := procfs.LockOf(folder)
	return err == nil && slices.Contains(l.Waiting, os.Getpid())
}
