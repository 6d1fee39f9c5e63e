package observe

import (
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// All that is on the devices of a namespace, in one list: chains, programs of others, and nothing of other namespaces.
func TestList(t *testing.T) {
	s := scene.New(t)
	b := s.Twin(t)
	b.Attach(t, b.Tracer(t, 9, testenv.XDPPass), dispatcher.Options{})
	for _, dev := range []string{"a0", "b0", "c0", "d0"} {
		s.Server.IP(t, "link", "add", dev, "type", "veth", "peer", "name", dev+"p")
	}
	on := func(dev string) *scene.Scene { return s.OnDevice(dispatcher.XDP(dev).In(s.Server.Name)) }
	s.Attach(t, s.Tracer(t, 1, testenv.XDPPass), dispatcher.Options{Persistent: true})
	on("a0").Attach(t, s.Tracer(t, 2, testenv.XDPPass), dispatcher.Options{Mode: hook.ModeGeneric})
	on("a0").Attach(t, s.Tracer(t, 3, testenv.XDPPass), dispatcher.Options{})
	legacy := s.Pinned(t, testenv.VerdictProgram(t, "ldt_legacy", testenv.XDPPass))
	s.Server.IP(t, "link", "set", "dev", "b0", "xdp", "pinned", legacy)
	s.Server.Do(t, func() {
		scene.Hold(t, testenv.VerdictProgram(t, "ldt_foreign", testenv.XDPPass), scene.IfindexOf(t, "c0"))
	})

	list, err := dispatcher.List(t.Context(), dispatcher.ListOptions{NetNS: s.Server.Name, BPFFS: s.BPFFS})
	qt.Assert(t, qt.IsNil(err))
	var got []string
	for _, c := range list {
		got = append(got, c.Target+": "+scene.Summary(&c))
		one, err := dispatcher.Read(t.Context(), dispatcher.XDP(c.Target).In(s.Server.Name), s.Look())
		qt.Assert(t, qt.IsNil(err))
		qt.Check(t, qt.DeepEquals(one, &c))
	}
	qt.Check(t, qt.ContentEquals(got, []string{
		"veth1: ldt_trace_1*", "a0: ldt_trace_2 ldt_trace_3", "b0: ldt_legacy(legacy)", "c0: ldt_foreign(foreign)",
	}))

	empty, err := dispatcher.List(t.Context(), dispatcher.ListOptions{NetNS: testenv.NewNetNS(t).Name, BPFFS: s.BPFFS})
	qt.Check(t, qt.IsNil(err))
	qt.Check(t, qt.HasLen(empty, 0))
	s.Clear(t)
}
