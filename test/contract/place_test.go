package contract

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// A place is a scene on any hook. What can be done on all of them is done in the same way.
type place struct {
	*scene.Scene
	above *testenv.Cgroup // which Cgroup is in
	aside *testenv.NetNS  // where nothing is attached
	links []*dispatcher.Link
}

// newPlace begins a test, which fails if it leaves anything behind. It is left out on a kernel without the hook:
// there TestContract checks that it is refused.
func newPlace(t testing.TB, h hook.Hook) *place {
	t.Helper()
	testenv.NeedHook(t, h)
	return placeOn(t, h)
}

func placeOn(t testing.TB, h hook.Hook) *place {
	t.Helper()
	testenv.CheckLeaks(t)
	if h.OnDevice() {
		s := scene.SetUp(t)
		return &place{Scene: s.OnDevice(dispatcher.On(h, s.ServerDev).In(s.Server.Name)), aside: s.Client}
	}
	const discard = 9 // where Exercise sends to
	p := &place{
		Scene: &scene.Scene{BPFFS: testenv.BPFFS(t), Trace: testenv.NewTrace(t, discard)},
		above: testenv.NewCgroup(t), aside: testenv.NewNetNS(t),
	}
	p.enter(t)
	p.Target = dispatcher.On(h, p.Cgroup.Path)
	return p
}

// enter makes the cgroup, with a process in it.
func (p *place) enter(t testing.TB) {
	t.Helper()
	p.Cgroup = p.above.Child(t, "here")
	p.Resident = p.Cgroup.Enter(t, p.aside)
}

// tracer is a program for the hook that writes its number down and lets everything go on.
func (p *place) tracer(t testing.TB, number int) *ebpf.Program {
	t.Helper()
	return p.Tracer(t, number, p.GoOn())
}

// join makes a tracer a member that is named by its number.
func (p *place) join(t testing.TB, number int, o dispatcher.Options) *dispatcher.Link {
	t.Helper()
	link, err := p.tryJoin(t, number, o)
	qt.Assert(t, qt.IsNil(err))
	return link
}

func (p *place) tryJoin(t testing.TB, number int, o dispatcher.Options) (*dispatcher.Link, error) {
	t.Helper()
	if o.Name == "" {
		o.Name = scene.Numbers[number]
	}
	return p.tryAttach(t, p.tracer(t, number), o)
}

func (p *place) tryAttach(t testing.TB, prog *ebpf.Program, o dispatcher.Options) (*dispatcher.Link, error) {
	t.Helper()
	o.BPFFS = p.BPFFS
	o.Persistent = o.Persistent || p.Target.Hook.Family() == "tc"
	link, err := dispatcher.Attach(t.Context(), p.Target, dispatcher.Program(prog), o)
	return p.keep(t, link), err
}

// reopen opens an entry.
func (p *place) reopen(t testing.TB, ref string) *dispatcher.Link {
	t.Helper()
	link, err := dispatcher.Open(t.Context(), p.Target, hook.Ref(ref), p.Look())
	qt.Assert(t, qt.IsNil(err))
	return p.keep(t, link)
}

// keep remembers a link, to be closed at the end at the latest.
func (p *place) keep(t testing.TB, link *dispatcher.Link) *dispatcher.Link {
	if link != nil {
		p.links = append(p.links, link)
		t.Cleanup(func() { link.Close() })
	}
	return link
}

// exercise does what the hook is for, once.
func (p *place) exercise(t testing.TB) error {
	t.Helper()
	switch p.Target.Hook {
	case hook.XDP, hook.TCXIngress, hook.TCIngress:
		if p.Passed(t, scene.Port, 1) == 0 {
			return errDropped
		}
		return nil
	case hook.TCXEgress, hook.TCEgress:
		if p.Replied(t, scene.Port, 1) == 0 {
			return errDropped
		}
		return nil
	}
	return p.Resident.Exercise(t, p.Target.Hook)
}

var errDropped = errors.New("the packet was dropped")

// ran returns the numbers of the tracers that run for one packet or call, in order. Nothing stands in its way.
func (p *place) ran(t testing.TB) []int {
	t.Helper()
	p.Trace.Reset(t)
	qt.Assert(t, qt.IsNil(p.exercise(t)))
	got := p.Trace.Last(t)
	if p.Target.Hook == hook.CgroupSockOps { // they run for several events
		return period(t, got)
	}
	return got
}

// period returns what the numbers are a repetition of.
func period(t testing.TB, numbers []int) []int {
	t.Helper()
	for n := 1; n < len(numbers); n++ {
		if len(numbers)%n == 0 && slices.Equal(numbers, slices.Repeat(numbers[:n], len(numbers)/n)) {
			return numbers[:n]
		}
	}
	return numbers
}

func (p *place) wantRun(t testing.TB, numbers ...int) {
	t.Helper()
	qt.Assert(t, qt.DeepEquals(p.ran(t), numbers))
}

// wantRunSoon is wantRun for what the kernel does in its own time, see [scene.Scene.WantRunSoon].
func (p *place) wantRunSoon(t testing.TB, numbers ...int) {
	t.Helper()
	for start := time.Now(); !slices.Equal(p.ran(t), numbers); {
		if time.Since(start) > scene.Patience {
			p.wantRun(t, numbers...)
		}
	}
}

// wantRunning checks what runs, and that Read has the same members in the same order. On XDP, where
// empty slots may be left, those are passed over.
func (p *place) wantRunning(t testing.TB, numbered ...int) {
	t.Helper()
	p.wantRunSoon(t, numbered...)
	var want, got []string
	for _, n := range numbered {
		want = append(want, scene.Numbers[n])
	}
	for _, m := range p.Read(t).Members {
		if m.State == hook.StateRunning {
			got = append(got, m.Name)
		}
	}
	qt.Assert(t, qt.DeepEquals(got, want))
}

// pinPaths are the paths of all pins, folders included.
func (p *place) pinPaths(t testing.TB) []string {
	t.Helper()
	var paths []string
	top := filepath.Join(p.BPFFS, "libdispatcher")
	err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
		if err == nil && path != top {
			paths = append(paths, path)
		}
		return err
	})
	if !errors.Is(err, fs.ErrNotExist) {
		qt.Assert(t, qt.IsNil(err))
	}
	return paths
}

// end takes everything out, and checks that nothing is left: no entry, no pin, no record.
func (p *place) end(t testing.TB, gone bool) {
	t.Helper()
	for _, link := range p.links {
		qt.Check(t, qt.IsNil(link.Close()))
	}
	p.links = nil
	if !gone {
		p.Clear(t)
		p.wantRunSoon(t)
		scene.Soon(t, func() bool { return len(p.Read(t).Members) == 0 })
	}
	qt.Check(t, qt.HasLen(p.pinPaths(t), 0))
}

// outsider attaches a tracer as a tool would that does not know of this library: before all others,
// or just behind a member. It returns the id of its link, 0 where there is none, and what takes it out.
func (p *place) outsider(t testing.TB, number int, behind string) (id uint32, leave func()) {
	t.Helper()
	prog := p.tracer(t, number)
	if p.Target.Hook.Family() == "tc" {
		pref := 3
		if behind != "" {
			pref = int(p.Read(t).Member(behind).Filter.Pref) + 12
		}
		filter := []string{"dev", p.ServerDev, p.Side(), "pref", fmt.Sprint(pref)}
		p.Server.TC(t, append(append([]string{"filter", "add"}, filter...), "bpf", "da", "pinned", p.Pinned(t, prog))...)
		return 0, func() { p.Server.TC(t, append([]string{"filter", "del"}, filter...)...) }
	}
	at := kernel.Before(0, false)
	if behind != "" {
		at = kernel.After(p.Read(t).Member(behind).LinkID, true)
	}
	l, id := p.Foreign(t, prog, at)
	return id, func() { qt.Assert(t, qt.IsNil(l.Close())) }
}

// attachBare attaches a program without a link.
func (p *place) attachBare(t testing.TB, prog *ebpf.Program, flags uint32) (leave func()) {
	t.Helper()
	qt.Assert(t, qt.IsNil(p.TryLinkless(t, prog, flags)))
	return func() { qt.Assert(t, qt.IsNil(p.Unlink(t, prog))) }
}

// tryReplace is BPF_PROG_ATTACH with BPF_F_REPLACE.
func (p *place) tryReplace(t testing.TB, prog, old *ebpf.Program) error {
	t.Helper()
	return p.OnTarget(t, func(target int) error {
		o := link.RawAttachProgramOptions{Target: target, Program: prog, Attach: testenv.AttachType(p.Target.Hook), Anchor: link.ReplaceProgram(old)}
		if p.Cgroup != nil {
			o.Flags = unix.BPF_F_ALLOW_MULTI
		}
		return link.RawAttachProgram(o)
	})
}
