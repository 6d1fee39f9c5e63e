package kernel

import (
	"fmt"
	"slices"

	"github.com/libdispatcher/dispatcher/hook"
)

// OnError, when set, is called with every error that a function for users
// returns. Tests set it to look at the errors; nothing else does.
var OnError func(error)

// Wrap is [hook.Wrap] for the functions that users call.
func Wrap(op string, h hook.Hook, target string, err error) error {
	err = hook.Wrap(op, h, target, err)
	if err != nil && OnError != nil {
		OnError(err)
	}
	return err
}

// Join is errors.Join with the text in one line.
func Join(errs ...error) error {
	all := slices.DeleteFunc(slices.Clone(errs), func(err error) bool { return err == nil })
	switch len(all) {
	case 0:
		return nil
	case 1:
		return all[0]
	}
	return fmt.Errorf("%w, and %w", all[0], Join(all[1:]...))
}

// Undo returns err, together with the errors of undoing the work that was done
// before err.
func Undo(err error, undo ...error) error {
	if failed := Join(undo...); failed != nil {
		return fmt.Errorf("%w, and undoing that failed: %w", err, failed)
	}
	return err
}
