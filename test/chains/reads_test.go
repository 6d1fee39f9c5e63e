package chains

import (
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// An attach reads the device once, and once more for each race that it loses.
func TestAttachReadsOnce(t *testing.T) {
	s := scene.New(t)
	reads := 0
	lose := func() {}
	kernel.OnStep = func(step string) {
		switch step {
		case "attach: reads":
			reads++
		case "swap: before":
			race := lose
			lose = func() {}
			race()
		}
	}
	defer func() { kernel.OnStep = nil }()
	attach := func(number, want int) {
		t.Helper()
		reads = 0
		s.Attach(t, s.Tracer(t, number, testenv.XDPPass), dispatcher.Options{})
		qt.Check(t, qt.Equals(reads, want))
	}
	attach(1, 1) // a free device
	attach(2, 1)
	// Another bpffs has another lock: what follows is not held up by the first one's.
	other := testenv.BPFFS(t)
	var winner *dispatcher.Link
	lose = func() {
		var err error
		winner, err = dispatcher.Attach(t.Context(), s.Target, dispatcher.Program(s.Tracer(t, 4, testenv.XDPPass)), dispatcher.Options{BPFFS: other})
		qt.Assert(t, qt.IsNil(err))
	}
	attach(3, 3) // one of its own, one of the attach that won, one more
	s.WantRun(t, 1, 2, 4, 3)
	qt.Assert(t, qt.IsNil(winner.Detach(t.Context())))
	qt.Assert(t, qt.IsNil(winner.Close()))
}
