package state

import (
	"context"
	"testing"
	"time"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// A change wakes who waits at once, and so does the end of its context. A reader does not.
func TestChanges(t *testing.T) {
	testenv.CheckLeaks(t)
	pins, err := OpenPins(testenv.BPFFS(t))
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.IsNil(pins.Changes())) // there is no folder yet
	change := func() {
		l, err := pins.Lock(t.Context(), nil)
		qt.Assert(t, qt.IsNil(err))
		l.Unlock()
	}
	change()
	signs := pins.Changes()
	defer signs.Close()
	qt.Assert(t, qt.IsNotNil(signs))
	woken := make(chan error, 1)
	wait := func(ctx context.Context, atMost time.Duration) { woken <- signs.Wait(ctx, atMost) }

	go wait(t.Context(), time.Hour)
	change()
	qt.Check(t, qt.IsNil(<-woken))

	ctx, cancel := context.WithCancel(t.Context())
	go wait(ctx, time.Hour)
	_, err = pins.Chains()
	qt.Assert(t, qt.IsNil(err))
	cancel()
	qt.Check(t, qt.ErrorIs(<-woken, context.Canceled))

	var none *Changes
	none.Close()
	qt.Check(t, qt.IsNil(none.Wait(t.Context(), time.Millisecond)))
	qt.Check(t, qt.ErrorIs(none.Wait(ctx, time.Hour), context.Canceled))
}
