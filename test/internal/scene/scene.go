// Package scene has what the tests in test/ share: a device, a cgroup and a bpffs to be on ([Scene]), processes that use the
// library and can be killed at a step ([App]), and programs that write down that they ran.
package scene

import (
	"errors"
	"io/fs"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// Port is where the packets of these tests go.
const Port = 7000

// Scene is where a test takes place: a device that packets arrive at, and a bpffs.
type Scene struct {
	*testenv.Pair
	Target dispatcher.Target
	BPFFS  string
	Trace  *testenv.Trace
	Coded  bool // tracers are loaded such that they can be sealed

	// For a hook on a cgroup.
	Cgroup   *testenv.Cgroup
	Resident *testenv.Resident
}

// New begins a test, which fails if it leaves anything behind.
func New(t testing.TB) *Scene {
	t.Helper()
	testenv.CheckLeaks(t)
	return SetUp(t)
}

// SetUp is [New] for a test that has begun.
func SetUp(t testing.TB) *Scene {
	t.Helper()
	pair := testenv.NewPair(t)
	return &Scene{
		Pair:   pair,
		Target: dispatcher.XDP(pair.ServerDev).In(pair.Server.Name),
		BPFFS:  testenv.BPFFS(t),
		Trace:  testenv.NewTrace(t, Port),
	}
}

// OnDevice is the same scene with its device found in another way.
func (s *Scene) OnDevice(target dispatcher.Target) *Scene {
	moved := *s
	moved.Target = target
	return &moved
}

// WithoutBPFFS is the same scene for a process without a bpffs: no lock, no pins.
func (s *Scene) WithoutBPFFS(t testing.TB) *Scene {
	bare := *s
	bare.BPFFS = t.TempDir()
	return &bare
}

// Look is what to read with.
func (s *Scene) Look() dispatcher.ReadOptions { return dispatcher.ReadOptions{BPFFS: s.BPFFS} }

// Leave is what to detach with.
func (s *Scene) Leave() dispatcher.DetachOptions { return dispatcher.DetachOptions{BPFFS: s.BPFFS} }

// Tracer is a program that writes its number down when it runs. Its verdict is that the next one runs, if none is given;
// 9 is a guard, which refuses.
func (s *Scene) Tracer(t testing.TB, number int, verdict ...int) *ebpf.Program {
	if len(verdict) == 0 {
		verdict = []int{s.GoOn()}
		if number == 9 {
			verdict = []int{s.Refuse()}
		}
	}
	if s.Coded {
		return Coded(t, s.Trace.Spec(number, verdict[0]))
	}
	return s.Trace.Program(t, number, verdict[0], s.On())
}

// Attach makes a program a member, which leaves with the test at the latest.
func (s *Scene) Attach(t testing.TB, prog *ebpf.Program, o dispatcher.Options) *dispatcher.Link {
	t.Helper()
	o.BPFFS = s.BPFFS
	link, err := dispatcher.Attach(t.Context(), s.Target, dispatcher.Program(prog), o)
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { link.Close() })
	return link
}

// Open opens a member by its name.
func (s *Scene) Open(t testing.TB, name string) *dispatcher.Link {
	t.Helper()
	link, err := dispatcher.Open(t.Context(), s.Target, hook.Ref(name), s.Look())
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { link.Close() })
	return link
}

// Detach takes a member out by its name.
func (s *Scene) Detach(t testing.TB, name string) {
	t.Helper()
	qt.Assert(t, qt.IsNil(dispatcher.Detach(t.Context(), s.Target, hook.Ref(name), s.Leave())))
}

// Clear takes everything off the device, if there is anything.
func (s *Scene) Clear(t testing.TB) {
	t.Helper()
	err := dispatcher.DetachAll(t.Context(), s.Target, s.Leave())
	if !errors.Is(err, fs.ErrNotExist) {
		qt.Assert(t, qt.IsNil(err))
	}
}

// Read is what is on the target.
func (s *Scene) Read(t testing.TB) *hook.Chain {
	t.Helper()
	c, err := dispatcher.Read(t.Context(), s.Target, s.Look())
	qt.Assert(t, qt.IsNil(err))
	return c
}

// WantChain compares what Read shows with a summary, see [Summary].
func (s *Scene) WantChain(t testing.TB, want string) {
	t.Helper()
	qt.Assert(t, qt.Equals(Summary(s.Read(t)), want))
}

// Ran sends a packet, on a cgroup it makes the system call that the hook is for, and returns the numbers of the tracers
// that ran, in order.
func (s *Scene) Ran(t testing.TB) []int {
	t.Helper()
	s.Trace.Reset(t)
	if s.Target.Hook.OnCgroup() {
		_ = s.Resident.Exercise(t, s.Target.Hook)
	} else {
		s.Send(t, Port, 1)
	}
	return s.Trace.Last(t)
}

// WantRun checks that a packet meets these tracers.
func (s *Scene) WantRun(t testing.TB, numbers ...int) {
	t.Helper()
	qt.Assert(t, qt.DeepEquals(s.Ran(t), numbers))
}

// WantRunSoon is WantRun for what the kernel does in its own time: links without an owner go one by one; a slot without
// an owner is emptied by a worker, and after that the jumps of each dispatcher that was there, up to the present one, are
// undone, with a wait for all CPUs each (prog_array_map_poke_run, kernel/bpf/arraymap.c). Until then, the packets see in
// a chain what they saw before, and never anything else.
func (s *Scene) WantRunSoon(t testing.TB, numbers ...int) {
	t.Helper()
	before := s.Ran(t)
	for got, start := before, time.Now(); !slices.Equal(got, numbers); got = s.Ran(t) {
		if time.Since(start) > Patience {
			qt.Assert(t, qt.DeepEquals(got, numbers))
		}
		if s.Target.Hook == hook.XDP {
			qt.Assert(t, qt.DeepEquals(got, before))
		}
	}
}

// Patience is how long the kernel may take for what it does in its own time, on a slow machine.
const Patience = 20 * time.Second

// Soon waits for something to become so.
func Soon(t testing.TB, so func() bool) {
	t.Helper()
	for start := time.Now(); !so(); {
		if time.Since(start) > Patience {
			t.Fatal("it has not become so")
		}
	}
}

// Drops tells whether packets are dropped, or the system call is refused.
func (s *Scene) Drops(t testing.TB) bool {
	t.Helper()
	if h := s.Target.Hook; h.OnCgroup() {
		return errors.Is(s.Resident.Exercise(t, h), testenv.Denied(h))
	}
	n := s.Passed(t, Port, 10)
	if n != 0 && n != 10 {
		t.Fatalf("%d packets of 10 passed", n)
	}
	return n == 0
}

// WantFree checks that nothing is attached, and no trace of a member is left. The kernel releases a slot and a link without
// an owner in its own time. On other hooks than XDP, what there is of such links goes with the next operation.
func (s *Scene) WantFree(t testing.TB) {
	t.Helper()
	s.WantRunSoon(t)
	if s.Target.Hook == hook.XDP {
		Soon(t, func() bool { return s.Read(t).LinkID == 0 })
		s.WantChain(t, "")
		qt.Assert(t, qt.IsFalse(s.Read(t).Ours()))
		s.WantNoPins(t)
		return
	}
	for start := time.Now(); ; {
		err := dispatcher.DetachAll(t.Context(), s.Target, s.Leave())
		left := s.Pins(t)
		for _, m := range s.Read(t).Members {
			left = append(left, m.Name)
		}
		if len(left) == 0 {
			qt.Assert(t, qt.ErrorIs(err, fs.ErrNotExist))
			return
		}
		if time.Since(start) > 2*time.Second { // what goes by itself is gone
			t.Fatalf("left: %s", strings.Join(left, ", "))
		}
	}
}

// WantNoPins checks that the library's folder is empty.
func (s *Scene) WantNoPins(t testing.TB) {
	t.Helper()
	qt.Assert(t, qt.HasLen(s.Pins(t), 0))
}

// Pins are the names in the library's folder.
func (s *Scene) Pins(t testing.TB) []string {
	t.Helper()
	var names []string
	entries, err := os.ReadDir(s.BPFFS + "/libdispatcher")
	if !errors.Is(err, fs.ErrNotExist) {
		qt.Assert(t, qt.IsNil(err))
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// InOwnMountNS runs fn on a thread whose mounts are a copy: what it mounts and
// unmounts, no other thread sees.
func InOwnMountNS(t testing.TB, fn func() error) {
	t.Helper()
	errs := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNS)
		if err == nil {
			err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
		}
		if err == nil {
			err = fn()
		}
		errs <- err
	}()
	qt.Assert(t, qt.IsNil(<-errs))
}

const (
	Drop = testenv.XDPDrop
	Pass = testenv.XDPPass
)

// On makes a program one for the hook.
func (s *Scene) On() testenv.ProgramOption { return testenv.On(s.Target.Hook) }

// verdicts are the verdict after which the next program runs, and a guard's, by family of hooks.
var verdicts = map[string][2]int{
	"xdp":    {testenv.XDPPass, testenv.XDPDrop},
	"tcx":    {testenv.TCNext, testenv.TCDrop},
	"tc":     {testenv.TCNext, testenv.TCDrop},
	"cgroup": {testenv.CgroupAllow, testenv.CgroupDeny},
}

// GoOn is the verdict after which the next program runs.
func (s *Scene) GoOn() int { return verdicts[s.Target.Hook.Family()][0] }

// Refuse is the verdict of a guard.
func (s *Scene) Refuse() int { return verdicts[s.Target.Hook.Family()][1] }
