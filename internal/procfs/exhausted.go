package procfs

import (
	"errors"

	"golang.org/x/sys/unix"
)

// Exhausted tells whether an error is about this process or machine, which can
// open no more, and not about what was to be opened.
func Exhausted(err error) bool {
	return errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.Is(err, unix.ENOMEM)
}
