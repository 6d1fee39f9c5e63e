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

// Flow waits until some more packets of each flood have been sent. A machine that is busy may not let a flood begin before the
// test has ended otherwise.
func Flow(t testing.TB, floods ...*testenv.Flood) {
	t.Helper()
	for _, f := range floods {
		sent := f.Sent()
		Soon(t, func() bool { return f.Sent() > sent+500 })
	}
}

// WantClosed checks that a flood which a member drops at all times was dropped at all times, and that it was one: the marker
// arrived. On a busy machine it waits until that is so.
func WantClosed(t *testing.T, flood *testenv.Flood) {
	t.Helper()
	Soon(t, func() bool {
		_, marker := flood.Marker()
		return flood.Sent() > 10_000 && marker > 100
	})
	sent, received := flood.Stop()
	_, marker := flood.Marker()
	t.Logf("%d packets sent, %d of the marker arrived", sent, marker)
	qt.Check(t, qt.Equals(received, 0))
}

const (
	RecorderBits = 19 // datagrams to each port that are told from each other
	MarkerPort   = Port + 2
)
