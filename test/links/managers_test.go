package links

import (
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// Whoever attached a program without a link meets these errors once it is adopted, and can attach another copy where it runs
// twice then. The plan of the adoption says so before, doctor finds it afterwards, and the way back restores it.
func TestAdoptForOthers(t *testing.T) {
	const override, multi = unix.BPF_F_ALLOW_OVERRIDE, unix.BPF_F_ALLOW_MULTI
	for _, tc := range []struct {
		name    string
		hook    hook.Hook
		flags   uint32
		effects string // parts, in their order
		off, on error  // of taking it off, and of attaching a copy
		back    bool   // by commands
	}{
		{"exclusive", hook.CgroupConnect4, 0, "no program runs|take it off any more (ENOENT), nor attach it again|cgroups below may have", unix.ENOENT, unix.EPERM, true},
		{"override", hook.CgroupConnect4, override, "no program runs|take it off any more (ENOENT), nor attach it again|which take its place now", unix.ENOENT, unix.EPERM, true},
		{"multi", hook.CgroupConnect4, multi, "(ENOENT); what it attaches again runs as well: twice", unix.ENOENT, nil, true},
		{"TCX", hook.TCXIngress, 0, "(EBUSY), nor attach it again (EEXIST); another copy", unix.EBUSY, nil, false},
		{"filter", hook.TCIngress, 0, "(preference 7) goes|", nil, nil, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			testenv.NeedHook(t, hook.TCXIngress)
			s := scene.NewOn(t, tc.hook)
			prog, twin := s.Tracer(t, 1), s.Tracer(t, 1)
			put := func(prog *ebpf.Program) error { return s.TryLinkless(t, prog, tc.flags) }
			if s.Filters() {
				put = func(prog *ebpf.Program) error { s.Filter(t, prog, "pref 7 handle 1 bpf da"); return nil }
			}
			qt.Assert(t, qt.IsNil(put(prog)))
			t.Cleanup(func() { _ = s.Unlink(t, prog) })
			o := s.AdoptOptions(t, dispatcher.AdoptOptions{Name: "adopted", Persistent: true}, prog)
			before := s.Read(t)
			plan, err := dispatcher.PlanAdopt(t.Context(), s.Target, o)
			qt.Assert(t, qt.IsNil(err))
			wantEffects(t, plan, tc.effects)
			qt.Check(t, qt.DeepEquals(s.Read(t), before))

			s.Adopt(t, o)
			member := s
			if s.Filters() {
				member = s.SameOn(hook.TCXIngress)
			} else {
				qt.Check(t, qt.ErrorIs(s.Unlink(t, prog), tc.off))
			}
			s.WantRun(t, 1)
			qt.Check(t, qt.HasLen(findTwice(t, member), 0))
			switch err := put(twin); {
			case tc.on != nil:
				qt.Check(t, qt.ErrorIs(err, tc.on))
				s.WantRun(t, 1)
			default:
				qt.Check(t, qt.IsNil(err))
				s.WantRun(t, 1, 1)
				found := findTwice(t, member)
				qt.Assert(t, qt.HasLen(found, 1))
				qt.Check(t, qt.Equals(found[0].Member, "adopted"))
				qt.Check(t, qt.StringContains(found[0].Mend, "detach "+string(member.Target.Hook)))
				if s.Filters() {
					s.NS().TC(t, "filter", "del", "dev", s.Dev(), s.Side())
				} else {
					qt.Assert(t, qt.IsNil(s.Unlink(t, twin)))
				}
			}
			goBack(t, member, plan)
			if tc.back {
				qt.Check(t, qt.Equals(s.Read(t).Members[0].Kind, hook.KindLegacy))
				s.WantRun(t, 1)
				if s.Filters() {
					s.NS().TC(t, "filter", "del", "dev", s.Dev(), s.Side())
				} else {
					qt.Assert(t, qt.IsNil(s.Unlink(t, prog)))
				}
			}
			s.WantRun(t)
		})
	}
}

// On XDP nothing that attaches by netlink gets past the link; without a link anything does.
func TestAdoptForOthersXDP(t *testing.T) {
	s := scene.NewOn(t, hook.XDP)
	prog := s.Tracer(t, 1)
	for _, noGap := range []bool{false, true} {
		s.AttachLegacy(t, prog)
		o := s.AdoptOptions(t, dispatcher.AdoptOptions{Name: "adopted", NoGap: noGap, Persistent: true}, nil)
		plan, err := dispatcher.PlanAdopt(t.Context(), s.Target, o)
		qt.Assert(t, qt.IsNil(err))
		if noGap {
			wantEffects(t, plan, "has no link")
		} else {
			wantEffects(t, plan, "unfiltered|all that attach by netlink get EBUSY")
		}
		s.Adopt(t, o)
		for _, fd := range []int{prog.FD(), -1} {
			err := s.SetXDP(t, fd, unix.XDP_FLAGS_DRV_MODE, 0)
			if noGap {
				qt.Check(t, qt.IsNil(err))
			} else {
				qt.Check(t, qt.ErrorIs(err, unix.EBUSY))
				s.WantRun(t, 1)
			}
		}
		if noGap { // it was taken off
			s.WantRun(t)
			s.Recover(t, dispatcher.RecoverOptions{})
			continue
		}
		goBack(t, s, plan)
		qt.Check(t, qt.Equals(s.Read(t).Members[0].Kind, hook.KindLegacy))
		s.Free(t)
	}
}

// What a program that is adopted takes the place of below is named, and runs beside it then.
func TestAdoptAboveOthers(t *testing.T) {
	s := scene.NewOn(t, hook.CgroupConnect4)
	above, below := s.Tracer(t, 1), s.Tracer(t, 2)
	s.Linkless(t, above, unix.BPF_F_ALLOW_OVERRIDE)
	child := s.Cgroup.Child(t, "child")
	in := s.OnDevice(dispatcher.On(hook.CgroupConnect4, child.Path))
	in.Cgroup, in.Resident = child, child.Enter(t, s.Client)
	in.Linkless(t, below, unix.BPF_F_ALLOW_OVERRIDE)
	in.WantRun(t, 2)
	plan, err := dispatcher.PlanAdopt(t.Context(), s.Target, s.AdoptOptions(t, dispatcher.AdoptOptions{}, above))
	qt.Assert(t, qt.IsNil(err))
	wantEffects(t, plan, "no program runs|nor attach it again|also in "+child.Path)
	s.Adopt(t, s.AdoptOptions(t, dispatcher.AdoptOptions{}, above))
	in.WantRun(t, 2, 1)
	_, err = dispatcher.PlanAdopt(t.Context(), in.Target, in.AdoptOptions(t, dispatcher.AdoptOptions{NoGap: true}, below))
	qt.Check(t, qt.ErrorIs(err, ebpf.ErrNotSupported))
}

func wantEffects(t testing.TB, plan *hook.Adoption, parts string) {
	t.Helper()
	want := strings.Split(strings.TrimSuffix(parts, "|"), "|")
	qt.Assert(t, qt.HasLen(plan.Effects, len(want)), qt.Commentf("%q", plan.Effects))
	for i, part := range want {
		qt.Check(t, qt.StringContains(plan.Effects[i], part))
	}
}

// goBack goes the way back of an adoption. The library detaches in the place of the command, which need not be built.
func goBack(t testing.TB, s *scene.Scene, plan *hook.Adoption) {
	t.Helper()
	for _, line := range plan.Back {
		if strings.HasPrefix(line, "dispatcher ") {
			qt.Check(t, qt.Equals(line, kernel.Command(s.Target.NetNS, s.BPFFS, nil, "detach", string(s.Target.Hook), s.Target.Name(), "adopted")))
			s.Detach(t, "adopted")
			continue
		}
		out, err := exec.Command("sh", "-c", line).CombinedOutput()
		qt.Assert(t, qt.IsNil(err), qt.Commentf("%s: %s", line, out))
	}
}

func findTwice(t testing.TB, s *scene.Scene) []hook.Finding {
	t.Helper()
	found, err := dispatcher.Doctor(t.Context(), s.Look())
	qt.Assert(t, qt.IsNil(err))
	return slices.DeleteFunc(found, func(f hook.Finding) bool {
		return f.Check != "twice" || f.Level == hook.LevelOK || f.Target != s.Target.Name()
	})
}
