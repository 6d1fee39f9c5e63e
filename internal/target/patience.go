package target

import (
	"errors"
	"fmt"
	"time"

	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// errTaken: the name is taken by a member that may be leaving. The kernel empties
// a slot some 10 ms after its owner is gone (see state.Slots), and a program that
// is started anew at once shall not be refused for that.
var ErrTaken = errors.New("the name is taken")

// leaveWait is how long to wait for a member to leave: on a busy machine, with others who
// look at the slot meanwhile and so keep it, 250 ms were seen not to do; on an emulated one, a second.
const leaveWait = 3 * time.Second

// untilLeft returns what marks errTaken as an error to try again after, for
// leaveWait from now.
func UntilLeft() func(error) error {
	deadline := time.Now().Add(leaveWait)
	return func(err error) error {
		if errors.Is(err, ErrTaken) && time.Now().Before(deadline) {
			return fmt.Errorf("%w: %w", kernel.ErrAgain, err)
		}
		return err
	}
}
