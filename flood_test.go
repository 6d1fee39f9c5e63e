package dispatcher_test

import (
	"iter"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// rounds is how often a thing is changed under a flood.
const rounds = 1000

// changes are so many rounds, fewer where one takes long: on an emulated machine.
func changes(t *testing.T, n int) iter.Seq[int] {
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

// wantClosed checks that a flood which a member drops at all times was dropped at all times, and that it was one: the marker
// arrived.
func wantClosed(t *testing.T, flood *testenv.Flood) {
	t.Helper()
	sent, received := flood.Stop()
	_, marker := flood.Marker()
	t.Logf("%d packets sent, %d of the marker arrived", sent, marker)
	qt.Check(t, qt.Equals(received, 0))
	qt.Check(t, qt.IsTrue(sent > 10_000 && marker > 100))
}

// A firewall whose rules are replaced every second must never be open, not for one packet.
func TestUpdatesUnderFlood(t *testing.T) {
	eachMode(t, func(t *testing.T, s *scene, mode hook.Mode) {
		link := s.attach(t, testenv.DropUDPPort(t, "ldt_drop_0", port), dispatcher.Options{Mode: mode})
		programs := []dispatcher.Source{
			dispatcher.Program(testenv.DropUDPPort(t, "ldt_drop_1", port)), dispatcher.Program(testenv.DropUDPPort(t, "ldt_drop_2", port)),
		}
		flood := s.Flood(t, port, port+1)
		for i := range changes(t, rounds) {
			qt.Assert(t, qt.IsNil(link.Update(t.Context(), programs[i%2])))
		}
		wantClosed(t, flood)
	})
}

// Nor when the chain around it changes: another member moves from before it to behind it and back and changes where it
// goes on, and a third one comes and goes.
func TestChangesUnderFlood(t *testing.T) {
	const floods = 2 // in each mode; a flood has its bounds
	eachMode(t, func(t *testing.T, s *scene, mode hook.Mode) {
		s.attach(t, testenv.DropUDPPort(t, "ldt_drop", port), dispatcher.Options{Settings: priority(50), Mode: mode})
		mover := s.attach(t, testenv.VerdictProgram(t, "ldt_mover", testenv.XDPPass), dispatcher.Options{})
		guest := testenv.VerdictProgram(t, "ldt_guest", testenv.XDPPass)
		for range floods {
			flood := s.Flood(t, port, port+1)
			for i := range changes(t, rounds/len(modes)/floods) {
				settings := hook.Settings{Priority: 10 + 80*(i%2), ContinueOn: hook.VerdictSet(4 + i%4)} // with pass, always
				qt.Assert(t, qt.IsNil(mover.Set(t.Context(), settings)))
				if i%10 != 0 {
					continue
				}
				visit := i / 10
				link := s.attach(t, guest, dispatcher.Options{Settings: priority(40 + 20*(visit%2)), Persistent: visit%3 == 0})
				if visit%4 < 2 || visit%3 == 0 {
					qt.Assert(t, qt.IsNil(link.Detach(t.Context())))
				}
				qt.Assert(t, qt.IsNil(link.Close())) // or it leaves like this
			}
			wantClosed(t, flood)
		}
	})
}

// Nor while the chain is sealed and unsealed around it.
func TestSealUnderFlood(t *testing.T) {
	eachMode(t, func(t *testing.T, s *scene, mode hook.Mode) {
		o := persistent("before", 40)
		o.Mode = mode
		s.attach(t, coded(t, testenv.VerdictSpec("ldt_before", testenv.XDPPass)), o)
		s.attach(t, coded(t, testenv.DropUDPPortSpec("ldt_drop", port)), persistent("drop", 50))
		s.attach(t, coded(t, testenv.VerdictSpec("ldt_after", testenv.XDPPass)), persistent("after", 60))
		flood := s.Flood(t, port, port+1)
		for range changes(t, rounds/2/len(modes)) {
			s.seal(t, "before drop after")
			s.unseal(t)
		}
		wantClosed(t, flood)
		s.clear(t)
	})
}

// Nor when it is replaced while it is sealed, by what can be sealed and by what cannot, and others come and go.
func TestSealedUpdatesUnderFlood(t *testing.T) {
	eachMode(t, func(t *testing.T, s *scene, mode hook.Mode) {
		o := persistent("drop", 50)
		o.Mode = mode
		link := s.attach(t, coded(t, testenv.DropUDPPortSpec("ldt_drop_0", port)), o)
		s.attach(t, coded(t, testenv.VerdictSpec("ldt_before", testenv.XDPPass)), persistent("before", 40))
		programs := []*ebpf.Program{
			coded(t, testenv.DropUDPPortSpec("ldt_drop_1", port)), coded(t, testenv.DropUDPPortSpec("ldt_drop_2", port)),
			testenv.DropUDPPort(t, "ldt_drop_3", port),
		}
		guest := testenv.VerdictProgram(t, "ldt_guest", testenv.XDPPass)
		s.seal(t, "before drop")
		flood := s.Flood(t, port, port+1)
		for i := range changes(t, rounds/2/len(modes)) {
			qt.Assert(t, qt.IsNil(link.Update(t.Context(), dispatcher.Program(programs[i%3]))))
			if i%3 == 2 {
				qt.Assert(t, qt.IsNil(link.Update(t.Context(), dispatcher.Program(programs[0]))))
				s.seal(t, "before drop")
			}
			if i%10 == 0 {
				visit := s.attach(t, guest, dispatcher.Options{Settings: priority(45)})
				qt.Assert(t, qt.IsNil(visit.Close()))
			}
		}
		wantClosed(t, flood)
		s.clear(t)
	})
}

// The control: to detach and attach again is what everybody did before, and these tests see what gets through.
func TestReattachUnderFlood(t *testing.T) {
	s := newScene(t)
	drop := testenv.DropUDPPort(t, "ldt_drop", port)
	link := s.attach(t, drop, dispatcher.Options{})
	flood := s.Flood(t, port)
	for start := time.Now(); flood.Received() == 0; {
		if time.Since(start) > 20*time.Second {
			t.Fatal("nothing gets through")
		}
		qt.Assert(t, qt.IsNil(link.Detach(t.Context())))
		qt.Assert(t, qt.IsNil(link.Close()))
		link = s.attach(t, drop, dispatcher.Options{})
	}
	sent, received := flood.Stop()
	t.Logf("%d of %d packets got through", received, sent)
}
