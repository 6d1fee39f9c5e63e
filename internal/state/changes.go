package state

import (
	"context"
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Changes wakes who waits for a change of what is pinned, or only locked: each change ends
// with a sign on the folder (see Locked.Unlock). nil is without signs.
type Changes struct{ file *os.File }

// Changes listens to the signs. It returns nil where there are none: without a bpffs or a
// folder, or when the kernel gives no inotify instance.
func (p *Pins) Changes() *Changes {
	if p == nil {
		return nil
	}
	file, err := watchFor(p.dir, unix.IN_ATTRIB|unix.IN_ONLYDIR)
	if err != nil {
		return nil
	}
	return &Changes{file}
}

// watchFor returns a file that can be read when one of the events has come about path.
func watchFor(path string, events uint32) (*os.File, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, err
	}
	if _, err := unix.InotifyAddWatch(fd, path, events|unix.IN_DONT_FOLLOW); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), "inotify"), nil
}

// Wait waits for the next sign, at most for as long as that. The only error is that of ctx.
func (c *Changes) Wait(ctx context.Context, atMost time.Duration) error {
	if c != nil {
		_ = c.file.SetReadDeadline(time.Now().Add(atMost))
		stop := context.AfterFunc(ctx, func() { _ = c.file.SetReadDeadline(time.Unix(1, 0)) })
		defer stop()
		buf := make([]byte, 4096) // of many signs one is enough
		if _, err := c.file.Read(buf); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			return ctx.Err()
		}
	}
	select {
	case <-ctx.Done():
	case <-time.After(atMost):
	}
	return ctx.Err()
}

// Close stops listening.
func (c *Changes) Close() {
	if c != nil {
		c.file.Close()
	}
}

// sign tells those who wait that something may have changed: the mode stays as it is, and
// inotify reports IN_ATTRIB (notify_change, fs/attr.c).
func (l *Locked) sign() {
	_ = l.spare.Chmod(0o700)
}
