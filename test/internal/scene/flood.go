package scene

import (
	"iter"
	"testing"
	"time"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// Rounds is how often a thing is changed under a flood.
const Rounds = 1000

// Changes are so many rounds, fewer where one takes long: on an emulated machine.
func Changes(t *testing.T, n int) iter.Seq[int] {
	t.Helper()
	const enough, fewest = 15 * time.Second, 40
	return func(yield func(int) bool) {
		done, start := 0, time.Now()
		for ; done < n && (done < fewest || time.Since(start) < enough); done++ {
			if !yield(done) {
				return
			}
		}
		t.Logf("%d changes in %v", done, time.Since(start).Round(time.Millisecond))
	}
}

// WantClosed checks that a flood which a member drops at all times was dropped at all times, and that it was one: the marker
// arrived.
func WantClosed(t *testing.T, flood *testenv.Flood) {
	t.Helper()
	sent, received := flood.Stop()
	_, marker := flood.Marker()
	t.Logf("%d packets sent, %d of the marker arrived", sent, marker)
	qt.Check(t, qt.Equals(received, 0))
	qt.Check(t, qt.IsTrue(sent > 10_000 && marker > 100))
}

const (
	RecorderBits = 19 // datagrams to each port that are told from each other
	MarkerPort   = Port + 2
)
