package chains

import (
	"testing"

	"github.com/cilium/ebpf/link"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// As long as a device above has a program, the kernel changes none of the device below (Linux 5.15). That is said at
// once, with the name of the device above, and members that netlink carries can still be taken out.
func TestDeviceAbove(t *testing.T) {
	s := scene.New(t)
	s.Server.AddDevice(t, "br0", "type", "bridge")
	above := s.OnDevice(dispatcher.XDP("br0").In(s.Server.Name))
	s.Server.IP(t, "link", "set", s.ServerDev, "master", "br0")
	drop := testenv.VerdictProgram(t, "ldt_drop", testenv.XDPDrop)
	pass := testenv.VerdictProgram(t, "ldt_pass", testenv.XDPPass)

	on := above.Attach(t, pass, dispatcher.Options{})
	s.Server.Do(t, func() {
		l, err := link.AttachXDP(link.XDPOptions{Program: pass, Interface: s.ServerIfindex})
		if err == nil {
			l.Close()
			t.Skip("this kernel changes programs below others")
		}
	})
	const why = "br0 is above veth1 and has an XDP program, and until it is off, the kernel changes no program below; take the program off br0, .*"
	s.WantRefused(t, dispatcher.Program(drop), dispatcher.Options{}, hook.ErrBusy, why)
	qt.Assert(t, qt.IsNil(on.Close()))

	// Netlink carries the chain below, and the device above gets its program after that.
	s.AttachLegacy(t, drop)
	s.Adopt(t, dispatcher.AdoptOptions{NoGap: true, Name: "below"})
	s.Attach(t, pass, dispatcher.Options{Name: "door", OnMissing: hook.MissingDrop})
	s.ClearAtEnd(t)
	on = above.Attach(t, pass, dispatcher.Options{})
	s.WantRefused(t, dispatcher.Program(pass), dispatcher.Options{}, hook.ErrBusy, "exchange the dispatcher: "+why)
	err := dispatcher.Detach(t.Context(), s.Target, "door", s.Leave())
	qt.Check(t, qt.ErrorMatches(err, ".*"+why)) // its empty slot would drop everything
	qt.Check(t, qt.Equals(s.Read(t).Member("below").State, hook.StateRunning))
	qt.Assert(t, qt.IsNil(dispatcher.Detach(t.Context(), s.Target, "below", s.Leave())))
	qt.Check(t, qt.Equals(s.Read(t).Member("below").State, hook.StateEmpty))

	// Without the program above, the next change leaves the member out.
	qt.Assert(t, qt.IsNil(on.Close()))
	s.Detach(t, "door")
	qt.Check(t, qt.HasLen(s.Read(t).Members, 0))
}
