package libxdp

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf/link"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// infoOfLinks tells whether links report their target (Linux 5.13).
func infoOfLinks(t *testing.T, c *Chain) bool {
	t.Helper()
	l, err := link.LoadPinnedLink(filepath.Join(c.Folder, linkPin(0)), nil)
	qt.Assert(t, qt.IsNil(err))
	defer l.Close()
	info, err := l.Info()
	qt.Assert(t, qt.IsNil(err))
	return info.Tracing().TargetObjectId != 0
}

// Members without pins are found by their links.
func TestHalfThePins(t *testing.T) {
	testenv.NeedFreplace(t)
	s := newScene(t)
	s.join(t, 1, at(1))
	s.join(t, 2, at(2))
	c := s.join(t, 3, at(3))
	byLink := infoOfLinks(t, c)

	// Without the program's pin its link still runs it.
	qt.Assert(t, qt.IsNil(os.Remove(filepath.Join(c.Folder, progPin(0)))))
	s.wantTrace(t, 1, 2, 3)
	qt.Assert(t, qt.DeepEquals(s.read(t).Members, c.Members))

	// Without the link's pin the link is gone. The next change links the program
	// again.
	qt.Assert(t, qt.IsNil(os.Remove(filepath.Join(c.Folder, linkPin(1)))))
	s.waitForTrace(t, 1, 3)
	got := s.read(t)
	qt.Assert(t, qt.IsTrue(got.Members[1].Missing))
	qt.Assert(t, qt.Equals(got.Members[1].Program.ID, c.Members[1].Program.ID))
	s.join(t, 4, at(4))
	s.wantRun(t, 1, 2, 3, 4)

	// Both are gone.
	c = s.read(t)
	qt.Assert(t, qt.IsNil(os.Remove(filepath.Join(c.Folder, progPin(3)))))
	held, err := link.LoadPinnedLink(filepath.Join(c.Folder, linkPin(3)), nil)
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.IsNil(os.Remove(filepath.Join(c.Folder, linkPin(3)))))
	s.wantTrace(t, 1, 2, 3, 4)
	qt.Assert(t, qt.Equals(s.read(t).Members[3].Missing, !byLink))
	held.Close()
	s.waitForTrace(t, 1, 2, 3)
	got = s.read(t)
	qt.Assert(t, qt.IsTrue(got.Members[3].Missing))
	qt.Assert(t, qt.Equals(got.Members[3].Name, ""))
	qt.Assert(t, qt.Equals(got.Members[3].Priority, 4))
	qt.Assert(t, qt.IsNil(s.Set(t.Context(), "ldt_trace_3", hook.Settings{Priority: 1})))
	s.wantRun(t, 1, 3, 2)
	qt.Assert(t, qt.IsNil(s.DetachAll(t.Context())))
	s.wantRun(t)
}

// waitForTrace waits until the kernel has released a link.
func (s *scene) waitForTrace(t *testing.T, numbers ...int) {
	t.Helper()
	for range 100 {
		s.trace.Reset(t)
		s.Send(t, port, 1)
		if len(s.trace.Last(t)) == len(numbers) {
			break
		}
	}
	s.wantTrace(t, numbers...)
}

// A chain with its pins in another bpffs can be read, but only detached as a
// whole.
func TestPinsElsewhere(t *testing.T) {
	testenv.NeedFreplace(t)
	s := newScene(t)
	c := s.join(t, 1, at(1))
	byLink := infoOfLinks(t, c)
	other := *s
	other.BPFFS = testenv.BPFFS(t)
	seen := other.read(t)
	qt.Assert(t, qt.Equals(seen.Folder, ""))
	if !byLink {
		t.Log("links of this kernel do not say what they are attached to")
		qt.Assert(t, qt.IsTrue(seen.Members[0].Missing))
	} else {
		qt.Assert(t, qt.DeepEquals(seen.Members, c.Members))
		_, _, err := other.Attach(t.Context(), s.source(t, 2), AttachOptions{})
		qt.Assert(t, qt.ErrorIs(err, hook.ErrBusy))
		qt.Assert(t, qt.ErrorMatches(err, `attach xdp veth1: the chain runs, but its pins are not in .*`))
		qt.Assert(t, qt.ErrorIs(other.Set(t.Context(), "ldt_trace_1", hook.Settings{Priority: 4}), hook.ErrBusy))
		s.wantRun(t, 1)
	}
	qt.Assert(t, qt.IsNil(other.DetachAll(t.Context())))
	s.wantTrace(t)

	// The pins that stay there are found to belong to no device.
	removed, err := s.Clean(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.DeepEquals(removed, []string{c.Folder}))
	s.wantPins(t)
}

// Two devices with the same index in two namespaces share a bpffs. Neither
// removes the other's pins, and Clean does not either.
func TestSameIndex(t *testing.T) {
	testenv.NeedFreplace(t)
	const index = 4711
	a := newScene(t)
	p := testenv.NewPairOpts(t, testenv.PairOptions{ServerIfindex: index})
	q := testenv.NewPairOpts(t, testenv.PairOptions{ServerIfindex: index})
	b := &scene{p, Device{p.ServerDev, p.Server.Name, a.BPFFS}, testenv.NewTrace(t, port)}
	c := &scene{q, Device{q.ServerDev, q.Server.Name, a.BPFFS}, testenv.NewTrace(t, port)}
	b.join(t, 1, at(1))
	c.join(t, 2, at(1))
	b.join(t, 3, at(3))
	c.join(t, 4, at(4))
	b.wantTrace(t, 1, 3)
	c.wantTrace(t, 2, 4)
	qt.Assert(t, qt.HasLen(a.pinned(t), 2*5))
	for _, d := range []Device{b.Device, c.Device, {NetNS: a.NetNS, BPFFS: a.BPFFS}} {
		removed, err := d.Clean(t.Context())
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.HasLen(removed, 0))
	}
	qt.Assert(t, qt.IsNil(b.Detach(t.Context(), "ldt_trace_1")))
	b.wantTrace(t, 3)
	c.wantTrace(t, 2, 4)
	qt.Assert(t, qt.IsNil(b.DetachAll(t.Context())))
	c.wantRun(t, 2, 4)
	qt.Assert(t, qt.IsNil(c.DetachAll(t.Context())))
	a.wantPins(t)
}

// Only the pins of a removed device are left.
func TestDeviceGone(t *testing.T) {
	testenv.NeedFreplace(t)
	s := newScene(t)
	c := s.join(t, 1, at(1))
	gone := Device{NetNS: s.Client.Name, BPFFS: s.BPFFS}
	removed, err := gone.Clean(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.HasLen(removed, 0))
	s.Server.IP(t, "link", "del", s.ServerDev)
	removed = nil
	for try := 0; len(removed) == 0 && try < 100; try++ { // the kernel frees the device some time later
		removed, err = gone.Clean(t.Context())
		qt.Assert(t, qt.IsNil(err))
	}
	qt.Assert(t, qt.DeepEquals(removed, []string{c.Folder}))
	qt.Assert(t, qt.HasLen(s.pinned(t), 0))
}

// A dispatcher that a process has open may be about to be attached.
func TestCleanLeavesWhatIsOpen(t *testing.T) {
	testenv.NeedFreplace(t)
	s := newScene(t)
	b, err := s.Build(t.Context(), []Source{s.source(t, 1), s.source(t, 2)}, 2)
	qt.Assert(t, qt.IsNil(err))
	b.locked.unlock() // as libxdp does
	removed, err := s.Clean(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.HasLen(removed, 0))
	// A dispatcher that is not open is removed.
	b.parts.close()
	b.join.close()
	removed, err = s.Clean(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.DeepEquals(removed, []string{b.Chain.Folder}))
	qt.Assert(t, qt.HasLen(s.pinned(t), 0))
}
