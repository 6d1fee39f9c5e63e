package dispatcher_test

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
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// entries begins a scene with programs on the hook, in that order: a number is a member, a number in brackets a foreign
// link, one after a dash a program without a link.
func (s *linkScene) entries(t testing.TB, list string) map[int]*ebpf.Program {
	t.Helper()
	progs := map[int]*ebpf.Program{}
	for _, word := range strings.Fields(list) {
		n, err := strconv.Atoi(strings.Trim(word, "-()"))
		qt.Assert(t, qt.IsNil(err))
		progs[n] = s.tracer(t, n)
		switch word[0] {
		case '-':
			s.linkless(t, progs[n], map[bool]uint32{true: unix.BPF_F_ALLOW_MULTI}[s.hook.OnCgroup()])
		case '(':
			s.foreign(t, progs[n], kernel.Neighbor{})
		default:
			s.attach(t, progs[n], dispatcher.Options{Name: fmt.Sprint(n), Settings: priority(10 * n), Position: hook.Position{Last: true}})
		}
	}
	return progs
}

// adoptOptions are those of the entry with that program; of the only one for nil.
func (s *linkScene) adoptOptions(t testing.TB, o dispatcher.Options, entry *ebpf.Program) dispatcher.AdoptOptions {
	t.Helper()
	o.BPFFS = s.bpffs
	if entry == nil {
		return dispatcher.AdoptOptions{Options: o}
	}
	return dispatcher.AdoptOptions{Options: o, Entry: hook.ProgramRef(uint32(idOf(t, entry)))}
}

// tryAdopt is Adopt for what is refused, or not.
func (s *linkScene) tryAdopt(t testing.TB, o dispatcher.Options, entry *ebpf.Program) error {
	t.Helper()
	link, err := dispatcher.Adopt(t.Context(), s.target, s.adoptOptions(t, o, entry))
	if err == nil {
		t.Cleanup(func() { link.Close() })
	}
	return err
}

// A program without a link gets one where it is, among whatever else there is, and nobody can take it off any more who does
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
				s := newLinkScene(t, h)
				progs := s.entries(t, tc.entries)
				before := s.ran(t)
				qt.Assert(t, qt.HasLen(before, len(progs)))
				prog := progs[tc.adopted]
				link := s.adopt(t, s.adoptOptions(t, dispatcher.Options{Name: "adopted"}, prog))
				s.wantRun(t, before...)
				c := s.read(t)
				qt.Check(t, qt.DeepEquals(running(c), before))
				m := c.Member("adopted")
				qt.Assert(t, qt.IsNotNil(m))
				qt.Check(t, qt.Equals(m.Priority, tc.prio))
				qt.Check(t, qt.Equals(m.Program.ID, uint32(idOf(t, prog))))
				qt.Check(t, qt.IsTrue(m.Protected()))
				qt.Check(t, qt.IsNotNil(s.unlink(t, prog)))
				s.wantRun(t, before...)
				info, err := link.Info(t.Context())
				qt.Assert(t, qt.IsNil(err))
				qt.Check(t, qt.DeepEquals(info, m))

				qt.Assert(t, qt.IsNil(link.Close())) // it is owned by now
				without := slices.DeleteFunc(before, func(n int) bool { return n == tc.adopted })
				if len(without) == 0 {
					without = nil
				}
				s.wantRunSoon(t, without...)
			})
		}
	}
}

// Between two programs of a cgroup that have no links the kernel has no way to put a link.
func TestAdoptBetweenLinkless(t *testing.T) {
	s := newLinkScene(t, hook.CgroupConnect4)
	progs := s.entries(t, "-1 -2 -3")
	err := s.tryAdopt(t, dispatcher.Options{}, progs[2])
	qt.Check(t, qt.ErrorIs(err, ebpf.ErrNotSupported))
	qt.Check(t, qt.ErrorMatches(err, fmt.Sprintf(`.*between programs %d and %d, which have no links.*adopt one of them first.*`,
		idOf(t, progs[1]), idOf(t, progs[2]))))
	s.wantRun(t, 1, 2, 3)
	qt.Check(t, qt.HasLen(s.registry(t), 0))
	for _, n := range []int{1, 2, 3} { // so it is done
		s.adopt(t, s.adoptOptions(t, dispatcher.Options{}, progs[n]))
		s.wantRun(t, 1, 2, 3)
	}
	s.wantChain(t, "ldt_trace_1 ldt_trace_2 ldt_trace_3")
}

// What cannot be adopted stays as it is, and the error says why.
func TestAdoptOfLinksRefused(t *testing.T) {
	for _, h := range ownLinkHooks {
		t.Run(string(h), func(t *testing.T) {
			s := newLinkScene(t, h)
			err := s.tryAdopt(t, dispatcher.Options{}, nil)
			qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
			qt.Check(t, qt.ErrorMatches(err, "adopt .*: nothing is attached that could be adopted"))

			progs := s.entries(t, "1 (2)")
			err = s.tryAdopt(t, dispatcher.Options{}, nil)
			qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
			qt.Check(t, qt.ErrorMatches(err, "adopt .*: nothing is attached without a link"))
			err = s.tryAdopt(t, dispatcher.Options{}, progs[1])
			qt.Check(t, qt.ErrorIs(err, fs.ErrExist))
			qt.Check(t, qt.ErrorMatches(err, `.*"1" is a member already`))
			err = s.tryAdopt(t, dispatcher.Options{}, progs[2])
			qt.Check(t, qt.ErrorIs(err, dispatcher.ErrBusy))
			qt.Check(t, qt.ErrorMatches(err, `.*held by link [0-9]+ \(program ldt_trace_2, .*it has a link already.*`))

			for n := 3; n <= 4; n++ {
				progs[n] = s.tracer(t, n)
				s.linkless(t, progs[n], map[bool]uint32{true: unix.BPF_F_ALLOW_MULTI}[h.OnCgroup()])
			}
			err = s.tryAdopt(t, dispatcher.Options{}, nil)
			qt.Check(t, qt.ErrorIs(err, dispatcher.ErrUsage))
			qt.Check(t, qt.ErrorMatches(err, fmt.Sprintf(`.*several programs have no link: choose one, id:%d or id:%d`, idOf(t, progs[3]), idOf(t, progs[4]))))
			err = s.tryAdopt(t, dispatcher.Options{Name: "1"}, progs[3])
			qt.Check(t, qt.ErrorIs(err, fs.ErrExist))
			err = s.tryAdopt(t, dispatcher.Options{Settings: priority(1)}, progs[3])
			qt.Check(t, qt.ErrorIs(err, dispatcher.ErrUsage))
			qt.Check(t, qt.ErrorMatches(err, ".*priority 1 does not fit there.*"))
			err = s.tryAdopt(t, dispatcher.Options{Position: hook.Position{First: true}}, progs[3])
			qt.Check(t, qt.ErrorIs(err, dispatcher.ErrUsage))
			unknown := testenv.VerdictProgram(t, "ldt_unknown", s.goOn(), s.on())
			err = s.tryAdopt(t, dispatcher.Options{}, unknown)
			qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
			s.wantRun(t, 1, 2, 3, 4)
			qt.Check(t, qt.HasLen(s.registry(t), 1))
		})
	}
}

// A persistent member that was adopted outlives who adopted it.
func TestAdoptForGood(t *testing.T) {
	for _, h := range ownLinkHooks {
		t.Run(string(h), func(t *testing.T) {
			s := newLinkScene(t, h)
			progs := s.entries(t, "-1 2")
			other := newApp(t)
			cmd := s.command(command{Op: "adopt", Member: "adopted", Persistent: true})
			qt.Assert(t, qt.IsNil(other.do(t, cmd)))
			other.Kill()
			s.wantRun(t, 1, 2)
			s.wantChain(t, "adopted* 2")
			qt.Check(t, qt.IsNotNil(s.unlink(t, progs[1])))
			s.detach(t, "adopted")
			s.wantRun(t, 2)
		})
	}
}

// Under a flood: none passes a program that drops while it becomes a member, and a program that counts counts each once.
func TestAdoptUnderFlood(t *testing.T) {
	for _, h := range []hook.Hook{hook.TCXIngress, hook.TCXEgress, hook.TCIngress, hook.TCEgress} {
		for name, verdict := range map[string]int32{"drops": testenv.TCDrop, "counts": testenv.TCNext} {
			t.Run(name+" on "+string(h), func(t *testing.T) {
				testenv.Need(t, testenv.FeatureTCX) // where filters go, too
				s := newBusyLinkScene(t, h)
				onTCX := s
				bare := func(prog *ebpf.Program) { s.linkless(t, prog, 0) }
				if s.filters() {
					onTCX = s.sameOn("tcx" + h[2:])
					bare = func(prog *ebpf.Program) { s.filter(t, prog, "pref 10 handle 1 bpf direct-action") }
				}
				witness, adopted := newRecorder(t, "ldt_witness", testenv.TCNext, 0), newRecorder(t, "ldt_adopted", verdict, 0)
				onTCX.foreign(t, witness.Program, kernel.Neighbor{})
				other := newRecorder(t, "ldt_other", testenv.TCNext, 0)
				bare(adopted.Program)
				if !s.filters() {
					bare(other.Program)
				}

				floods := []*testenv.Flood{s.Flood(t, port, markerPort), s.Flood(t, port+1)}
				flow(t, floods...)
				const rounds = 10
				for range rounds {
					link := s.adopt(t, s.adoptOptions(t, dispatcher.Options{Name: "adopted"}, adopted.Program))
					// As it was, without a gap, for the next round; this is what is not counted once.
					if verdict == testenv.TCDrop {
						if s.filters() {
							bare(adopted.Program)
						} else {
							standIn := testenv.DropUDPPort(t, "ldt_standin", port, s.on())
							bare(standIn)
							qt.Assert(t, qt.IsNil(link.Update(t.Context(), dispatcher.Program(testenv.DropUDPPort(t, "ldt_next", port, s.on())))))
							bare(adopted.Program)
							qt.Assert(t, qt.IsNil(s.unlink(t, standIn)))
						}
						qt.Assert(t, qt.IsNil(link.Detach(t.Context())))
						continue
					}
					break
				}
				flow(t, floods...)
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

// side is how tc calls the side of clsact that the hook is.
func (s *linkScene) side() string { return strings.TrimPrefix(string(s.hook), "tc/") }

func (s *linkScene) dev() string { return s.target.Device }

// filter makes a filter with the program, with tc.
func (s *linkScene) filter(t testing.TB, prog *ebpf.Program, how string) {
	t.Helper()
	path := s.bpffs + "/" + fmt.Sprint("prog_", idOf(t, prog))
	twin, err := prog.Clone()
	qt.Assert(t, qt.IsNil(err))
	defer twin.Close()
	qt.Assert(t, qt.IsNil(twin.Pin(path)))
	defer twin.Unpin()
	s.tc(t, how+" object-pinned "+path)
}

// tc adds a filter, as tc has it.
func (s *linkScene) tc(t testing.TB, how string) {
	t.Helper()
	if !strings.Contains(s.ns.TC(t, "qdisc", "show", "dev", s.dev()), "clsact") {
		s.ns.TC(t, "qdisc", "add", "dev", s.dev(), "clsact")
	}
	s.ns.TC(t, append([]string{"filter", "add", "dev", s.dev(), s.side()}, strings.Fields(how)...)...)
}

// filtersLeft is what tc shows.
func (s *linkScene) filtersLeft(t testing.TB) string {
	t.Helper()
	return s.ns.TC(t, "filter", "show", "dev", s.dev(), s.side())
}

// A filter that tc made becomes a member of TCX, which the rest of tc cannot touch.
func TestAdoptFilter(t *testing.T) {
	testenv.Need(t, testenv.FeatureTCX)
	for _, h := range []hook.Hook{hook.TCIngress, hook.TCEgress} {
		t.Run(string(h), func(t *testing.T) {
			s := newLinkScene(t, h)
			tcx := s.sameOn("tcx" + h[2:])
			tcx.member(t, 1)
			for n, how := range []string{2: "pref 10 handle 1 bpf da", 3: "pref 20 bpf da", 4: "pref 30 bpf da"} {
				if how != "" {
					s.filter(t, s.tracer(t, n), how)
				}
			}
			s.wantRun(t, 1, 2, 3, 4)
			c := s.read(t)
			qt.Assert(t, qt.HasLen(c.Members, 3))
			ref := func(i int) hook.Ref { return hook.ProgramRef(c.Members[i].Program.ID) }
			adopt := func(entry hook.Ref, o dispatcher.Options) (*dispatcher.Link, error) {
				o.BPFFS = s.bpffs
				link, err := dispatcher.Adopt(t.Context(), s.target, dispatcher.AdoptOptions{Options: o, Entry: entry})
				if err == nil {
					t.Cleanup(func() { link.Close() })
				}
				return link, err
			}

			_, err := adopt("", dispatcher.Options{})
			qt.Check(t, qt.ErrorIs(err, dispatcher.ErrUsage))
			qt.Check(t, qt.ErrorMatches(err, `adopt tc/.*: there are several filters: choose one, id:[0-9]+ or id:[0-9]+`))
			_, err = adopt(ref(1), dispatcher.Options{})
			qt.Check(t, qt.ErrorIs(err, dispatcher.ErrUsage))
			qt.Check(t, qt.ErrorMatches(err, fmt.Sprintf(`.*runs before the filters of clsact, and filter %s would be passed over; adopt that one first.*`, ref(0))))
			s.wantRun(t, 1, 2, 3, 4)

			link, err := adopt(ref(0), dispatcher.Options{Name: "two", Persistent: true})
			qt.Assert(t, qt.IsNil(err))
			s.wantRun(t, 1, 2, 3, 4)
			qt.Check(t, qt.Equals(summary(tcx.read(t)), "1* two*"))
			qt.Check(t, qt.HasLen(s.read(t).Members, 2))
			qt.Check(t, qt.IsFalse(strings.Contains(s.filtersLeft(t), "pref 10 ")))
			m, err := link.Info(t.Context())
			qt.Assert(t, qt.IsNil(err))
			qt.Check(t, qt.Equals(m.Priority, 50))
			qt.Check(t, qt.IsTrue(m.Protected()))
			qt.Assert(t, qt.IsNil(link.Set(t.Context(), priority(5)))) // it is one like all others
			s.wantRun(t, 2, 1, 3, 4)
			qt.Assert(t, qt.IsNil(link.Close()))

			_, err = adopt(ref(1), dispatcher.Options{})
			qt.Assert(t, qt.IsNil(err))
			last, err := adopt("", dispatcher.Options{})
			qt.Assert(t, qt.IsNil(err))
			s.wantRun(t, 2, 1, 3, 4)
			qt.Check(t, qt.Equals(summary(tcx.read(t)), "two* 1* ldt_trace_3 ldt_trace_4"))
			qt.Check(t, qt.Equals(strings.TrimSpace(s.filtersLeft(t)), ""))
			_, err = adopt("", dispatcher.Options{})
			qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
			s.ns.TC(t, "qdisc", "del", "dev", s.dev(), "clsact")
			s.wantRun(t, 2, 1, 3, 4)
			qt.Assert(t, qt.IsNil(last.Detach(t.Context())))
			s.wantRun(t, 2, 1, 3)
			tcx.clear(t)
			s.wantRunSoon(t)
		})
	}
}

// Where there is no TCX, a filter that is adopted stays what it is and gets a name.
func TestAdoptFilterInPlace(t *testing.T) {
	if testenv.Has(t, testenv.FeatureTCX) {
		t.Skip("this kernel has TCX, see TestAdoptFilter")
	}
	s := newLinkScene(t, hook.TCIngress)
	for n, how := range []string{2: "pref 10 handle 1 bpf da", 3: "pref 20 bpf da"} {
		if how != "" {
			s.filter(t, s.tracer(t, n), how)
		}
	}
	link := s.adopt(t, dispatcher.AdoptOptions{
		Options: dispatcher.Options{Name: "two", Persistent: true}, Entry: hook.ProgramRef(s.read(t).Members[0].Program.ID),
	})
	s.wantRun(t, 2, 3)
	m, err := link.Info(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(m.Name, "two"))
	qt.Check(t, qt.IsFalse(m.Protected()))
	qt.Check(t, qt.Equals(m.Filter.Pref, 10))
	qt.Assert(t, qt.IsNil(link.Detach(t.Context())))
	s.wantRun(t, 3)
}

// A filter that would do something else on TCX than where it is stays where it is.
func TestAdoptFilterRefused(t *testing.T) {
	for name, tc := range map[string]struct {
		before  string // another filter
		how     string
		message string
	}{
		"a class":             {"", "pref 10 bpf", ".*not in direct-action mode.*"},
		"IPv4 only":           {"", "protocol ip pref 10 bpf da", ".*protocol.*"},
		"in another chain":    {"", "chain 3 pref 10 bpf da", ".*chain.*"},
		"behind another kind": {"pref 5 u32 match u32 0 0 classid 1:1", "pref 10 bpf da", ".*(pref 5|u32).*"},
	} {
		t.Run(name, func(t *testing.T) {
			if tc.before != "" {
				testenv.Need(t, testenv.FeatureTCX) // else it stays where it is
			}
			s := newLinkScene(t, hook.TCIngress)
			if tc.before != "" {
				s.tc(t, tc.before)
			}
			prog := testenv.VerdictProgram(t, "ldt_tc", testenv.TCNext, s.on())
			s.filter(t, prog, tc.how)
			before := s.filtersLeft(t)
			err := s.tryAdopt(t, dispatcher.Options{}, prog)
			qt.Assert(t, qt.IsNotNil(err))
			qt.Check(t, qt.ErrorMatches(err, tc.message))
			qt.Check(t, qt.Equals(s.filtersLeft(t), before))
			if testenv.Has(t, testenv.FeatureTCX) {
				qt.Check(t, qt.HasLen(s.sameOn(hook.TCXIngress).read(t).Members, 0))
			}
		})
	}
}

// Filters of other kinds behind the one that is adopted keep their turn.
func TestAdoptFilterBeforeOthers(t *testing.T) {
	s := newLinkScene(t, hook.TCIngress)
	s.filter(t, s.tracer(t, 2), "pref 10 bpf da")
	s.tc(t, "pref 20 u32 match u32 0 0 classid 1:1")
	s.filter(t, s.tracer(t, 3), "pref 30 bpf da") // never comes to its turn
	s.wantRun(t, 2)
	s.adopt(t, dispatcher.AdoptOptions{Entry: hook.ProgramRef(s.read(t).Members[0].Program.ID)})
	s.wantRun(t, 2)
	qt.Check(t, qt.StringContains(s.filtersLeft(t), "pref 20 u32"))
}

// A program that is alone on a cgroup, so that the kernel lets nothing beside it, has to be off before it gets its link.
func TestAdoptExclusive(t *testing.T) {
	for name, flags := range map[string]uint32{"exclusive": 0, "override": unix.BPF_F_ALLOW_OVERRIDE} {
		t.Run(name, func(t *testing.T) {
			s := onHook(t, newScene(t), hook.CgroupConnect4)
			deny := testenv.VerdictProgram(t, "ldt_deny", testenv.CgroupDeny, s.on())
			s.linkless(t, deny, flags)
			qt.Assert(t, qt.IsTrue(s.refuses(t)))
			_, err := dispatcher.Attach(t.Context(), s.target, dispatcher.Program(s.tracer(t, 1)), dispatcher.Options{BPFFS: s.bpffs})
			qt.Check(t, qt.ErrorIs(err, dispatcher.ErrBusy))

			o := s.adoptOptions(t, dispatcher.Options{Name: "deny", Persistent: true}, nil)
			o.NoGap = true
			_, err = dispatcher.Adopt(t.Context(), s.target, o)
			qt.Check(t, qt.ErrorIs(err, ebpf.ErrNotSupported))
			qt.Check(t, qt.ErrorMatches(err, ".*the kernel lets no link be beside it.*adopt it with the gap.*"))
			qt.Check(t, qt.IsTrue(s.refuses(t)))

			// Nothing but what cannot be otherwise is in the gap.
			o.NoGap = false
			let := map[string]bool{}
			err = atEachStep(func() error {
				link, err := dispatcher.Adopt(t.Context(), s.target, o)
				if err == nil {
					err = link.Close()
				}
				return err
			}, func(step string) {
				if !s.refuses(t) {
					let[step] = true
				}
			})
			qt.Assert(t, qt.IsNil(err))
			qt.Check(t, qt.DeepEquals(let, map[string]bool{"adopt: in the gap": true, "create: before": true}))
			qt.Check(t, qt.IsTrue(s.refuses(t)))
			s.wantChain(t, "deny*")
			qt.Check(t, qt.IsTrue(s.read(t).Protected()))
			qt.Check(t, qt.IsNotNil(s.unlink(t, deny)))
			s.attach(t, s.tracer(t, 1), dispatcher.Options{Name: "1"}) // there is room for others now
			s.wantRun(t, 1)
			s.detach(t, "deny")
			qt.Check(t, qt.IsFalse(s.refuses(t)))
		})
	}
}

// One that cannot become a member after all, when it is off already, is put back.
func TestAdoptExclusivePutBack(t *testing.T) {
	s := onHook(t, newScene(t), hook.CgroupConnect4)
	deny := testenv.VerdictProgram(t, "ldt_deny", testenv.CgroupDeny, s.on())
	s.linkless(t, deny, 0)
	intruder := testenv.VerdictProgram(t, "ldt_intruder", testenv.CgroupAllow, s.on())
	err := atEachStep(func() error {
		return s.tryAdopt(t, dispatcher.Options{}, nil)
	}, func(step string) {
		if step == "adopt: in the gap" {
			s.linkless(t, intruder, 0)
		}
	})
	qt.Assert(t, qt.IsNotNil(err))
	qt.Check(t, qt.IsTrue(s.refuses(t)), qt.Commentf("%v", err))
	members := s.read(t).Members
	qt.Assert(t, qt.HasLen(members, 1))
	qt.Check(t, qt.Equals(members[0].Program.ID, uint32(idOf(t, deny))))
	qt.Check(t, qt.HasLen(s.registry(t), 0))
}

// Connections meet the program all the time when it has company already.
func TestAdoptUnderConnects(t *testing.T) {
	s := newBusyLinkScene(t, hook.CgroupConnect4)
	deny := testenv.VerdictProgram(t, "ldt_deny", testenv.CgroupDeny, s.on())
	s.linkless(t, deny, unix.BPF_F_ALLOW_MULTI)
	k := s.knock(t)
	for range 20 {
		link := s.adopt(t, dispatcher.AdoptOptions{})
		s.linkless(t, deny, unix.BPF_F_ALLOW_MULTI) // and again
		qt.Assert(t, qt.IsNil(link.Detach(t.Context())))
	}
	soon(t, func() bool { return k.tried.Load() > 1000 })
	k.stop()
	t.Logf("%d calls of connect", k.tried.Load())
	qt.Check(t, qt.Equals(k.let.Load(), 0))
}
