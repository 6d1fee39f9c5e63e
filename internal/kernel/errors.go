package kernel

import (
	"fmt"
	"slices"
)

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
