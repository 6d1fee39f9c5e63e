package declared

import (
	"net/netip"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/declare"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// probed returns an attachment that is confirmed by a connection over the device, and one with a program that
// cuts the connection off.
func (s *stage) probed(t *testing.T) (good, bad declare.Attachment) {
	t.Helper()
	at := s.Client.Listen(t, netip.AddrPortFrom(testenv.ClientIPv4, 0))
	good = s.filter("a")
	probes := []declare.Probe{{TCP: at.String()}, {Exec: []string{"true"}}}
	good.Confirm = &declare.Confirm{Within: "1m", Probes: probes}
	bad = good
	bad.Confirm = &declare.Confirm{Within: "300ms", Probes: probes}
	bad.Program = declare.Program{Pin: s.Pinned(t, testenv.VerdictProgram(t, "ldt_cut", testenv.XDPDrop))}
	return good, bad
}

// What is confirmed is pinned; what cuts the probe off leaves at once, and a new program that does is put back.
func TestConfirm(t *testing.T) {
	s := newStage(t)
	good, bad := s.probed(t)
	failed := func(o order, because string) {
		t.Helper()
		report, err := o.run(t.Context())
		qt.Assert(t, qt.IsNil(err))
		qt.Check(t, qt.ErrorMatches(report.Results[0].Err, `apply xdp veth1: "a" of test.yaml: `+because+` did not pass within 300ms, and all is as before: .*`))
		qt.Check(t, qt.IsFalse(report.Results[0].Done))
		qt.Check(t, qt.HasLen(report.Sealed, 0))
	}
	failed(s.order(bad), `tcp .*`)
	s.WantChain(t, "")
	s.apply(t, s.order(good), "attach a")
	s.WantChain(t, "a*")
	s.again(t, s.order(good))

	failed(s.order(bad), `tcp .*`)
	qt.Check(t, qt.IsTrue(s.drops(t, 7000)))
	s.apply(t, s.order(good), "keep a") // and sealed: the other one could not be
	s.again(t, s.order(good))
	other := s.filter("a", "7001")
	other.Confirm = &declare.Confirm{Within: "300ms", Probes: []declare.Probe{{Exec: []string{"sh", "-c", "echo first; echo no; exit 3"}}}}
	failed(s.order(other), `exec sh -c .*`)
	qt.Check(t, qt.IsTrue(s.drops(t, 7000)))
	s.again(t, s.order(good))
	other.Confirm = good.Confirm
	s.apply(t, s.order(other), "change a program")
	qt.Check(t, qt.IsTrue(s.drops(t, 7001)))
	s.Clear(t)
}

// A process that dies before its new attachment is confirmed takes it along.
func TestKilledUnconfirmed(t *testing.T) {
	s := newStage(t)
	good, bad := s.probed(t)
	for _, test := range []struct {
		a    declare.Attachment
		step string
	}{{bad, "apply: held"}, {good, "apply: held"}, {good, "apply: confirmed"}} {
		o := s.order(test.a)
		o.DieAt = test.step
		p := s.start(t, o)
		p.Send("")
		qt.Assert(t, qt.ErrorMatches(p.Wait(), "(?s).*signal: killed.*"))
		scene.Soon(t, func() bool { return s.Passed(t, 7000, 1) == 1 })
		scene.Soon(t, func() bool { return len(s.Read(t).Members) == 0 })
	}

	// While one holds it, another leaves it alone.
	slow := good
	slow.Confirm = &declare.Confirm{Within: "1m", Probes: []declare.Probe{{Exec: []string{"false"}}}}
	p := s.start(t, s.order(slow))
	p.Send("")
	scene.Soon(t, func() bool { return len(s.Read(t).Members) == 1 })
	s.apply(t, s.order(slow), `blocked a: apply xdp veth1: "a" of test.yaml: a process holds the member, which is not pinned: it is to be confirmed first; "dispatcher holders" says which process`)
	p.Kill()
	scene.Soon(t, func() bool { return len(s.Read(t).Members) == 0 })
	s.apply(t, s.order(good), "attach a")
	s.Clear(t)
}
