package libxdp

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

const (
	port = 4242 // of the datagrams that tracers record
	pass = testenv.XDPPass
	drop = testenv.XDPDrop
)

// scene is a device that receives packets, and a bpffs.
type scene struct {
	*testenv.Pair
	Device
	trace *testenv.Trace
}

func newScene(t *testing.T) *scene {
	t.Helper()
	testenv.CheckLeaks(t)
	p := testenv.NewPair(t)
	return &scene{p, Device{Name: p.ServerDev, NetNS: p.Server.Name, BPFFS: testenv.BPFFS(t)}, testenv.NewTrace(t, port)}
}

// spec returns a collection with the program of a tracer, under a name.
func (s *scene) spec(n, verdict int, name string, opts ...testenv.ProgramOption) *ebpf.CollectionSpec {
	p := s.trace.Spec(n, verdict, opts...)
	p.Name, p.Instructions = name, testenv.Typed(name, p.Instructions)
	return &ebpf.CollectionSpec{Programs: map[string]*ebpf.ProgramSpec{name: p}}
}

func tracerName(n int) string { return fmt.Sprintf("ldt_trace_%d", n) }

// source returns a tracer with verdict PASS, by its number.
func (s *scene) source(t *testing.T, n int, opts ...testenv.ProgramOption) Source {
	t.Helper()
	return s.sourceOf(t, n, pass, tracerName(n), opts...)
}

func (s *scene) sourceOf(t *testing.T, n, verdict int, name string, opts ...testenv.ProgramOption) Source {
	t.Helper()
	src, err := FromSpec(s.spec(n, verdict, name, opts...), name, ebpf.CollectionOptions{})
	qt.Assert(t, qt.IsNil(err))
	return src
}

// at returns options with a priority.
func at(priority int) AttachOptions {
	return AttachOptions{Settings: hook.Settings{Priority: priority}, Start: true}
}

// join attaches a tracer.
func (s *scene) join(t *testing.T, n int, o AttachOptions, opts ...testenv.ProgramOption) *Chain {
	t.Helper()
	c, id, err := s.Attach(t.Context(), s.source(t, n, opts...), o)
	qt.Assert(t, qt.IsNil(err))
	m, err := c.Find(hook.ProgramRef(uint32(id)))
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.Equals(m.Name, tracerName(n)))
	return c
}

// read returns the chain, or nil when the device is free.
func (s *scene) read(t *testing.T) *Chain {
	t.Helper()
	c, err := s.Read(t.Context())
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	qt.Assert(t, qt.IsNil(err))
	return c
}

func names(c *Chain) []string {
	if c == nil {
		return nil
	}
	var list []string
	for _, m := range c.Members {
		list = append(list, m.Name)
	}
	return list
}

// wantRun sends a packet and asserts which tracers saw it. They must be the
// whole chain, and its pins must be libxdp's and the only ones.
func (s *scene) wantRun(t *testing.T, numbers ...int) {
	t.Helper()
	s.wantTrace(t, numbers...)
	var want []string
	for _, n := range numbers {
		want = append(want, tracerName(n))
	}
	c := s.read(t)
	qt.Assert(t, qt.DeepEquals(names(c), want))
	s.wantPins(t)
}

func (s *scene) wantTrace(t *testing.T, numbers ...int) {
	t.Helper()
	s.trace.Reset(t)
	s.Send(t, port, 1)
	qt.Assert(t, qt.DeepEquals(s.trace.Last(t), numbers))
}

// wantPins asserts that the pins are the chain's and no others.
func (s *scene) wantPins(t *testing.T) {
	t.Helper()
	want := []string{}
	if c := s.read(t); c != nil {
		dir := filepath.Join(s.BPFFS, "xdp", folderName(c.Ifindex, c.Dispatcher.ID))
		qt.Assert(t, qt.Equals(c.Folder, dir))
		want = append(want, dir)
		for n := range c.Members {
			want = append(want, filepath.Join(dir, linkPin(n)), filepath.Join(dir, progPin(n)))
		}
		qt.Assert(t, qt.DeepEquals(c.Pins, want[1:]))
	}
	qt.Assert(t, qt.DeepEquals(s.pinned(t), want))
}

// pinned returns all files in libxdp's folder.
func (s *scene) pinned(t *testing.T) []string {
	t.Helper()
	found := []string{}
	err := filepath.WalkDir(filepath.Join(s.BPFFS, "xdp"), func(path string, _ os.DirEntry, err error) error {
		if err == nil && filepath.Base(path) != "xdp" {
			found = append(found, path)
		}
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return err
	})
	qt.Assert(t, qt.IsNil(err))
	slices.Sort(found)
	return found
}

// replace puts a program on the device by netlink, whatever is there.
func (s *scene) replace(t *testing.T, prog, old *ebpf.Program, mode hook.Mode) {
	t.Helper()
	fd := func(p *ebpf.Program) int {
		if p == nil {
			return -1
		}
		return p.FD()
	}
	s.Server.Do(t, func() {
		conn, err := rtnl.Dial()
		qt.Assert(t, qt.IsNil(err))
		defer conn.Close()
		qt.Assert(t, qt.IsNil(conn.ReplaceXDP(s.ServerIfindex, fd(prog), fd(old), mode)))
	})
}

// hand puts a dispatcher without components on the device.
func (s *scene) hand(t *testing.T, c Config) *ebpf.Program {
	t.Helper()
	prog, err := newDispatcher(c, s.ServerIfindex)
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { prog.Close() })
	s.replace(t, prog, nil, hook.ModeAuto)
	return prog
}

func idOf(t *testing.T, prog *ebpf.Program) uint32 {
	t.Helper()
	id := kernel.ProgramID(prog)
	qt.Assert(t, qt.Not(qt.Equals(id, 0)))
	return id
}
