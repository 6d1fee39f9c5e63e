package scene

import (
	"encoding/binary"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
)

// Adopt makes a legacy program a member, which leaves with the test at the latest.
func (s *Scene) Adopt(t testing.TB, o dispatcher.AdoptOptions) *dispatcher.Link {
	t.Helper()
	o.BPFFS = s.BPFFS
	link, err := dispatcher.Adopt(t.Context(), s.Target, o)
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { link.Close() })
	return link
}

// ClearAtEnd takes what is on the device off at the end of the test: nothing else ends a chain without a link.
func (s *Scene) ClearAtEnd(t testing.TB) {
	t.Cleanup(func() { s.Free(t) })
}

// Join is [Scene.Attach] for any source.
func (s *Scene) Join(t testing.TB, from dispatcher.Source, o dispatcher.Options) *dispatcher.Link {
	t.Helper()
	link, err := s.TryJoin(t, from, o)
	qt.Assert(t, qt.IsNil(err))
	return link
}

// TryJoin is [Scene.Join] for what may fail.
func (s *Scene) TryJoin(t testing.TB, from dispatcher.Source, o dispatcher.Options) (*dispatcher.Link, error) {
	t.Helper()
	if o.BPFFS == "" {
		o.BPFFS = s.BPFFS
	}
	link, err := dispatcher.Attach(t.Context(), s.Target, from, o)
	if err == nil {
		t.Cleanup(func() { link.Close() })
	}
	return link, err
}

// WantRefused tries to attach what must be refused, and checks that nothing has changed by it.
func (s *Scene) WantRefused(t testing.TB, from dispatcher.Source, o dispatcher.Options, cause error, text string) {
	t.Helper()
	before := s.Read(t)
	_, err := s.TryJoin(t, from, o)
	qt.Check(t, qt.ErrorIs(err, cause))
	qt.Check(t, qt.ErrorMatches(err, "attach xdp veth1: "+text))
	qt.Check(t, qt.DeepEquals(s.Read(t), before))

	o.BPFFS = s.BPFFS
	_, err = dispatcher.Plan(t.Context(), s.Target, from, o)
	qt.Check(t, qt.ErrorIs(err, cause))
}

// WantDropped checks which of the ports from 7000 on are dropped; the others must pass.
func (s *Scene) WantDropped(t testing.TB, ports ...int) {
	t.Helper()
	want := map[int]int{}
	for p := Port; p < Port+8; p++ {
		want[p] = 5
	}
	for _, p := range ports {
		want[p] = 0
	}
	got := map[int]int{}
	for p := range want {
		got[p] = s.Passed(t, p, 5)
	}
	qt.Assert(t, qt.DeepEquals(got, want))
}

// Second is the error of a call that returns something besides.
func Second[T any](_ T, err error) error { return err }

// JoinLibxdp makes a tracer a member of the chain of libxdp, which it starts if
// there is none.
func (s *Scene) JoinLibxdp(t testing.TB, n, verdict, prio int) *dispatcher.Link {
	t.Helper()
	return s.Join(t, s.TracerSource(n, verdict), dispatcher.Options{Priority: prio, Persistent: true, Style: hook.StyleLibxdp})
}

// WantNoDispatchers checks that no pins of libxdp's protocol are left.
func (s *Scene) WantNoDispatchers(t testing.TB) {
	t.Helper()
	left, err := filepath.Glob(s.BPFFS + "/xdp/[ds]*-*") // dispatch-1-2, slot-3
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.HasLen(left, 0))
}

// OneOf says whether the tracers that ran are among what is possible.
func OneOf(run []int, possible [][]int) bool {
	return slices.ContainsFunc(possible, func(p []int) bool { return slices.Equal(run, p) })
}

// Running returns which tracers a packet must meet, by what Read says.
func Running(c *hook.Chain) (numbers []int) {
	for _, m := range c.Members {
		var n int
		if m.State != hook.StateRunning {
			if m.OnMissing == hook.MissingDrop {
				break
			}
			continue
		}
		if _, err := fmt.Sscanf(m.Program.Name, "ldt_trace_%d", &n); err == nil {
			numbers = append(numbers, n)
		}
	}
	return numbers
}

// MemberPins are the names of the pins of the only chain's member, the root not among them.
func (s *Scene) MemberPins(t testing.TB, member string) []string {
	t.Helper()
	var found []string
	for _, path := range s.Read(t).Pins {
		if dir, name := filepath.Split(path); strings.HasSuffix(dir, "/member_"+member+"/") {
			found = append(found, name)
		}
	}
	return found
}

// PinnedCount reads the first number of a pinned array.
func PinnedCount(t testing.TB, path string) uint64 {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(path, nil)
	qt.Assert(t, qt.IsNil(err))
	defer m.Close()
	b, err := m.LookupBytes(uint32(0))
	qt.Assert(t, qt.IsNil(err))
	return binary.NativeEndian.Uint64(b)
}

// Summary names the members in run order. A star marks persistent ones, and
// what is not running has its state in brackets: "guard* sampler door(empty)".
func Summary(c *hook.Chain) string {
	var words []string
	for _, m := range c.Members {
		word := m.Name
		if m.Persistent {
			word += "*"
		}
		if m.Kind != hook.KindMember {
			word += "(" + string(m.Kind) + ")"
		}
		if m.State != hook.StateRunning {
			word += "(" + string(m.State) + ")"
		}
		words = append(words, word)
	}
	return strings.Join(words, " ")
}

// Priority is a priority as settings.
func Priority(p int) hook.Settings { return hook.Settings{Priority: p} }

// Pinned pins a program for tools that take a path.
func (s *Scene) Pinned(t testing.TB, prog *ebpf.Program) string {
	t.Helper()
	info, err := prog.Info()
	qt.Assert(t, qt.IsNil(err))
	path := filepath.Join(s.BPFFS, info.Name)
	clone, err := prog.Clone() // a program that knows of its pin would move it
	qt.Assert(t, qt.IsNil(err))
	defer clone.Close()
	qt.Assert(t, qt.IsNil(clone.Pin(path)))
	return path
}

// Persistent are the options of a member that can be sealed.
func Persistent(name string, prio int) dispatcher.Options {
	return dispatcher.Options{Name: name, Priority: prio, Persistent: true}
}

// Member makes a tracer a persistent member that no process has open. It has its number for a name, and its number times ten
// for a priority if none is given.
func (s *Scene) Member(t testing.TB, number int, priority ...int) {
	t.Helper()
	o := Persistent(fmt.Sprint(number), append(priority, 10*number)[0])
	qt.Assert(t, qt.IsNil(s.Attach(t, s.Tracer(t, number), o).Close()))
}
