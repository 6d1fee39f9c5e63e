package flood

import (
	"fmt"
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
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// Under a flood: none passes a program that drops while it becomes a member, and a program that counts counts each once.
func TestAdoptUnderFlood(t *testing.T) {
	for _, h := range []hook.Hook{hook.TCXIngress, hook.TCXEgress, hook.TCIngress, hook.TCEgress} {
		for name, verdict := range map[string]int32{"drops": testenv.TCDrop, "counts": testenv.TCNext} {
			t.Run(name+" on "+string(h), func(t *testing.T) {
				testenv.Need(t, testenv.FeatureTCX) // where filters go, too
				s := scene.NewOn(t, h)
				onTCX := s
				bare := func(prog *ebpf.Program) { s.Linkless(t, prog, 0) }
				if s.Filters() {
					onTCX = s.SameOn("tcx" + h[2:])
					bare = func(prog *ebpf.Program) { s.Filter(t, prog, "pref 10 handle 1 bpf direct-action") }
				}
				witness, adopted := newRecorder(t, "ldt_witness", testenv.TCNext, 0), newRecorder(t, "ldt_adopted", verdict, 0)
				onTCX.Foreign(t, witness.Program)
				other := newRecorder(t, "ldt_other", testenv.TCNext, 0)
				bare(adopted.Program)
				if !s.Filters() {
					bare(other.Program)
				}

				floods := []*testenv.Flood{s.Flood(t, scene.Port, scene.MarkerPort), s.Flood(t, scene.Port+1)}
				scene.Flow(t, floods...)
				const rounds = 10
				for range rounds {
					link := s.Adopt(t, s.AdoptOptions(t, dispatcher.AdoptOptions{Name: "adopted"}, adopted.Program))
					// As it was, without a gap, for the next round; this is what is not counted once.
					if verdict == testenv.TCDrop {
						if s.Filters() {
							bare(adopted.Program)
						} else {
							standIn := testenv.DropUDPPort(t, "ldt_standin", scene.Port, s.On())
							bare(standIn)
							qt.Assert(t, qt.IsNil(link.Update(t.Context(), dispatcher.Program(testenv.DropUDPPort(t, "ldt_next", scene.Port, s.On())))))
							bare(adopted.Program)
							qt.Assert(t, qt.IsNil(s.Unlink(t, standIn)))
						}
						qt.Assert(t, qt.IsNil(link.Detach(t.Context())))
						continue
					}
					break
				}
				scene.Flow(t, floods...)
				_, received := floods[0].Stop()
				floods[1].Stop()
				_, marker := floods[0].Marker()
				if verdict == testenv.TCDrop {
					qt.Check(t, qt.Equals(received, 0))
					qt.Check(t, qt.IsTrue(marker > 10))
					return
				}
				missed, doubled := adopted.compare(t, witness, 100)
				qt.Check(t, qt.Equals(missed, 0), qt.Commentf("missed"))
				qt.Check(t, qt.Equals(doubled, 0), qt.Commentf("met twice"))
			})
		}
	}
}

// Connections meet the program all the time when it has company already.
func TestAdoptUnderConnects(t *testing.T) {
	s := scene.NewOn(t, hook.CgroupConnect4)
	deny := testenv.VerdictProgram(t, "ldt_deny", testenv.CgroupDeny, s.On())
	s.Linkless(t, deny, unix.BPF_F_ALLOW_MULTI)
	k := knock(t, s)
	for range 20 {
		link := s.Adopt(t, dispatcher.AdoptOptions{})
		s.Linkless(t, deny, unix.BPF_F_ALLOW_MULTI) // and again
		qt.Assert(t, qt.IsNil(link.Detach(t.Context())))
	}
	scene.Soon(t, func() bool { return k.tried.Load() > 1000 })
	k.stop()
	t.Logf("%d calls of connect", k.tried.Load())
	qt.Check(t, qt.Equals(k.let.Load(), 0))
}

// places are those that a member is moved to and fro between.
var places = []func(*dispatcher.Link, *testing.T) error{
	func(l *dispatcher.Link, t *testing.T) error { return l.Set(t.Context(), scene.Priority(90)) },
	func(l *dispatcher.Link, t *testing.T) error { return l.Set(t.Context(), scene.Priority(2)) },
	func(l *dispatcher.Link, t *testing.T) error { return l.Move(t.Context(), hook.Position{Last: true}) },
	func(l *dispatcher.Link, t *testing.T) error { return l.Move(t.Context(), hook.Position{After: "a"}) },
	func(l *dispatcher.Link, t *testing.T) error { return l.Set(t.Context(), scene.Priority(50)) },
	func(l *dispatcher.Link, t *testing.T) error { return l.Move(t.Context(), hook.Position{Before: "c"}) },
	func(l *dispatcher.Link, t *testing.T) error { return l.Move(t.Context(), hook.Position{Before: "a"}) },
}

// company puts members, a foreign link and a program without a link between each other on the hook, behind a witness that
// comes first. The foreign program goes that many times through a loop: when it is slow, packets are on the way from one
// place to another all the time.
func company(t *testing.T, s *scene.Scene, loops int32) (witness *recorder) {
	t.Helper()
	witness = newRecorder(t, "ldt_witness", testenv.TCNext, ebpf.AttachNone)
	pass := func(name string) *ebpf.Program { return testenv.VerdictProgram(t, name, testenv.TCNext, s.On()) }
	join := func(name string, prio int, persistent bool) {
		s.Attach(t, pass("ldt_"+name), dispatcher.Options{
			Name: name, Priority: prio, Position: hook.Position{Last: true}, Persistent: persistent,
		})
	}
	s.Foreign(t, witness.Program)
	join("a", 10, false)
	s.Linkless(t, pass("ldt_bare"), 0)
	join("b", 40, true)
	slow := testenv.VerdictSpec("ldt_slow", testenv.TCNext, s.On())
	slow.Instructions = append(asm.Instructions{
		asm.Mov.Imm(asm.R1, loops),
		asm.Sub.Imm(asm.R1, 1).WithSymbol("again"),
		asm.JNE.Imm(asm.R1, 0, "again"),
	}, slow.Instructions...)
	s.Foreign(t, testenv.Load(t, slow))
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
			s := scene.NewOn(t, tc.hook)
			witness := company(t, s, tc.loops)
			moved := newRecorder(t, "ldt_moved", testenv.TCNext, tc.as)
			link := s.Attach(t, moved.Program, dispatcher.Options{Name: "moved"})
			floods := []*testenv.Flood{s.Flood(t, scene.Port), s.Flood(t, scene.Port+1)}
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
			s := scene.NewOn(t, h)
			if s.Filters() {
				for i, name := range []string{"a", "b", "c"} {
					pass := testenv.VerdictProgram(t, "ldt_pass", testenv.TCNext, s.On())
					s.Attach(t, pass, dispatcher.Options{Name: name, Priority: 10 + 30*i, Persistent: true})
				}
			} else {
				company(t, s, 1)
			}
			drop := testenv.DropUDPPort(t, "ldt_drop", scene.Port, s.On())
			link := s.Attach(t, drop, dispatcher.Options{Name: "drop", Persistent: s.Filters()})
			flood := s.Flood(t, scene.Port, scene.Port+1)
			for i := range scene.Changes(t, moves) {
				qt.Assert(t, qt.IsNil(places[i%len(places)](link, t)))
			}
			for flood.Sent() < 20_000 {
			}
			scene.WantClosed(t, flood)
		})
	}
}

// The control: to detach and attach at the other place lets packets through, and the tests above see it.
func TestReattachElsewhereUnderFlood(t *testing.T) {
	for _, h := range []hook.Hook{hook.TCXIngress, hook.TCIngress} {
		t.Run(string(h), func(t *testing.T) {
			s := scene.NewOn(t, h)
			witness := newRecorder(t, "ldt_witness", testenv.TCNext, 0)
			s.Attach(t, witness.Program, dispatcher.Options{Priority: 1, Persistent: s.Filters()})
			drop := newRecorder(t, "ldt_drop", testenv.TCDrop, 0)
			attach := func(prio int) *dispatcher.Link {
				return s.Attach(t, drop.Program, dispatcher.Options{Priority: prio, Persistent: s.Filters()})
			}
			link := attach(20)
			flood := s.Flood(t, scene.Port)
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

// knocks are calls of connect(2) from the cgroup, by two threads, until they are stopped.
type knocks struct {
	tried, let atomic.Int64 // let in, that is
	stopping   atomic.Bool
	all        sync.WaitGroup
}

func knock(t *testing.T, s *scene.Scene) *knocks {
	t.Helper()
	k := new(knocks)
	for range 2 {
		fd, err := s.Resident.Socket(t, unix.AF_INET, unix.SOCK_DGRAM, 0)
		qt.Assert(t, qt.IsNil(err))
		k.all.Go(func() {
			defer unix.Close(fd)
			for to := (&unix.SockaddrInet4{Port: scene.Port, Addr: [4]byte{127, 0, 0, 1}}); !k.stopping.Load(); {
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

// The same on a cgroup: a process that may not connect cannot at any time.
func TestMovesUnderConnects(t *testing.T) {
	s := scene.NewOn(t, hook.CgroupConnect4)
	pass := func(name string) *ebpf.Program { return testenv.VerdictProgram(t, name, testenv.CgroupAllow, s.On()) }
	s.Attach(t, pass("ldt_a"), dispatcher.Options{Name: "a", Priority: 10})
	s.Foreign(t, pass("ldt_foreign"))
	s.Attach(t, pass("ldt_b"), dispatcher.Options{Name: "b", Priority: 40, Persistent: true})
	s.Linkless(t, pass("ldt_bare"), unix.BPF_F_ALLOW_MULTI)
	s.Attach(t, pass("ldt_c"), dispatcher.Options{Name: "c", Priority: 70})
	deny := testenv.VerdictProgram(t, "ldt_deny", testenv.CgroupDeny, s.On())
	link := s.Attach(t, deny, dispatcher.Options{Name: "deny"})

	const moves = 210
	k := knock(t, s)
	start := time.Now()
	for i := range moves {
		qt.Assert(t, qt.IsNil(places[i%len(places)](link, t)))
	}
	took := time.Since(start)
	scene.Soon(t, func() bool { return k.tried.Load() > 10_000 })
	k.stop()
	t.Logf("%d moves, %v each, %d calls of connect", moves, took/moves, k.tried.Load())
	qt.Check(t, qt.Equals(k.let.Load(), 0))

	// The control.
	k = knock(t, s)
	scene.Soon(t, func() bool {
		qt.Assert(t, qt.IsNil(link.Detach(t.Context())))
		qt.Assert(t, qt.IsNil(link.Close()))
		link = s.Attach(t, deny, dispatcher.Options{Name: "deny"})
		return k.let.Load() > 0
	})
}
