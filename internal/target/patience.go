package target

import (
	"errors"
	"fmt"
	"time"

	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// ErrTaken says that a member has the name, or the last room in the chain, but may be
// leaving. The kernel empties a slot some 10 ms after its owner is gone (see state.Slots).
// A program that is restarted at once must not be refused for that.
var ErrTaken = errors.New("taken by a member that may be leaving")

// leaveWait is how long to wait for a member to leave. Other processes that read
// the slot meanwhile keep it a while longer: on a busy machine 250 ms were not
// enough, on an emulated machine a second was not.
const leaveWait = 3 * time.Second

// UntilLeft returns a function that marks ErrTaken with kernel.ErrAgain, for
// leaveWait from now. After that it returns the error as it is.
func UntilLeft() func(error) error {
	deadline := time.Now().Add(leaveWait)
	return func(err error) error {
		if errors.Is(err, ErrTaken) && time.Now().Before(deadline) {
			return fmt.Errorf("%w: %w", kernel.ErrAgain, err)
		}
		return err
	}
}
