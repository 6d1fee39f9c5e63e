package flood

import (
	"io/fs"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// The other end of a wire is deleted, and this one with it, while its chain is in use.
func TestDeviceGoesUnderFlood(t *testing.T) {
	s := scene.New(t)
	link := s.Attach(t, testenv.DropUDPPort(t, "ldt_drop", scene.Port), dispatcher.Options{})
	flood := s.Flood(t, scene.Port)
	scene.Soon(t, func() bool { return flood.Sent() > 1000 })
	s.Client.IP(t, "link", "delete", s.ClientDev)
	qt.Check(t, qt.ErrorIs(link.Set(t.Context(), scene.Priority(1)), dispatcher.ErrDefunct))
	_, err := dispatcher.Read(t.Context(), s.Target, s.Look())
	qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
	qt.Check(t, qt.IsNil(link.Close()))
	_, received := flood.Stop()
	qt.Check(t, qt.Equals(received, 0))
}

// A firewall with rules that are replaced every second must never be open, not for one packet.
func TestUpdatesUnderFlood(t *testing.T) {
	scene.EachMode(t, func(t *testing.T, s *scene.Scene, mode hook.Mode) {
		link := s.Attach(t, testenv.DropUDPPort(t, "ldt_drop_0", scene.Port), dispatcher.Options{Mode: mode})
		programs := []dispatcher.Source{
			dispatcher.Program(testenv.DropUDPPort(t, "ldt_drop_1", scene.Port)), dispatcher.Program(testenv.DropUDPPort(t, "ldt_drop_2", scene.Port)),
		}
		flood := s.Flood(t, scene.Port, scene.Port+1)
		for i := range scene.Changes(t, scene.Rounds) {
			qt.Assert(t, qt.IsNil(link.Update(t.Context(), programs[i%2])))
		}
		scene.WantClosed(t, flood)
	})
}

// Nor when the chain around it changes: another member moves from before it to behind it and back and changes where it
// goes on, and a third one comes and goes.
func TestChangesUnderFlood(t *testing.T) {
	const floods = 2 // in each mode; a flood has its bounds
	scene.EachMode(t, func(t *testing.T, s *scene.Scene, mode hook.Mode) {
		s.Attach(t, testenv.DropUDPPort(t, "ldt_drop", scene.Port), dispatcher.Options{Priority: 50, Mode: mode})
		mover := s.Attach(t, testenv.VerdictProgram(t, "ldt_mover", testenv.XDPPass), dispatcher.Options{})
		guest := testenv.VerdictProgram(t, "ldt_guest", testenv.XDPPass)
		for range floods {
			flood := s.Flood(t, scene.Port, scene.Port+1)
			for i := range scene.Changes(t, scene.Rounds/len(scene.Modes)/floods) {
				settings := hook.Settings{Priority: 10 + 80*(i%2), ContinueOn: hook.VerdictSet(4 + i%4)} // with pass, always
				qt.Assert(t, qt.IsNil(mover.Set(t.Context(), settings)))
				if i%10 != 0 {
					continue
				}
				visit := i / 10
				link := s.Attach(t, guest, dispatcher.Options{Priority: 40 + 20*(visit%2), Persistent: visit%3 == 0})
				if visit%4 < 2 || visit%3 == 0 {
					qt.Assert(t, qt.IsNil(link.Detach(t.Context())))
				}
				qt.Assert(t, qt.IsNil(link.Close())) // or it leaves like this
			}
			scene.WantClosed(t, flood)
		}
	})
}

// Nor while the chain is sealed and unsealed around it.
func TestSealUnderFlood(t *testing.T) {
	scene.EachMode(t, func(t *testing.T, s *scene.Scene, mode hook.Mode) {
		o := scene.Persistent("before", 40)
		o.Mode = mode
		s.Attach(t, scene.Coded(t, testenv.VerdictSpec("ldt_before", testenv.XDPPass)), o)
		s.Attach(t, scene.Coded(t, testenv.DropUDPPortSpec("ldt_drop", scene.Port)), scene.Persistent("drop", 50))
		s.Attach(t, scene.Coded(t, testenv.VerdictSpec("ldt_after", testenv.XDPPass)), scene.Persistent("after", 60))
		flood := s.Flood(t, scene.Port, scene.Port+1)
		for range scene.Changes(t, scene.Rounds/2/len(scene.Modes)) {
			s.Seal(t, "before drop after")
			s.Unseal(t)
		}
		scene.WantClosed(t, flood)
		s.Clear(t)
	})
}

// Nor when it is replaced while it is sealed, by what can be sealed and by what cannot, and others come and go.
func TestSealedUpdatesUnderFlood(t *testing.T) {
	scene.EachMode(t, func(t *testing.T, s *scene.Scene, mode hook.Mode) {
		o := scene.Persistent("drop", 50)
		o.Mode = mode
		link := s.Attach(t, scene.Coded(t, testenv.DropUDPPortSpec("ldt_drop_0", scene.Port)), o)
		s.Attach(t, scene.Coded(t, testenv.VerdictSpec("ldt_before", testenv.XDPPass)), scene.Persistent("before", 40))
		programs := []*ebpf.Program{
			scene.Coded(t, testenv.DropUDPPortSpec("ldt_drop_1", scene.Port)), scene.Coded(t, testenv.DropUDPPortSpec("ldt_drop_2", scene.Port)),
			testenv.DropUDPPort(t, "ldt_drop_3", scene.Port),
		}
		guest := testenv.VerdictProgram(t, "ldt_guest", testenv.XDPPass)
		s.Seal(t, "before drop")
		flood := s.Flood(t, scene.Port, scene.Port+1)
		for i := range scene.Changes(t, scene.Rounds/2/len(scene.Modes)) {
			qt.Assert(t, qt.IsNil(link.Update(t.Context(), dispatcher.Program(programs[i%3]))))
			if i%3 == 2 {
				qt.Assert(t, qt.IsNil(link.Update(t.Context(), dispatcher.Program(programs[0]))))
				s.Seal(t, "before drop")
			}
			if i%10 == 0 {
				visit := s.Attach(t, guest, dispatcher.Options{Priority: 45})
				qt.Assert(t, qt.IsNil(visit.Close()))
			}
		}
		scene.WantClosed(t, flood)
		s.Clear(t)
	})
}

// The control: to detach and attach again is what everybody did before, and these tests see what gets through.
func TestReattachUnderFlood(t *testing.T) {
	s := scene.New(t)
	drop := testenv.DropUDPPort(t, "ldt_drop", scene.Port)
	link := s.Attach(t, drop, dispatcher.Options{})
	flood := s.Flood(t, scene.Port)
	for start := time.Now(); flood.Received() == 0; {
		if time.Since(start) > 20*time.Second {
			t.Fatal("nothing gets through")
		}
		qt.Assert(t, qt.IsNil(link.Detach(t.Context())))
		qt.Assert(t, qt.IsNil(link.Close()))
		link = s.Attach(t, drop, dispatcher.Options{})
	}
	sent, received := flood.Stop()
	t.Logf("%d of %d packets got through", received, sent)
}
