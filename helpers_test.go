package dispatcher_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// port is where the packets of these tests go.
const port = 7000

// scene is where a test takes place: a device that packets arrive at, and a bpffs.
type scene struct {
	*testenv.Pair
	target dispatcher.Target
	bpffs  string
	trace  *testenv.Trace
	coded  bool // tracers are loaded such that they can be sealed
}

// newScene begins a test, which fails if it leaves anything behind.
func newScene(t testing.TB) *scene {
	t.Helper()
	testenv.CheckLeaks(t)
	return setUp(t)
}

// newBusyScene is newScene for a test that keeps all CPUs busy, or kills
// processes that are at it.
func newBusyScene(t testing.TB) *scene {
	t.Helper()
	testenv.CheckLeaksUnderLoad(t)
	return setUp(t)
}

func setUp(t testing.TB) *scene {
	t.Helper()
	pair := testenv.NewPair(t)
	return &scene{
		Pair:   pair,
		target: dispatcher.XDP(pair.ServerDev).In(pair.Server.Name),
		bpffs:  testenv.BPFFS(t),
		trace:  testenv.NewTrace(t, port),
	}
}

// onDevice is the same scene with its device found in another way.
func (s *scene) onDevice(target dispatcher.Target) *scene {
	moved := *s
	moved.target = target
	return &moved
}

// withoutBPFFS is the same scene for those who have no bpffs: no lock, no pins.
func (s *scene) withoutBPFFS(t testing.TB) *scene {
	bare := *s
	bare.bpffs = t.TempDir()
	return &bare
}

func (s *scene) look() dispatcher.ReadOptions { return dispatcher.ReadOptions{BPFFS: s.bpffs} }

func (s *scene) leave() dispatcher.DetachOptions { return dispatcher.DetachOptions{BPFFS: s.bpffs} }

// tracer is a program that writes its number down when it sees a packet.
func (s *scene) tracer(t testing.TB, number, verdict int) *ebpf.Program {
	if s.coded {
		return coded(t, s.trace.Spec(number, verdict))
	}
	return s.trace.Program(t, number, verdict)
}

// attach makes a program a member, which leaves with the test at the latest.
func (s *scene) attach(t testing.TB, prog *ebpf.Program, o dispatcher.Options) *dispatcher.Link {
	t.Helper()
	o.BPFFS = s.bpffs
	link, err := dispatcher.Attach(t.Context(), s.target, dispatcher.Program(prog), o)
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { link.Close() })
	return link
}

// open opens a member by its name.
func (s *scene) open(t testing.TB, name string) *dispatcher.Link {
	t.Helper()
	link, err := dispatcher.Open(t.Context(), s.target, name, s.look())
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { link.Close() })
	return link
}

func (s *scene) detach(t testing.TB, name string) {
	t.Helper()
	qt.Assert(t, qt.IsNil(dispatcher.Detach(t.Context(), s.target, name, s.leave())))
}

// clear takes everything off the device, if there is anything.
func (s *scene) clear(t testing.TB) {
	t.Helper()
	err := dispatcher.DetachAll(t.Context(), s.target, s.leave())
	if !errors.Is(err, fs.ErrNotExist) {
		qt.Assert(t, qt.IsNil(err))
	}
}

func (s *scene) read(t testing.TB) *hook.Chain {
	t.Helper()
	c, err := dispatcher.Read(t.Context(), s.target, s.look())
	qt.Assert(t, qt.IsNil(err))
	return c
}

// wantChain compares what Read shows with a summary, see [summary].
func (s *scene) wantChain(t testing.TB, want string) {
	t.Helper()
	qt.Assert(t, qt.Equals(summary(s.read(t)), want))
}

// ran sends a packet and returns the numbers of the tracers that saw it, in order.
func (s *scene) ran(t testing.TB) []int {
	t.Helper()
	s.trace.Reset(t)
	s.Send(t, port, 1)
	return s.trace.Last(t)
}

// wantRun sends a packet, which must be seen by these tracers.
func (s *scene) wantRun(t testing.TB, numbers ...int) {
	t.Helper()
	qt.Assert(t, qt.DeepEquals(s.ran(t), numbers))
}

// wantRunSoon is wantRun for what the kernel does in its own time: a slot whose
// owner is gone is emptied by a worker, and after that the jumps of each
// dispatcher that was there, up to the present one, are undone, with a wait for
// all CPUs each (prog_array_map_poke_run, kernel/bpf/arraymap.c). Until then,
// the packets see what they saw before, and never anything else.
func (s *scene) wantRunSoon(t testing.TB, numbers ...int) {
	t.Helper()
	before := s.ran(t)
	for got, start := before, time.Now(); !slices.Equal(got, numbers); got = s.ran(t) {
		if time.Since(start) > kernelPatience {
			qt.Assert(t, qt.DeepEquals(got, numbers))
		}
		qt.Assert(t, qt.DeepEquals(got, before))
	}
}

// kernelPatience is how long the kernel may take for what it does in its own time, on a slow machine.
const kernelPatience = 20 * time.Second

// soon waits for something to become so.
func soon(t testing.TB, so func() bool) {
	t.Helper()
	for start := time.Now(); !so(); {
		if time.Since(start) > kernelPatience {
			t.Fatal("it has not become so")
		}
	}
}

// drops tells what becomes of the packets.
func (s *scene) drops(t testing.TB) bool {
	t.Helper()
	n := s.Passed(t, port, 10)
	if n != 0 && n != 10 {
		t.Fatalf("%d packets of 10 passed", n)
	}
	return n == 0
}

// wantFree checks that nothing is attached, and nothing pinned. The kernel
// releases a slot and a link whose last reference is gone each in its own time.
func (s *scene) wantFree(t testing.TB) {
	t.Helper()
	s.wantRunSoon(t)
	soon(t, func() bool { return s.read(t).LinkID == 0 })
	s.wantChain(t, "")
	qt.Assert(t, qt.IsFalse(s.read(t).Ours()))
	s.wantNoPins(t)
}

func (s *scene) wantNoPins(t testing.TB) {
	t.Helper()
	qt.Assert(t, qt.HasLen(s.pins(t), 0))
}

// pins are the names in the library's folder.
func (s *scene) pins(t testing.TB) []string {
	t.Helper()
	var names []string
	entries, err := os.ReadDir(s.bpffs + "/libdispatcher")
	if !errors.Is(err, fs.ErrNotExist) {
		qt.Assert(t, qt.IsNil(err))
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// attachLegacy attaches a program as "ip link set xdp" does.
func (s *scene) attachLegacy(t testing.TB, prog *ebpf.Program) {
	t.Helper()
	s.Server.Do(t, func() {
		c, err := rtnl.Dial()
		qt.Assert(t, qt.IsNil(err))
		defer c.Close()
		qt.Assert(t, qt.IsNil(c.ReplaceXDP(s.ServerIfindex, prog.FD(), -1, hook.ModeNative)))
	})
}

// summary names the members in run order. A star marks persistent ones, and
// what is not running has its state in brackets: "guard* sampler door(empty)".
func summary(c *hook.Chain) string {
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

func priority(p int) hook.Settings { return hook.Settings{Priority: p} }

// inOwnMountNS runs fn on a thread whose mounts are a copy: what it mounts and
// unmounts, nobody else sees.
func inOwnMountNS(t testing.TB, fn func() error) {
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

// app is another process that uses the library. It has at most one Link.
type app struct{ *testenv.Proc }

// command is what an app is told to do.
type command struct {
	Op         string // see [operations]
	Target     dispatcher.Target
	BPFFS      string
	Member     string
	Program    ebpf.ProgramID
	Maps       bool // load a program that has maps instead
	Settings   hook.Settings
	Persistent bool
	NoGap      bool
	Entry      hook.Ref      // to adopt
	Position   hook.Position // to attach at or move to

	// DieAt makes the app end itself with SIGKILL when it comes to that step
	// of the operation (kernel.OnStep), counted from 1.
	DieAt int
}

// answer is what became of it.
type answer struct {
	Died   string // the step at which it did
	Error  string
	Causes []int // in the list of causes
}

// causes are the errors that are told from each other across processes.
var causes = []error{
	fs.ErrNotExist, fs.ErrExist, fs.ErrClosed, ebpf.ErrNotSupported, dispatcher.ErrBusy, dispatcher.ErrChanged,
	dispatcher.ErrChainFull, dispatcher.ErrDefunct, dispatcher.ErrIncompatible, dispatcher.ErrPermission, dispatcher.ErrUsage,
}

func newAnswer(err error) (a answer) {
	if err == nil {
		return a
	}
	a.Error = err.Error()
	for i, cause := range causes {
		if errors.Is(err, cause) {
			a.Causes = append(a.Causes, i)
		}
	}
	return a
}

func (a answer) err() error {
	if a.Error == "" {
		return nil
	}
	err := errors.New(a.Error)
	for _, i := range a.Causes {
		err = hook.Because(causes[i], "%w", err)
	}
	return err
}

// newApp starts an app.
func newApp(t testing.TB) *app {
	t.Helper()
	return &app{testenv.StartHelper(t, "app")}
}

// do tells the app to do something and returns the error that it got.
func (a *app) do(t testing.TB, c command) error {
	t.Helper()
	return a.try(t, c).err()
}

// try is do for an app that may die of it.
func (a *app) try(t testing.TB, c command) (got answer) {
	t.Helper()
	line, err := json.Marshal(c)
	qt.Assert(t, qt.IsNil(err))
	a.Send(string(line))
	qt.Assert(t, qt.IsNil(json.Unmarshal([]byte(a.Expect(t, "answer")), &got)))
	if got.Died != "" {
		a.Kill() // it is at it; this waits for the end
	}
	return got
}

// command fills in where it happens.
func (s *scene) command(c command) command {
	c.Target, c.BPFFS = s.target, s.bpffs
	return c
}

// attachIn makes a program a member that another process owns.
func (s *scene) attachIn(t testing.TB, prog *ebpf.Program, o dispatcher.Options) *app {
	t.Helper()
	a := newApp(t)
	qt.Assert(t, qt.IsNil(a.do(t, s.command(command{
		Op: "attach", Member: o.Name, Program: idOf(t, prog), Settings: o.Settings, Persistent: o.Persistent,
	}))))
	return a
}

func idOf(t testing.TB, prog *ebpf.Program) ebpf.ProgramID {
	t.Helper()
	info, err := prog.Info()
	qt.Assert(t, qt.IsNil(err))
	id, _ := info.ID()
	return id
}

func init() {
	testenv.RegisterHelper("app", func([]string) {
		var a appState
		answers := json.NewEncoder(os.Stdout)
		for in := bufio.NewScanner(os.Stdin); in.Scan(); {
			var c command
			if err := json.Unmarshal(in.Bytes(), &c); err != nil {
				panic(err)
			}
			steps := 0
			kernel.OnStep = func(step string) {
				if steps++; steps == c.DieAt {
					fmt.Print("answer ")
					answers.Encode(answer{Died: step})
					unix.Kill(os.Getpid(), unix.SIGKILL)
					select {}
				}
			}
			err := operations[c.Op](&a, context.Background(), c)
			fmt.Print("answer ")
			answers.Encode(newAnswer(err))
		}
	})
}

// appState is what an app has.
type appState struct{ link *dispatcher.Link }

// keep makes the link that an operation returned the app's.
func (a *appState) keep(link *dispatcher.Link, err error) error {
	if err == nil {
		a.link = link
	}
	return err
}

func (c command) options() dispatcher.Options {
	return dispatcher.Options{
		Name: c.Member, Settings: c.Settings, Position: c.Position, Persistent: c.Persistent, BPFFS: c.BPFFS,
	}
}

func (c command) source() dispatcher.Source {
	if c.Maps {
		return dispatcher.Spec(countingOn(c.Target.Hook), dispatcher.LoadOptions{})
	}
	return dispatcher.ProgramID(c.Program)
}

var operations = map[string]func(*appState, context.Context, command) error{
	"attach": func(a *appState, ctx context.Context, c command) error {
		return a.keep(dispatcher.Attach(ctx, c.Target, c.source(), c.options()))
	},
	"adopt": func(a *appState, ctx context.Context, c command) error {
		return a.keep(dispatcher.Adopt(ctx, c.Target, dispatcher.AdoptOptions{Options: c.options(), NoGap: c.NoGap, Entry: c.Entry}))
	},
	"open": func(a *appState, ctx context.Context, c command) error {
		return a.keep(dispatcher.Open(ctx, c.Target, c.Member, dispatcher.ReadOptions{BPFFS: c.BPFFS}))
	},
	"update": func(a *appState, ctx context.Context, c command) error { return a.link.Update(ctx, c.source()) },
	"seal": func(_ *appState, ctx context.Context, c command) error {
		_, err := dispatcher.Seal(ctx, c.Target, dispatcher.SealOptions{BPFFS: c.BPFFS})
		return err
	},
	"unseal": func(_ *appState, ctx context.Context, c command) error {
		return dispatcher.Unseal(ctx, c.Target, dispatcher.UnsealOptions{BPFFS: c.BPFFS})
	},
	"set":   func(a *appState, ctx context.Context, c command) error { return a.link.Set(ctx, c.Settings) },
	"move":  func(a *appState, ctx context.Context, c command) error { return a.link.Move(ctx, c.Position) },
	"pin":   func(a *appState, ctx context.Context, _ command) error { return a.link.Pin(ctx) },
	"unpin": func(a *appState, ctx context.Context, _ command) error { return a.link.Unpin(ctx) },
	"leave": func(a *appState, ctx context.Context, _ command) error { return a.link.Detach(ctx) },
	"close": func(a *appState, _ context.Context, _ command) error { return a.link.Close() },
	"detach": func(_ *appState, ctx context.Context, c command) error {
		return dispatcher.Detach(ctx, c.Target, c.Member, dispatcher.DetachOptions{BPFFS: c.BPFFS})
	},
	"measure": func(_ *appState, ctx context.Context, c command) error {
		for _, err := range dispatcher.Measure(ctx, dispatcher.MeasureOptions{
			Target: &c.Target, Interval: time.Millisecond, ListOptions: dispatcher.ListOptions{BPFFS: c.BPFFS},
		}) {
			return err // after one sample
		}
		return nil
	},
	"clear": func(_ *appState, ctx context.Context, c command) error {
		return dispatcher.DetachAll(ctx, c.Target, dispatcher.DetachOptions{BPFFS: c.BPFFS})
	},
}

// countingSpec is a program with a map, which counts the packets and passes them.
func countingSpec() *ebpf.CollectionSpec { return countingOn(hook.XDP) }

// countingOn is such a program for a hook.
func countingOn(h hook.Hook) *ebpf.CollectionSpec {
	prog := testenv.VerdictSpec("ldt_counting", 0, testenv.On(h))
	pass := map[string]int32{"xdp": testenv.XDPPass, "tcx": testenv.TCNext, "tc": testenv.TCNext, "cgroup": testenv.CgroupAllow}[h.Family()]
	prog.Instructions = asm.Instructions{
		asm.LoadMapValue(asm.R1, 0, 0).WithReference("ldt_counts"),
		asm.Mov.Imm(asm.R2, 1),
		asm.AddAtomic.Mem(asm.R1, asm.R2, asm.DWord, 0),
		asm.Mov.Imm(asm.R0, pass),
		asm.Return(),
	}
	counts := &ebpf.MapSpec{Name: "ldt_counts", Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1}
	return &ebpf.CollectionSpec{
		Maps:     map[string]*ebpf.MapSpec{"ldt_counts": counts},
		Programs: map[string]*ebpf.ProgramSpec{"ldt_counting": prog},
	}
}
