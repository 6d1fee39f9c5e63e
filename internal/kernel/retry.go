package kernel

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"time"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
)

// ErrAgain: somebody else was quicker; read again and try again.
var ErrAgain = errors.New("changed meanwhile")

const (
	maxTries = 200
	maxWait  = 32 * time.Millisecond // between two tries
)

// Again marks an error of a race that was lost: the object that was read has
// gone, or something else is there by now.
func Again(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.EAGAIN) {
		return fmt.Errorf("%w: %w", ErrAgain, err)
	}
	return err
}

// Retry runs fn until it succeeds or fails for good, and waits a little more
// each time, by chance, so that those who compete do not do it in step.
func Retry(ctx context.Context, fn func() error) error {
	wait := time.Millisecond
	for tries := 1; ; tries++ {
		err := ctx.Err()
		if err == nil {
			err = fn()
		}
		if !errors.Is(err, ErrAgain) {
			return err
		}
		if tries == maxTries {
			return hook.Because(hook.ErrChanged, "gave up after %d tries: %w", tries, err)
		}
		select {
		case <-ctx.Done():
			return hook.Because(hook.ErrChanged, "gave up after %d tries: %w: %w", tries, ctx.Err(), err)
		case <-time.After(rand.N(wait)):
		}
		wait = min(2*wait, maxWait)
	}
}
