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

// ErrAgain: another process was faster; read again and try again.
var ErrAgain = errors.New("changed meanwhile")

const (
	maxTries = 200
	maxWait  = 32 * time.Millisecond // between two tries
)

// Again marks the error of a lost race with ErrAgain: the object that was read is
// gone, or something else has taken its place.
func Again(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.EAGAIN) {
		return fmt.Errorf("%w: %w", ErrAgain, err)
	}
	return err
}

// Retry runs fn again while it returns ErrAgain. It waits between two tries, on
// average longer each time. The time is random, so that competitors do not retry in
// lockstep. It does not try again what an inner Retry has given up.
func Retry(ctx context.Context, fn func() error) error {
	wait := time.Millisecond
	for tries := 1; ; tries++ {
		err := ctx.Err()
		if err == nil {
			err = fn()
		}
		if !errors.Is(err, ErrAgain) || errors.Is(err, hook.ErrChanged) {
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
