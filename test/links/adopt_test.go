package links

import (
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// entries begins a scene with programs on the hook, in that order: a number is a member, a number in brackets a foreign
// link, one after a dash a program without a link.
func entries(t testing.TB, s *scene.Scene, list string) map[int]*ebpf.Program {
	t.Helper()
	progs := map[int]*ebpf.Program{}
	for _, word := range strings.Fields(list) {
		n, err := strconv.Atoi(strings.Trim(word, "-()"))
		qt.Assert(t, qt.IsNil(err))
		progs[n] = s.Tracer(t, n)
		switch word[0] {
		case '-':
			s.Linkless(t, progs[n], map[bool]uint32{true: unix.BPF_F_ALLOW_MULTI}[s.Target.Hook.OnCgroup()])
		case '(':
			s.Foreign(t, progs[n])
		default:
			s.Attach(t, progs[n], dispatcher.Options{Name: fmt.Sprint(n), Priority: 10 * n, Position: hook.Position{Last: true}})
		}
	}
	return progs
}

// tryAdopt is Adopt for what is refused, or not.
func tryAdopt(t testing.TB, s *scene.Scene, o dispatcher.AdoptOptions, entry *ebpf.Program) error {
	t.Helper()
	link, err := dispatcher.Adopt(t.Context(), s.Target, s.AdoptOptions(t, o, entry))
	if err == nil {
		t.Cleanup(func() { link.Close() })
	}
	return err
}

// A program without a link gets one where it is, among whatever else there is, and a tool cannot take it off any more that does
// not know of links.
func TestAdoptKeepsThePlace(t *testing.T) {
	for _, tc := range []struct {
		entries string
		adopted int
		prio    int // that it gets when it asks for none
	}{
		{"-1", 1, 50},
		{"-1 2 (3) -4", 1, 20},
		{"-1 2 (3) -4", 4, 50},
		{"1 -2 3", 2, 30},
		{"(1) -2 (3)", 2, 50},
		{"6 -2 (3) -4 7", 2, 60},
		{"6 -2 (3) -4 7", 4, 60},
		{"6 (3) -2 7", 2, 60},
		{"1 -2 -3", 3, 50},
		{"-1 -2 3", 1, 30},
	} {
		for _, h := range ownLinkHooks {
			t.Run(fmt.Sprintf("%s of %s on %s", fmt.Sprint(tc.adopted), tc.entries, h), func(t *testing.T) {
				s := scene.NewOn(t, h)
				progs := entries(t, s, tc.entries)
				before := s.Ran(t)
				qt.Assert(t, qt.HasLen(before, len(progs)))
				prog := progs[tc.adopted]
				link := s.Adopt(t, s.AdoptOptions(t, dispatcher.AdoptOptions{Name: "adopted"}, prog))
				s.WantRun(t, before...)
				c := s.Read(t)
				qt.Check(t, qt.DeepEquals(scene.Running(c), before))
				m := c.Member("adopted")
				qt.Assert(t, qt.IsNotNil(m))
				qt.Check(t, qt.Equals(m.Priority, tc.prio))
				qt.Check(t, qt.Equals(m.Program.ID, uint32(scene.ID(t, prog))))
				qt.Check(t, qt.IsTrue(m.Protected()))
				qt.Check(t, qt.IsNotNil(s.Unlink(t, prog)))
				s.WantRun(t, before...)
				info, err := link.Info(t.Context())
				qt.Assert(t, qt.IsNil(err))
				qt.Check(t, qt.DeepEquals(info, m))

				qt.Assert(t, qt.IsNil(link.Close())) // it is owned by now
				without := slices.DeleteFunc(before, func(n int) bool { return n == tc.adopted })
				if len(without) == 0 {
					without = nil
				}
				s.WantRunSoon(t, without...)
			})
		}
	}
}

// Between two programs of a cgroup that have no links the kernel has no way to put a link.
func TestAdoptBetweenLinkless(t *testing.T) {
	s := scene.NewOn(t, hook.CgroupConnect4)
	progs := entries(t, s, "-1 -2 -3")
	err := tryAdopt(t, s, dispatcher.AdoptOptions{}, progs[2])
	qt.Check(t, qt.ErrorIs(err, ebpf.ErrNotSupported))
	qt.Check(t, qt.ErrorMatches(err, fmt.Sprintf(`.*between programs %d and %d, which have no links.*adopt one of them first.*`,
		scene.ID(t, progs[1]), scene.ID(t, progs[2]))))
	s.WantRun(t, 1, 2, 3)
	for _, n := range []int{1, 2, 3} { // so it is done
		s.Adopt(t, s.AdoptOptions(t, dispatcher.AdoptOptions{}, progs[n]))
		s.WantRun(t, 1, 2, 3)
	}
	s.WantChain(t, "ldt_trace_1 ldt_trace_2 ldt_trace_3")
}

// What cannot be adopted stays as it is, and the error says why.
func TestAdoptOfLinksRefused(t *testing.T) {
	for _, h := range ownLinkHooks {
		t.Run(string(h), func(t *testing.T) {
			s := scene.NewOn(t, h)
			err := tryAdopt(t, s, dispatcher.AdoptOptions{}, nil)
			qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
			qt.Check(t, qt.ErrorMatches(err, "adopt .*: nothing is attached that could be adopted"))

			progs := entries(t, s, "1 (2)")
			err = tryAdopt(t, s, dispatcher.AdoptOptions{}, nil)
			qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
			qt.Check(t, qt.ErrorMatches(err, "adopt .*: nothing is attached without a link"))
			err = tryAdopt(t, s, dispatcher.AdoptOptions{}, progs[1])
			qt.Check(t, qt.ErrorIs(err, fs.ErrExist))
			qt.Check(t, qt.ErrorMatches(err, `.*"1" is a member already`))
			err = tryAdopt(t, s, dispatcher.AdoptOptions{}, progs[2])
			qt.Check(t, qt.ErrorIs(err, dispatcher.ErrBusy))
			qt.Check(t, qt.ErrorMatches(err, `.*held by link [0-9]+ \(program ldt_trace_2, .*it has a link already.*`))

			for n := 3; n <= 4; n++ {
				progs[n] = s.Tracer(t, n)
				s.Linkless(t, progs[n], map[bool]uint32{true: unix.BPF_F_ALLOW_MULTI}[h.OnCgroup()])
			}
			err = tryAdopt(t, s, dispatcher.AdoptOptions{}, nil)
			qt.Check(t, qt.ErrorIs(err, dispatcher.ErrUsage))
			qt.Check(t, qt.ErrorMatches(err, fmt.Sprintf(`.*several programs have no link: choose one, id:%d or id:%d`, scene.ID(t, progs[3]), scene.ID(t, progs[4]))))
			err = tryAdopt(t, s, dispatcher.AdoptOptions{Name: "1"}, progs[3])
			qt.Check(t, qt.ErrorIs(err, fs.ErrExist))
			err = tryAdopt(t, s, dispatcher.AdoptOptions{Priority: 1}, progs[3])
			qt.Check(t, qt.ErrorIs(err, dispatcher.ErrUsage))
			qt.Check(t, qt.ErrorMatches(err, ".*priority 1 does not fit there.*"))
			unknown := testenv.VerdictProgram(t, "ldt_unknown", s.GoOn(), s.On())
			err = tryAdopt(t, s, dispatcher.AdoptOptions{}, unknown)
			qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
			s.WantRun(t, 1, 2, 3, 4)
		})
	}
}

// A persistent member that was adopted outlives the process that adopted it.
func TestAdoptForGood(t *testing.T) {
	for _, h := range ownLinkHooks {
		t.Run(string(h), func(t *testing.T) {
			s := scene.NewOn(t, h)
			progs := entries(t, s, "-1 2")
			other := scene.NewApp(t)
			cmd := s.Command(scene.Command{Op: "adopt", Member: "adopted", Persistent: true})
			qt.Assert(t, qt.IsNil(other.Do(t, cmd)))
			other.Kill()
			s.WantRun(t, 1, 2)
			s.WantChain(t, "adopted* 2")
			qt.Check(t, qt.IsNotNil(s.Unlink(t, progs[1])))
			s.Detach(t, "adopted")
			s.WantRun(t, 2)
		})
	}
}

// A program that is alone on a cgroup, so that the kernel lets nothing beside it, has to be off before it gets its link.
func TestAdoptExclusive(t *testing.T) {
	for name, flags := range map[string]uint32{"exclusive": 0, "override": unix.BPF_F_ALLOW_OVERRIDE} {
		t.Run(name, func(t *testing.T) {
			s := scene.New(t).OnHook(t, hook.CgroupConnect4)
			deny := testenv.VerdictProgram(t, "ldt_deny", testenv.CgroupDeny, s.On())
			s.Linkless(t, deny, flags)
			qt.Assert(t, qt.IsTrue(s.Drops(t)))
			_, err := dispatcher.Attach(t.Context(), s.Target, dispatcher.Program(s.Tracer(t, 1)), dispatcher.Options{BPFFS: s.BPFFS})
			qt.Check(t, qt.ErrorIs(err, dispatcher.ErrBusy))

			o := s.AdoptOptions(t, dispatcher.AdoptOptions{Name: "deny", Persistent: true}, nil)
			o.NoGap = true
			_, err = dispatcher.Adopt(t.Context(), s.Target, o)
			qt.Check(t, qt.ErrorIs(err, ebpf.ErrNotSupported))
			qt.Check(t, qt.ErrorMatches(err, ".*the kernel lets no link be beside it.*adopt it with the gap.*"))
			qt.Check(t, qt.IsTrue(s.Drops(t)))

			// Nothing but what cannot be otherwise is in the gap.
			o.NoGap = false
			let := map[string]bool{}
			err = scene.AtEachStep(func() error {
				link, err := dispatcher.Adopt(t.Context(), s.Target, o)
				if err == nil {
					err = link.Close()
				}
				return err
			}, func(step string) {
				if !s.Drops(t) {
					let[step] = true
				}
			})
			qt.Assert(t, qt.IsNil(err))
			qt.Check(t, qt.DeepEquals(let, map[string]bool{"adopt: in the gap": true, "create: before": true}))
			qt.Check(t, qt.IsTrue(s.Drops(t)))
			s.WantChain(t, "deny*")
			qt.Check(t, qt.IsTrue(s.Read(t).Protected()))
			qt.Check(t, qt.IsNotNil(s.Unlink(t, deny)))
			s.Attach(t, s.Tracer(t, 1), dispatcher.Options{Name: "1"}) // there is room for others now
			s.WantRun(t, 1)
			s.Detach(t, "deny")
			qt.Check(t, qt.IsFalse(s.Drops(t)))
		})
	}
}

// One that cannot become a member after all, when it is off already, is put back.
func TestAdoptExclusivePutBack(t *testing.T) {
	s := scene.New(t).OnHook(t, hook.CgroupConnect4)
	deny := testenv.VerdictProgram(t, "ldt_deny", testenv.CgroupDeny, s.On())
	s.Linkless(t, deny, 0)
	intruder := testenv.VerdictProgram(t, "ldt_intruder", testenv.CgroupAllow, s.On())
	err := scene.AtEachStep(func() error {
		return tryAdopt(t, s, dispatcher.AdoptOptions{}, nil)
	}, func(step string) {
		if step == "adopt: in the gap" {
			s.Linkless(t, intruder, 0)
		}
	})
	qt.Assert(t, qt.IsNotNil(err))
	qt.Check(t, qt.IsTrue(s.Drops(t)), qt.Commentf("%v", err))
	members := s.Read(t).Members
	qt.Assert(t, qt.HasLen(members, 1))
	qt.Check(t, qt.Equals(members[0].Program.ID, uint32(scene.ID(t, deny))))
}
