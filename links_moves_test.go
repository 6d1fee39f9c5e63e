package dispatcher_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// A linkScene is a scene on one of the hooks that have no dispatcher: TCX, clsact, or a cgroup's. Its packets go from the
// client to the server: they meet what is on the ingress side of the server's device and on the egress side of the client's.
type linkScene struct {
	*scene
	hook     hook.Hook
	ns       *testenv.NetNS // of the device
	index    int
	cgroup   *testenv.Cgroup // for a hook on one
	resident *testenv.Resident
}

// newLinkScene begins a test on a hook, which is left out on a kernel without the hook, or, on a cgroup, without places
// among others: contract_missing_test.go has what is promised there.
func newLinkScene(t testing.TB, h hook.Hook) *linkScene {
	t.Helper()
	needPlaces(t, h)
	return onHook(t, newScene(t), h)
}

func needPlaces(t testing.TB, h hook.Hook) {
	t.Helper()
	testenv.NeedHook(t, h)
	if h.OnCgroup() {
		testenv.Need(t, testenv.FeatureCgroupOrder)
	}
}

func newBusyLinkScene(t testing.TB, h hook.Hook) *linkScene {
	t.Helper()
	needPlaces(t, h)
	return onHook(t, newBusyScene(t), h)
}

func onHook(t testing.TB, s *scene, h hook.Hook) *linkScene {
	t.Helper()
	switch {
	case h.OnCgroup():
		cgroup := testenv.NewCgroup(t)
		return &linkScene{
			scene: s.onDevice(dispatcher.On(h, cgroup.Path)), hook: h, cgroup: cgroup, resident: cgroup.Enter(t, s.Client),
		}
	case h == hook.TCXEgress, h == hook.TCEgress:
		return &linkScene{
			scene: s.onDevice(dispatcher.On(h, s.ClientDev).In(s.Client.Name)), hook: h, ns: s.Client, index: s.ClientIfindex,
		}
	}
	return &linkScene{
		scene: s.onDevice(dispatcher.On(h, s.ServerDev).In(s.Server.Name)), hook: h, ns: s.Server, index: s.ServerIfindex,
	}
}

// sameOn is the same scene with another hook of the device.
func (s *linkScene) sameOn(h hook.Hook) *linkScene {
	other := *s
	target := s.target
	target.Hook = h
	other.scene, other.hook = s.onDevice(target), h
	return &other
}

func (s *linkScene) filters() bool { return s.hook.Family() == "tc" }

// goOn is the verdict after which the next program runs, and refuse the one of a guard.
func (s *linkScene) goOn() int {
	if s.hook.OnCgroup() {
		return testenv.CgroupAllow
	}
	return testenv.TCNext
}

func (s *linkScene) refuse() int {
	if s.hook.OnCgroup() {
		return testenv.CgroupDeny
	}
	return testenv.TCDrop
}

func (s *linkScene) on() testenv.ProgramOption { return testenv.On(s.hook) }

// tracer is a program that writes its number down and goes on; 9 is a guard, which refuses.
func (s *linkScene) tracer(t testing.TB, number int) *ebpf.Program {
	verdict := s.goOn()
	if number == 9 {
		verdict = s.refuse()
	}
	return s.trace.Program(t, number, verdict, s.on())
}

// member makes a tracer a persistent member that has its number for a name, and its number times ten for a priority.
func (s *linkScene) member(t testing.TB, number int) {
	t.Helper()
	link := s.attach(t, s.tracer(t, number), dispatcher.Options{Name: fmt.Sprint(number), Settings: priority(10 * number), Persistent: true})
	qt.Assert(t, qt.IsNil(link.Close()))
}

// ran is scene.ran, on a cgroup with the system call that the hook is for.
func (s *linkScene) ran(t testing.TB) []int {
	t.Helper()
	if !s.hook.OnCgroup() {
		return s.scene.ran(t)
	}
	s.trace.Reset(t)
	_ = s.resident.Exercise(t, s.hook)
	return s.trace.Last(t)
}

func (s *linkScene) wantRun(t testing.TB, numbers ...int) {
	t.Helper()
	qt.Assert(t, qt.DeepEquals(s.ran(t), numbers))
}

func (s *linkScene) wantRunSoon(t testing.TB, numbers ...int) {
	t.Helper()
	soon(t, func() bool { return slices.Equal(s.ran(t), numbers) })
}

// refuses tells what becomes of the packets, or the system call.
func (s *linkScene) refuses(t testing.TB) bool {
	t.Helper()
	if !s.hook.OnCgroup() {
		return s.drops(t)
	}
	return errors.Is(s.resident.Exercise(t, s.hook), testenv.Denied(s.hook))
}

// foreign attaches a program with a link that the library knows nothing of.
func (s *linkScene) foreign(t testing.TB, prog *ebpf.Program, at kernel.Neighbor) (id uint32) {
	t.Helper()
	s.onTarget(t, func(target int) {
		l, err := kernel.CreateLink(prog, target, testenv.AttachType(s.hook), at, 0)
		qt.Assert(t, qt.IsNil(err))
		t.Cleanup(func() { l.Close() })
		info, err := l.Info()
		qt.Assert(t, qt.IsNil(err))
		id = uint32(info.ID)
	})
	return id
}

// linkless attaches a program as was done before there were links.
func (s *linkScene) linkless(t testing.TB, prog *ebpf.Program, flags uint32) {
	t.Helper()
	s.onTarget(t, func(target int) {
		qt.Assert(t, qt.IsNil(kernel.AttachProgram(prog, target, testenv.AttachType(s.hook), flags, nil)))
	})
	t.Cleanup(func() { _ = s.unlink(t, prog) })
}

// unlink takes such a program out.
func (s *linkScene) unlink(t testing.TB, prog *ebpf.Program) (err error) {
	t.Helper()
	s.onTarget(t, func(target int) { err = kernel.DetachProgram(prog, target, testenv.AttachType(s.hook)) })
	return err
}

// onTarget runs fn where the target has that number: an index or a descriptor.
func (s *linkScene) onTarget(t testing.TB, fn func(target int)) {
	t.Helper()
	if s.cgroup == nil {
		s.ns.Do(t, func() { fn(s.index) })
		return
	}
	fd, err := unix.Open(s.cgroup.Path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	qt.Assert(t, qt.IsNil(err))
	defer unix.Close(fd)
	fn(fd)
}

// registry is what the registry has, by link: nil when there is none.
func (s *linkScene) registry(t testing.TB) map[uint32][]byte {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(s.registryPath(), nil)
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

func (s *linkScene) registryPath() string { return s.bpffs + "/libdispatcher/registry" }

// wantNothingLeft checks that the hook is empty and no trace of a member is left. What there is of links that have gone by
// themselves, in the kernel's time, goes with the next operation.
func (s *linkScene) wantNothingLeft(t testing.TB) {
	t.Helper()
	s.wantRunSoon(t)
	var left []string
	for start := time.Now(); ; {
		err := dispatcher.DetachAll(t.Context(), s.target, s.leave())
		left = slices.DeleteFunc(s.pins(t), func(name string) bool { return name == "registry" })
		for link := range s.registry(t) {
			left = append(left, fmt.Sprintf("record of link %d", link))
		}
		for _, m := range s.read(t).Members {
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

// A recorder is a program for TC that notes of each datagram of a flood to port or port+1 that it was there, by the number
// that the datagram carries: so one that it did not see cannot be made up for by another that it saw twice. Its verdict
// is for those to port; the others go on.
type recorder struct {
	*ebpf.Program
	seen *ebpf.Map
}

const (
	recorderBits = 19 // datagrams to each port that are told from each other
	markerPort   = port + 2
)

func newRecorder(t testing.TB, name string, verdict int32, as ebpf.AttachType) *recorder {
	t.Helper()
	const size = 2 << recorderBits * 4
	seen, err := ebpf.NewMap(&ebpf.MapSpec{Name: "ldt_seen", Type: ebpf.Array, KeySize: 4, ValueSize: size, MaxEntries: 1})
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { seen.Close() })
	prog := testenv.Load(t, &ebpf.ProgramSpec{
		Name: name, Type: ebpf.SchedCLS, AttachType: as, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{
			asm.LoadMem(asm.R6, asm.R1, 76, asm.Word), // data and data_end of struct __sk_buff
			asm.LoadMem(asm.R7, asm.R1, 80, asm.Word),
			asm.Mov.Reg(asm.R1, asm.R6),
			asm.Add.Imm(asm.R1, 14+20+8+8),
			asm.JGT.Reg(asm.R1, asm.R7, "other"),
			asm.LoadMem(asm.R1, asm.R6, 12, asm.Half),
			asm.HostTo(asm.BE, asm.R1, asm.Half),
			asm.JNE.Imm(asm.R1, unix.ETH_P_IP, "other"),
			asm.LoadMem(asm.R1, asm.R6, 14+9, asm.Byte),
			asm.JNE.Imm(asm.R1, unix.IPPROTO_UDP, "other"),
			asm.LoadMem(asm.R1, asm.R6, 14+20+2, asm.Half),
			asm.HostTo(asm.BE, asm.R1, asm.Half),
			asm.Sub.Imm(asm.R1, port),
			asm.JGT.Imm(asm.R1, 1, "other"),
			asm.Mov.Reg(asm.R8, asm.R1),
			asm.LSh.Imm(asm.R1, recorderBits),
			asm.LoadMem(asm.R2, asm.R6, 14+20+8, asm.DWord),
			asm.HostTo(asm.BE, asm.R2, asm.DWord),
			asm.And.Imm(asm.R2, 1<<recorderBits-1),
			asm.Or.Reg(asm.R2, asm.R1),
			asm.And.Imm(asm.R2, 1<<(recorderBits+1)-1), // Linux 5.10 does not see it
			asm.LSh.Imm(asm.R2, 2),
			asm.LoadMapValue(asm.R3, seen.FD(), 0),
			asm.Add.Reg(asm.R3, asm.R2),
			asm.Mov.Imm(asm.R1, 1),
			asm.AddAtomic.Mem(asm.R3, asm.R1, asm.Word, 0),
			asm.JNE.Imm(asm.R8, 0, "other"),
			asm.Mov.Imm(asm.R0, verdict),
			asm.Return(),
			asm.Mov.Imm(asm.R0, testenv.TCNext).WithSymbol("other"),
			asm.Return(),
		},
	})
	return &recorder{prog, seen}
}

func (r *recorder) read(t testing.TB) []byte {
	t.Helper()
	b, err := r.seen.LookupBytes(uint32(0))
	qt.Assert(t, qt.IsNil(err))
	return b
}

// compare counts the datagrams that r saw less often than the witness did, and more often. At least so many must have come
// on each port that was flooded.
func (r *recorder) compare(t testing.TB, witness *recorder, atLeast int) (missed, doubled int) {
	t.Helper()
	a, b := witness.read(t), r.read(t)
	var seen [2]int
	for i := 0; i < len(a); i += 4 {
		want, got := binary.NativeEndian.Uint32(a[i:]), binary.NativeEndian.Uint32(b[i:])
		seen[i/(len(a)/2)] += int(want)
		switch {
		case got < want:
			missed++
		case got > want:
			doubled++
		}
	}
	t.Logf("the witness saw %d and %d datagrams; of these %d were missed and %d met more than once", seen[0], seen[1], missed, doubled)
	qt.Assert(t, qt.IsTrue(seen[0] >= atLeast && (seen[1] == 0 || seen[1] >= atLeast)))
	return missed, doubled
}

// wantOnce checks that r saw each datagram exactly as often as the witness did.
func (r *recorder) wantOnce(t testing.TB, witness *recorder) {
	t.Helper()
	missed, doubled := r.compare(t, witness, 1000)
	qt.Check(t, qt.Equals(missed, 0), qt.Commentf("missed"))
	qt.Check(t, qt.Equals(doubled, 0), qt.Commentf("met twice"))
}

// flow waits until some more packets of each flood have been sent.
func flow(t testing.TB, floods ...*testenv.Flood) {
	t.Helper()
	for _, f := range floods {
		sent := f.Sent()
		soon(t, func() bool { return f.Sent() > sent+500 })
	}
}

// places are those that a member is moved to and fro between.
var places = []func(*dispatcher.Link, *testing.T) error{
	func(l *dispatcher.Link, t *testing.T) error { return l.Set(t.Context(), priority(90)) },
	func(l *dispatcher.Link, t *testing.T) error { return l.Set(t.Context(), priority(2)) },
	func(l *dispatcher.Link, t *testing.T) error { return l.Move(t.Context(), hook.Position{Last: true}) },
	func(l *dispatcher.Link, t *testing.T) error { return l.Move(t.Context(), hook.Position{After: "a"}) },
	func(l *dispatcher.Link, t *testing.T) error { return l.Set(t.Context(), priority(50)) },
	func(l *dispatcher.Link, t *testing.T) error { return l.Move(t.Context(), hook.Position{Before: "c"}) },
	func(l *dispatcher.Link, t *testing.T) error { return l.Move(t.Context(), hook.Position{Before: "a"}) },
}

// company puts members, a foreign link and a program without a link between each other on the hook, behind a witness that
// comes first. The foreign program goes that many times through a loop: when it is slow, packets are on the way from one
// place to another all the time.
func (s *linkScene) company(t *testing.T, loops int32) (witness *recorder) {
	t.Helper()
	witness = newRecorder(t, "ldt_witness", testenv.TCNext, ebpf.AttachNone)
	pass := func(name string) *ebpf.Program { return testenv.VerdictProgram(t, name, testenv.TCNext, s.on()) }
	join := func(name string, prio int, persistent bool) {
		s.attach(t, pass("ldt_"+name), dispatcher.Options{
			Name: name, Settings: priority(prio), Position: hook.Position{Last: true}, Persistent: persistent,
		})
	}
	s.foreign(t, witness.Program, kernel.Neighbor{})
	join("a", 10, false)
	s.linkless(t, pass("ldt_bare"), 0)
	join("b", 40, true)
	slow := testenv.VerdictSpec("ldt_slow", testenv.TCNext, s.on())
	slow.Instructions = append(asm.Instructions{
		asm.Mov.Imm(asm.R1, loops),
		asm.Sub.Imm(asm.R1, 1).WithSymbol("again"),
		asm.JNE.Imm(asm.R1, 0, "again"),
	}, slow.Instructions...)
	s.foreign(t, testenv.Load(t, slow), kernel.Neighbor{})
	join("c", 70, false)
	return witness
}

// The kernel cannot move a link, and yet a program that counts packets for a bill must count each one once, while its
// place changes and both CPUs send.
func TestMoveMeetsEachPacketOnce(t *testing.T) {
	const slow = 400_000
	for _, tc := range []struct {
		hook  hook.Hook
		as    ebpf.AttachType
		loops int32
	}{
		{hook.TCXIngress, ebpf.AttachNone, 1},
		{hook.TCXIngress, ebpf.AttachTCXIngress, slow},
		{hook.TCXEgress, ebpf.AttachTCXIngress, slow}, // the kernel takes any
	} {
		t.Run(fmt.Sprintf("%s as %v", tc.hook, tc.as), func(t *testing.T) {
			s := newBusyLinkScene(t, tc.hook)
			witness := s.company(t, tc.loops)
			moved := newRecorder(t, "ldt_moved", testenv.TCNext, tc.as)
			link := s.attach(t, moved.Program, dispatcher.Options{Name: "moved"})
			floods := []*testenv.Flood{s.Flood(t, port), s.Flood(t, port+1)}
			start := time.Now()
			const moves = 42
			for i := range moves {
				qt.Assert(t, qt.IsNil(places[i%len(places)](link, t)))
			}
			took := time.Since(start)
			for _, f := range floods {
				f.Stop()
			}
			t.Logf("%d moves, %v each", moves, took/moves)
			moved.wantOnce(t, witness)
		})
	}
}

// A firewall that changes its place is not open for one packet, wherever it comes from and goes to.
func TestMovesUnderFlood(t *testing.T) {
	for h, moves := range map[hook.Hook]int{hook.TCXIngress: 210, hook.TCXEgress: 49, hook.TCIngress: 105, hook.TCEgress: 49} {
		t.Run(string(h), func(t *testing.T) {
			s := newBusyLinkScene(t, h)
			if s.filters() {
				for i, name := range []string{"a", "b", "c"} {
					pass := testenv.VerdictProgram(t, "ldt_pass", testenv.TCNext, s.on())
					s.attach(t, pass, dispatcher.Options{Name: name, Settings: priority(10 + 30*i), Persistent: true})
				}
			} else {
				s.company(t, 1)
			}
			drop := testenv.DropUDPPort(t, "ldt_drop", port, s.on())
			link := s.attach(t, drop, dispatcher.Options{Name: "drop", Persistent: s.filters()})
			flood := s.Flood(t, port, port+1)
			for i := range changes(t, moves) {
				qt.Assert(t, qt.IsNil(places[i%len(places)](link, t)))
			}
			for flood.Sent() < 20_000 {
			}
			wantClosed(t, flood)
		})
	}
}

// The control: to detach and attach at the other place lets packets through, and the tests above see it.
func TestReattachElsewhereUnderFlood(t *testing.T) {
	for _, h := range []hook.Hook{hook.TCXIngress, hook.TCIngress} {
		t.Run(string(h), func(t *testing.T) {
			s := newBusyLinkScene(t, h)
			witness := newRecorder(t, "ldt_witness", testenv.TCNext, 0)
			s.attach(t, witness.Program, dispatcher.Options{Settings: priority(1), Persistent: s.filters()})
			drop := newRecorder(t, "ldt_drop", testenv.TCDrop, 0)
			attach := func(prio int) *dispatcher.Link {
				return s.attach(t, drop.Program, dispatcher.Options{Settings: priority(prio), Persistent: s.filters()})
			}
			link := attach(20)
			flood := s.Flood(t, port)
			for i := 0; flood.Received() == 0; i++ {
				if i == 1000 {
					t.Fatal("nothing gets through")
				}
				qt.Assert(t, qt.IsNil(link.Detach(t.Context())))
				qt.Assert(t, qt.IsNil(link.Close()))
				link = attach(20 + i%2)
			}
			sent, received := flood.Stop()
			t.Logf("%d of %d packets got through", received, sent)
			missed, _ := drop.compare(t, witness, 1)
			qt.Check(t, qt.IsTrue(missed > 0))
		})
	}
}

// And one that is at two places at once is seen by the recorders.
func TestRecorderSeesDoubles(t *testing.T) {
	s := newLinkScene(t, hook.TCXIngress)
	witness, twice := newRecorder(t, "ldt_witness", testenv.TCNext, 0), newRecorder(t, "ldt_twice", testenv.TCNext, 0)
	s.attach(t, witness.Program, dispatcher.Options{})
	s.attach(t, twice.Program, dispatcher.Options{})
	again := s.sameOn(hook.TCIngress)
	flood := s.Flood(t, port)
	link := again.attach(t, twice.Program, dispatcher.Options{Persistent: true})
	flow(t, flood)
	qt.Assert(t, qt.IsNil(link.Detach(t.Context())))
	flood.Stop()
	missed, doubled := twice.compare(t, witness, 1)
	qt.Check(t, qt.Equals(missed, 0))
	qt.Check(t, qt.IsTrue(doubled > 0))
}

// knocks are calls of connect(2) from the cgroup, by two threads, until they are stopped.
type knocks struct {
	tried, let atomic.Int64 // let in, that is
	stopping   atomic.Bool
	all        sync.WaitGroup
}

func (s *linkScene) knock(t *testing.T) *knocks {
	t.Helper()
	k := new(knocks)
	for range 2 {
		fd, err := s.resident.Socket(t, unix.AF_INET, unix.SOCK_DGRAM, 0)
		qt.Assert(t, qt.IsNil(err))
		k.all.Go(func() {
			defer unix.Close(fd)
			for to := (&unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}}); !k.stopping.Load(); {
				if unix.Connect(fd, to) == nil {
					k.let.Add(1)
				}
				k.tried.Add(1)
			}
		})
	}
	t.Cleanup(k.stop)
	return k
}

func (k *knocks) stop() {
	k.stopping.Store(true)
	k.all.Wait()
}

// The same on a cgroup: who may not connect cannot at any time.
func TestMovesUnderConnects(t *testing.T) {
	s := newBusyLinkScene(t, hook.CgroupConnect4)
	pass := func(name string) *ebpf.Program { return testenv.VerdictProgram(t, name, testenv.CgroupAllow, s.on()) }
	s.attach(t, pass("ldt_a"), dispatcher.Options{Name: "a", Settings: priority(10)})
	s.foreign(t, pass("ldt_foreign"), kernel.Neighbor{})
	s.attach(t, pass("ldt_b"), dispatcher.Options{Name: "b", Settings: priority(40), Persistent: true})
	s.linkless(t, pass("ldt_bare"), unix.BPF_F_ALLOW_MULTI)
	s.attach(t, pass("ldt_c"), dispatcher.Options{Name: "c", Settings: priority(70)})
	deny := testenv.VerdictProgram(t, "ldt_deny", testenv.CgroupDeny, s.on())
	link := s.attach(t, deny, dispatcher.Options{Name: "deny"})

	const moves = 210
	k := s.knock(t)
	start := time.Now()
	for i := range moves {
		qt.Assert(t, qt.IsNil(places[i%len(places)](link, t)))
	}
	took := time.Since(start)
	soon(t, func() bool { return k.tried.Load() > 10_000 })
	k.stop()
	t.Logf("%d moves, %v each, %d calls of connect", moves, took/moves, k.tried.Load())
	qt.Check(t, qt.Equals(k.let.Load(), 0))

	// The control.
	k = s.knock(t)
	soon(t, func() bool {
		qt.Assert(t, qt.IsNil(link.Detach(t.Context())))
		qt.Assert(t, qt.IsNil(link.Close()))
		link = s.attach(t, deny, dispatcher.Options{Name: "deny"})
		return k.let.Load() > 0
	})
}

// ownLinkHooks are one of each kind of hook where members have links of their own.
var ownLinkHooks = []hook.Hook{hook.TCXIngress, hook.TCXEgress, hook.CgroupConnect4}

// A member goes where it is told, and everything else keeps its order, also what is not ours. 5 and 6 are.
func TestMoveOrder(t *testing.T) {
	for _, h := range ownLinkHooks {
		t.Run(string(h), func(t *testing.T) {
			s := newLinkScene(t, h)
			links := map[int]*dispatcher.Link{}
			join := func(n, prio int) {
				links[n] = s.attach(t, s.tracer(t, n), dispatcher.Options{
					Name: fmt.Sprint(n), Settings: priority(prio), Position: hook.Position{Last: true},
				})
			}
			join(1, 10)
			foreign := s.foreign(t, s.tracer(t, 5), kernel.Neighbor{})
			join(2, 20)
			bare := s.tracer(t, 6)
			s.linkless(t, bare, map[bool]uint32{true: unix.BPF_F_ALLOW_MULTI}[h.OnCgroup()])
			join(3, 30)
			join(4, 40)
			s.wantRun(t, 1, 5, 2, 6, 3, 4)

			ctx := t.Context()
			for _, step := range []struct {
				what  string
				do    func() error
				prio  int // of the member that moved, then
				moved int
				want  []int
			}{
				{"to the last priority", func() error { return links[1].Set(ctx, priority(50)) }, 50, 1, []int{5, 2, 6, 3, 4, 1}},
				{"behind its equals", func() error { return links[1].Set(ctx, priority(30)) }, 30, 1, []int{5, 2, 6, 3, 1, 4}},
				{"no need to", func() error { return links[3].Set(ctx, priority(20)) }, 20, 3, []int{5, 2, 6, 3, 1, 4}},
				{"before the first member", func() error { return links[3].Set(ctx, priority(15)) }, 15, 3, []int{5, 3, 2, 6, 1, 4}},
				{"first of all", func() error { return links[4].Move(ctx, hook.Position{First: true}) }, 15, 4, []int{4, 5, 3, 2, 6, 1}},
				{"last of all", func() error { return links[2].Move(ctx, hook.Position{Last: true}) }, 50, 2, []int{4, 5, 3, 6, 1, 2}},
				{"behind a foreign link", func() error { return links[1].Move(ctx, hook.Position{After: hook.LinkRef(foreign)}) }, 15, 1, []int{4, 5, 1, 3, 6, 2}},
				{"before one", func() error { return links[3].Move(ctx, hook.Position{Before: hook.LinkRef(foreign)}) }, 15, 3, []int{4, 3, 5, 1, 6, 2}},
				{"behind a member", func() error { return links[3].Move(ctx, hook.Position{After: "2"}) }, 50, 3, []int{4, 5, 1, 6, 2, 3}},
				{"before a program", func() error {
					return links[3].Move(ctx, hook.Position{Before: hook.ProgramRef(uint32(idOf(t, bare)))})
				}, 50, 3, []int{4, 5, 1, 3, 6, 2}},
				{"where it is", func() error { return links[3].Move(ctx, hook.Position{After: "1"}) }, 50, 3, []int{4, 5, 1, 3, 6, 2}},
			} {
				qt.Assert(t, qt.IsNil(step.do()), qt.Commentf("%s", step.what))
				qt.Assert(t, qt.DeepEquals(s.ran(t), step.want), qt.Commentf("%s", step.what))
				m := s.read(t).Member(fmt.Sprint(step.moved))
				qt.Check(t, qt.Equals(m.Priority, step.prio), qt.Commentf("%s", step.what))
				qt.Check(t, qt.DeepEquals(running(s.read(t)), step.want), qt.Commentf("%s", step.what))
			}
			for _, refused := range []hook.Position{{Before: "3"}, {After: "3"}, {After: "nobody"}, {Before: "link:4294967295"}} {
				qt.Check(t, qt.ErrorIs(links[3].Move(ctx, refused), fs.ErrNotExist), qt.Commentf("%+v", refused))
			}
			s.wantRun(t, 4, 5, 1, 3, 6, 2)
		})
	}
}

// A member that is pinned can be moved by a process that is not its owner. The owner's Links go on with it, its counters
// go on, and so do the pins of its maps.
func TestMoveByAnother(t *testing.T) {
	for _, h := range ownLinkHooks {
		t.Run(string(h), func(t *testing.T) {
			s := newLinkScene(t, h)
			s.member(t, 4)
			link, err := dispatcher.Attach(t.Context(), s.target, dispatcher.Spec(countingOn(h), dispatcher.LoadOptions{}),
				dispatcher.Options{Name: "3", Settings: priority(30), Persistent: true, BPFFS: s.bpffs})
			qt.Assert(t, qt.IsNil(err))
			defer link.Close()
			reader := s.open(t, "3")
			mapPin := func() string {
				t.Helper()
				var found []string
				for _, path := range s.read(t).Pins {
					if filepath.Base(path) == "map_ldt_counts" {
						found = append(found, path)
					}
				}
				qt.Assert(t, qt.HasLen(found, 1))
				return found[0]
			}
			s.wantRun(t, 4)
			before := s.read(t).Member("3")
			counted := pinnedCount(t, mapPin())
			qt.Assert(t, qt.IsTrue(counted > 0))

			for _, prio := range []int{50, 10, 50} {
				other := newApp(t)
				for _, cmd := range []command{{Op: "open", Member: "3"}, {Op: "set", Settings: priority(prio)}} {
					qt.Assert(t, qt.IsNil(other.do(t, s.command(cmd))))
				}
				qt.Assert(t, qt.IsNil(other.Stop()))
			}
			s.wantChain(t, "4* 3*")
			s.wantRun(t, 4)
			after := s.read(t).Member("3")
			qt.Check(t, qt.Not(qt.Equals(after.LinkID, before.LinkID)))
			qt.Check(t, qt.Equals(after.Program.ID, before.Program.ID))
			qt.Check(t, qt.Equals(after.Owner, before.Owner))
			qt.Check(t, qt.IsTrue(pinnedCount(t, mapPin()) > counted))

			// Those who have it open still have it.
			for _, l := range []*dispatcher.Link{reader, link} {
				m, err := l.Info(t.Context())
				qt.Assert(t, qt.IsNil(err))
				qt.Check(t, qt.DeepEquals(m, after))
				c, err := l.Chain(t.Context())
				qt.Assert(t, qt.IsNil(err))
				qt.Check(t, qt.Equals(summary(c), "4* 3*"))
			}
			qt.Assert(t, qt.IsNil(link.Set(t.Context(), priority(20))))
			s.wantChain(t, "3* 4*")
			qt.Assert(t, qt.IsNil(reader.Update(t.Context(), dispatcher.Program(s.tracer(t, 3)))))
			s.wantRun(t, 3, 4)
			qt.Assert(t, qt.IsNil(reader.Unpin(t.Context())))
			s.wantChain(t, "3 4*")
			qt.Assert(t, qt.IsNil(link.Close()))
			s.wantRun(t, 3, 4) // the reader has it
			qt.Assert(t, qt.IsNil(reader.Close()))
			s.wantRunSoon(t, 4)
			s.detach(t, "4")
			s.wantNothingLeft(t)
		})
	}
}

// One that is not pinned only its owner can move: if another did, it would be that one's, and leave with it.
func TestMoveOfOthers(t *testing.T) {
	for _, h := range ownLinkHooks {
		t.Run(string(h), func(t *testing.T) {
			s := newLinkScene(t, h)
			s.member(t, 4)
			owner := s.attachIn(t, s.tracer(t, 3), dispatcher.Options{Name: "3", Settings: priority(30)})
			link := s.open(t, "3")
			for what, err := range map[string]error{
				"set":  link.Set(t.Context(), priority(50)),
				"move": link.Move(t.Context(), hook.Position{Last: true}),
			} {
				qt.Check(t, qt.ErrorIs(err, dispatcher.ErrBusy))
				qt.Check(t, qt.ErrorMatches(err, what+` .*member "3" is not pinned, and this Link has not attached it; .*pin it first`))
			}
			s.wantRun(t, 3, 4)
			qt.Check(t, qt.IsNil(link.Set(t.Context(), priority(40)))) // stays where it is

			qt.Assert(t, qt.IsNil(owner.do(t, command{Op: "set", Settings: priority(50)})))
			s.wantRun(t, 4, 3)
			m, err := link.Info(t.Context()) // takes hold of the new one
			qt.Assert(t, qt.IsNil(err))
			qt.Check(t, qt.Equals(m.Priority, 50))
			owner.Kill()
			s.wantRun(t, 4, 3)
			qt.Assert(t, qt.IsNil(link.Pin(t.Context())))
			qt.Assert(t, qt.IsNil(link.Set(t.Context(), priority(10))))
			s.wantRun(t, 3, 4)
			qt.Assert(t, qt.IsNil(link.Set(t.Context(), priority(50)))) // it is its own now
			s.wantRun(t, 4, 3)
			qt.Assert(t, qt.IsNil(link.Detach(t.Context())))
			s.detach(t, "4")
			s.wantNothingLeft(t)
		})
	}
}

// What is loaded from a file for tc moves as well: it is loaded as it was written.
func TestMoveFromFile(t *testing.T) {
	s := newLinkScene(t, hook.TCXIngress)
	s.member(t, 4)
	link, err := dispatcher.Attach(t.Context(), s.target, dispatcher.File("testdata/several.o", dispatcher.LoadOptions{Program: "ldt_tc"}),
		dispatcher.Options{Name: "tc", Settings: priority(60), BPFFS: s.bpffs})
	qt.Assert(t, qt.IsNil(err))
	defer link.Close()
	s.wantRun(t, 4)
	qt.Assert(t, qt.IsNil(link.Set(t.Context(), priority(30))))
	s.wantRun(t) // it ends the run
	s.wantChain(t, "tc 4*")
	qt.Assert(t, qt.IsNil(link.Set(t.Context(), priority(60))))
	s.wantRun(t, 4)
}

// Where there is no bpffs there is no lock and no name, and a link moves all the same, for the one who has it.
func TestMoveWithoutBPFFS(t *testing.T) {
	for _, h := range ownLinkHooks {
		t.Run(string(h), func(t *testing.T) {
			s := newLinkScene(t, h)
			s.scene = s.withoutBPFFS(t)
			first := s.attach(t, s.tracer(t, 1), dispatcher.Options{Name: "1", Settings: priority(10)})
			s.attach(t, s.tracer(t, 2), dispatcher.Options{Name: "2", Settings: priority(20)})
			s.wantRun(t, 1, 2)
			qt.Assert(t, qt.IsNil(first.Move(t.Context(), hook.Position{Last: true})))
			s.wantRun(t, 2, 1)
			qt.Assert(t, qt.IsNil(first.Move(t.Context(), hook.Position{First: true})))
			s.wantRun(t, 1, 2)
		})
	}
}
