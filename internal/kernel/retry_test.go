package kernel_test

import (
	"context"
	"fmt"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// Retry ends with the context, and says so.
func TestRetry(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	tries := 0
	err := kernel.Retry(ctx, func() error {
		if tries++; tries == 3 {
			cancel()
		}
		return fmt.Errorf("%w: once more", kernel.ErrAgain)
	})
	qt.Assert(t, qt.ErrorIs(err, context.Canceled))
	qt.Assert(t, qt.ErrorIs(err, hook.ErrChanged))
	qt.Assert(t, qt.Equals(tries, 3))

	tries = 0
	err = kernel.Retry(t.Context(), func() error { tries++; return kernel.ErrAgain })
	qt.Assert(t, qt.ErrorIs(err, hook.ErrChanged))
	qt.Assert(t, qt.Equals(tries, 200))

	tries = 0
	err = kernel.Retry(t.Context(), func() error {
		return kernel.Retry(t.Context(), func() error { tries++; return kernel.ErrAgain })
	})
	qt.Assert(t, qt.ErrorIs(err, hook.ErrChanged))
	qt.Assert(t, qt.Equals(tries, 200))
}
