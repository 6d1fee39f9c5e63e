package observe

import (
	"errors"
	"io/fs"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// held finds what holds a member, and checks that nothing is missing.
func held(t testing.TB, all []hook.Held, what, member string) hook.Held {
	t.Helper()
	i := slices.IndexFunc(all, func(h hook.Held) bool { return h.What == what && h.Member == member })
	qt.Assert(t, qt.Not(qt.Equals(i, -1)), qt.Commentf("%s %q in %+v", what, member, all))
	qt.Check(t, qt.IsTrue(all[i].Verified), qt.Commentf("%+v", all[i]))
	return all[i]
}

// A hook that another process and a pin hold: both are named, this process is not, and nothing is missing.
func TestHoldersOn(t *testing.T) {
	for _, h := range []hook.Hook{hook.XDP, hook.TCXIngress} {
		t.Run(string(h), func(t *testing.T) {
			s := scene.NewOn(t, h)
			on := testenv.On(h)
			prog := func(name string) *ebpf.Program {
				verdict := testenv.XDPPass
				if h != hook.XDP {
					verdict = testenv.TCNext
				}
				return testenv.VerdictProgram(t, name, verdict, on)
			}
			pinned := s.Attach(t, prog("ldt_pinned"), dispatcher.Options{Name: "pinned", Persistent: true})
			owner := scene.NewApp(t)
			qt.Assert(t, qt.IsNil(owner.Do(t, scene.Command{
				Op: "attach", Target: s.Target, BPFFS: s.BPFFS, Member: "owned", Program: scene.ID(t, prog("ldt_owned")),
			})))
			what := "link"
			if h == hook.XDP {
				what = "slot"
			}
			for _, o := range []dispatcher.HoldersOnOptions{{BPFFS: s.BPFFS}, {BPFFS: s.BPFFS, NoIterators: true}} {
				var all []hook.Held
				// A dispatcher that was just replaced has its slots for a moment still.
				scene.Soon(t, func() bool {
					var err error
					all, err = dispatcher.HoldersOn(t.Context(), s.Target, "", o)
					qt.Assert(t, qt.IsNil(err))
					return o.NoIterators || !slices.ContainsFunc(all, func(h hook.Held) bool { return !h.Verified })
				})
				find := func(what, member string) hook.Held {
					if o.NoIterators {
						i := slices.IndexFunc(all, func(h hook.Held) bool { return h.What == what && h.Member == member })
						qt.Assert(t, qt.Not(qt.Equals(i, -1)))
						return all[i]
					}
					return held(t, all, what, member)
				}
				owned := find(what, "owned")
				qt.Assert(t, qt.HasLen(owned.Processes, 1))
				qt.Check(t, qt.Equals(owned.Processes[0].PID, owner.Pid))
				qt.Check(t, qt.HasLen(owned.Pins, 0))
				one := find(what, "pinned")
				qt.Check(t, qt.HasLen(one.Processes, 0)) // but for this one
				qt.Assert(t, qt.HasLen(one.Pins, 1))
				qt.Check(t, qt.IsTrue(strings.HasPrefix(one.Pins[0].Path, s.BPFFS+"/libdispatcher/")), qt.Commentf("%s", one.Pins[0].Path))
				if h == hook.XDP {
					root := find("link", "")
					qt.Check(t, qt.HasLen(root.Processes, 1))
					qt.Check(t, qt.HasLen(root.Pins, 1))
				}
			}
			var only []hook.Held
			var err error
			scene.Soon(t, func() (verified bool) { // any list of the machine has the member open for a moment
				only, err = dispatcher.HoldersOn(t.Context(), s.Target, "owned", dispatcher.HoldersOnOptions{BPFFS: s.BPFFS})
				qt.Assert(t, qt.IsNil(err))
				qt.Assert(t, qt.HasLen(only, 1))
				return only[0].Verified
			})
			held(t, only, what, "owned")
			_, err = dispatcher.HoldersOn(t.Context(), s.Target, "nobody", dispatcher.HoldersOnOptions{BPFFS: s.BPFFS})
			qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
			owner.Kill()
			qt.Assert(t, qt.IsNil(pinned.Detach(t.Context())))
		})
	}
}

// A chain that no link protects has no link that could be held: what holds a member is told all the same.
func TestHoldersOnUnprotected(t *testing.T) {
	s := scene.New(t)
	s.ClearAtEnd(t)
	s.AttachLegacy(t, testenv.VerdictProgram(t, "ldt_old", testenv.XDPPass))
	s.Adopt(t, dispatcher.AdoptOptions{Name: "old", NoGap: true})
	held, err := dispatcher.HoldersOn(t.Context(), s.Target, "old", dispatcher.HoldersOnOptions{BPFFS: s.BPFFS})
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.HasLen(held, 1))
	qt.Check(t, qt.Equals(held[0].What, "slot"))
	qt.Check(t, qt.Equals(held[0].Member, "old"))
}

// A refusal names what is in the way: the process that holds the link, and its pin.
func TestBusyNamesTheHolder(t *testing.T) {
	s := scene.New(t)
	foreign := testenv.VerdictProgram(t, "ldt_foreign", testenv.XDPPass)
	var pin string
	s.Server.Do(t, func() {
		l := scene.Hold(t, foreign, s.ServerIfindex)
		pin = s.BPFFS + "/foreign"
		qt.Assert(t, qt.IsNil(l.Pin(pin)))
	})
	_, err := dispatcher.Attach(t.Context(), s.Target, dispatcher.Program(s.Tracer(t, 1, testenv.XDPPass)), dispatcher.Options{BPFFS: s.BPFFS})
	var e *dispatcher.Error
	qt.Assert(t, qt.IsTrue(errors.As(err, &e)))
	qt.Assert(t, qt.ErrorIs(err, dispatcher.ErrBusy))
	qt.Check(t, qt.DeepEquals(e.Occupant.HeldBy, []string{"pinned at " + pin}))
	qt.Check(t, qt.ErrorMatches(err, `attach xdp veth1: held by link \d+ \(program ldt_foreign, .*, native mode, pinned at .*/foreign\); .*adopt --link \d+.*`))
}

func TestHoldersOfNothing(t *testing.T) {
	testenv.CheckLeaks(t)
	for _, kind := range []hook.HolderKind{hook.HolderLink, hook.HolderProgram, hook.HolderMap} {
		_, err := dispatcher.HoldersOf(t.Context(), hook.HolderRef{Kind: kind, ID: 1 << 31}, dispatcher.HoldersOptions{})
		qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
	}
}
