package scene

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// AdoptOptions returns o for the entry with that program; for the only entry if the program is nil.
func (s *LinkScene) AdoptOptions(t testing.TB, o dispatcher.AdoptOptions, entry *ebpf.Program) dispatcher.AdoptOptions {
	t.Helper()
	o.BPFFS = s.BPFFS
	if entry != nil {
		o.Entry = hook.ProgramRef(uint32(ID(t, entry)))
	}
	return o
}

// Side is how tc calls the side of clsact that the hook is.
func (s *LinkScene) Side() string { return strings.TrimPrefix(string(s.Hook), "tc/") }

func (s *LinkScene) Dev() string { return s.Target.Device }

// Filter makes a filter with the program, with tc.
func (s *LinkScene) Filter(t testing.TB, prog *ebpf.Program, how string) {
	t.Helper()
	path := s.BPFFS + "/" + fmt.Sprint("prog_", ID(t, prog))
	twin, err := prog.Clone()
	qt.Assert(t, qt.IsNil(err))
	defer twin.Close()
	qt.Assert(t, qt.IsNil(twin.Pin(path)))
	defer twin.Unpin()
	s.Tc(t, how+" object-pinned "+path)
}

// Tc adds a filter, as tc has it.
func (s *LinkScene) Tc(t testing.TB, how string) {
	t.Helper()
	if !strings.Contains(s.Ns.TC(t, "qdisc", "show", "dev", s.Dev()), "clsact") {
		s.Ns.TC(t, "qdisc", "add", "dev", s.Dev(), "clsact")
	}
	s.Ns.TC(t, append([]string{"filter", "add", "dev", s.Dev(), s.Side()}, strings.Fields(how)...)...)
}

// A LinkScene is a scene on one of the hooks that have no dispatcher: TCX, clsact, or a cgroup's. Its packets go from the
// client to the server: they meet what is on the ingress side of the server's device and on the egress side of the client's.
type LinkScene struct {
	*Scene
	Hook     hook.Hook
	Ns       *testenv.NetNS // of the device
	Index    int
	Cgroup   *testenv.Cgroup // for a hook on one
	Resident *testenv.Resident
}

// NewLinkScene begins a test on a hook, which is left out on a kernel without the hook, or, on a cgroup, without places
// among others: package contract has what is promised there.
func NewLinkScene(t testing.TB, h hook.Hook) *LinkScene {
	t.Helper()
	NeedPlaces(t, h)
	return OnHook(t, New(t), h)
}

func NeedPlaces(t testing.TB, h hook.Hook) {
	t.Helper()
	testenv.NeedHook(t, h)
	if h.OnCgroup() {
		testenv.Need(t, testenv.FeatureCgroupOrder)
	}
}

func NewBusyLinkScene(t testing.TB, h hook.Hook) *LinkScene {
	t.Helper()
	NeedPlaces(t, h)
	return OnHook(t, NewBusy(t), h)
}

func OnHook(t testing.TB, s *Scene, h hook.Hook) *LinkScene {
	t.Helper()
	switch {
	case h.OnCgroup():
		cgroup := testenv.NewCgroup(t)
		return &LinkScene{
			Scene: s.OnDevice(dispatcher.On(h, cgroup.Path)), Hook: h, Cgroup: cgroup, Resident: cgroup.Enter(t, s.Client),
		}
	case h == hook.TCXEgress, h == hook.TCEgress:
		return &LinkScene{
			Scene: s.OnDevice(dispatcher.On(h, s.ClientDev).In(s.Client.Name)), Hook: h, Ns: s.Client, Index: s.ClientIfindex,
		}
	}
	return &LinkScene{
		Scene: s.OnDevice(dispatcher.On(h, s.ServerDev).In(s.Server.Name)), Hook: h, Ns: s.Server, Index: s.ServerIfindex,
	}
}

// SameOn is the same scene with another hook of the device.
func (s *LinkScene) SameOn(h hook.Hook) *LinkScene {
	other := *s
	target := s.Target
	target.Hook = h
	other.Scene, other.Hook = s.OnDevice(target), h
	return &other
}

func (s *LinkScene) Filters() bool { return s.Hook.Family() == "tc" }

// GoOn is the verdict after which the next program runs, and refuse the one of a guard.
func (s *LinkScene) GoOn() int {
	if s.Hook.OnCgroup() {
		return testenv.CgroupAllow
	}
	return testenv.TCNext
}

func (s *LinkScene) refuse() int {
	if s.Hook.OnCgroup() {
		return testenv.CgroupDeny
	}
	return testenv.TCDrop
}

func (s *LinkScene) On() testenv.ProgramOption { return testenv.On(s.Hook) }

// Tracer is a program that writes its number down and goes on; 9 is a guard, which refuses.
func (s *LinkScene) Tracer(t testing.TB, number int) *ebpf.Program {
	verdict := s.GoOn()
	if number == 9 {
		verdict = s.refuse()
	}
	return s.Trace.Program(t, number, verdict, s.On())
}

// Member makes a tracer a persistent member that has its number for a name, and its number times ten for a priority.
func (s *LinkScene) Member(t testing.TB, number int) {
	t.Helper()
	link := s.Attach(t, s.Tracer(t, number), dispatcher.Options{Name: fmt.Sprint(number), Priority: 10 * number, Persistent: true})
	qt.Assert(t, qt.IsNil(link.Close()))
}

// Ran is scene.ran, on a cgroup with the system call that the hook is for.
func (s *LinkScene) Ran(t testing.TB) []int {
	t.Helper()
	if !s.Hook.OnCgroup() {
		return s.Scene.Ran(t)
	}
	s.Trace.Reset(t)
	_ = s.Resident.Exercise(t, s.Hook)
	return s.Trace.Last(t)
}

func (s *LinkScene) WantRun(t testing.TB, numbers ...int) {
	t.Helper()
	qt.Assert(t, qt.DeepEquals(s.Ran(t), numbers))
}

func (s *LinkScene) WantRunSoon(t testing.TB, numbers ...int) {
	t.Helper()
	Soon(t, func() bool { return slices.Equal(s.Ran(t), numbers) })
}

// Foreign attaches a program with a link that the library knows nothing of.
func (s *LinkScene) Foreign(t testing.TB, prog *ebpf.Program, at kernel.Neighbor) (id uint32) {
	t.Helper()
	s.onTarget(t, func(target int) {
		l, err := kernel.CreateLink(prog, target, testenv.AttachType(s.Hook), at, 0)
		qt.Assert(t, qt.IsNil(err))
		t.Cleanup(func() { l.Close() })
		info, err := l.Info()
		qt.Assert(t, qt.IsNil(err))
		id = uint32(info.ID)
	})
	return id
}

// Linkless attaches a program as was done before there were links.
func (s *LinkScene) Linkless(t testing.TB, prog *ebpf.Program, flags uint32) {
	t.Helper()
	s.onTarget(t, func(target int) {
		qt.Assert(t, qt.IsNil(kernel.AttachProgram(prog, target, testenv.AttachType(s.Hook), flags, nil)))
	})
	t.Cleanup(func() { _ = s.Unlink(t, prog) })
}

// Unlink takes such a program out.
func (s *LinkScene) Unlink(t testing.TB, prog *ebpf.Program) (err error) {
	t.Helper()
	s.onTarget(t, func(target int) { err = kernel.DetachProgram(prog, target, testenv.AttachType(s.Hook)) })
	return err
}

// onTarget runs fn where the target has that number: an index or a descriptor.
func (s *LinkScene) onTarget(t testing.TB, fn func(target int)) {
	t.Helper()
	if s.Cgroup == nil {
		s.Ns.Do(t, func() { fn(s.Index) })
		return
	}
	fd, err := unix.Open(s.Cgroup.Path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	qt.Assert(t, qt.IsNil(err))
	defer unix.Close(fd)
	fn(fd)
}

// Registry is what the registry has, by link: nil when there is none.
func (s *LinkScene) Registry(t testing.TB) map[uint32][]byte {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(s.RegistryPath(), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	qt.Assert(t, qt.IsNil(err))
	defer m.Close()
	records := map[uint32][]byte{}
	var link uint32
	var record []byte
	it := m.Iterate()
	for it.Next(&link, &record) {
		records[link] = slices.Clone(record)
	}
	qt.Assert(t, qt.IsNil(it.Err()))
	return records
}

func (s *LinkScene) RegistryPath() string { return s.BPFFS + "/libdispatcher/registry" }

// WantNothingLeft checks that the hook is empty and no trace of a member is left. What there is of links that have gone by
// themselves, in the kernel's time, goes with the next operation.
func (s *LinkScene) WantNothingLeft(t testing.TB) {
	t.Helper()
	s.WantRunSoon(t)
	var left []string
	for start := time.Now(); ; {
		err := dispatcher.DetachAll(t.Context(), s.Target, s.Leave())
		left = slices.DeleteFunc(s.Pins(t), func(name string) bool { return name == "registry" })
		for link := range s.Registry(t) {
			left = append(left, fmt.Sprintf("record of link %d", link))
		}
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
