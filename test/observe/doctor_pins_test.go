package observe

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// dieAt has an app die at a step of an operation. What it did in the tries before, when it came to another one, is undone.
func dieAt(t testing.TB, s *scene.Scene, step string, c scene.Command, undo func()) {
	t.Helper()
	for n := 1; ; n++ {
		a := scene.NewApp(t)
		c.DieAt = n
		got := a.Try(t, s.Command(c))
		a.Kill()
		if got.Died == step {
			return
		}
		qt.Assert(t, qt.Not(qt.Equals(got.Died, "")), qt.Commentf("there is no step %q: %s", step, got.Error))
		undo()
	}
}

// What is left of processes that died at it.
func TestDoctorLeftovers(t *testing.T) {
	s := scene.New(t)
	keepApps(t)
	s.Member(t, 1)
	two := scene.Command{Op: "attach", Member: "2", Program: scene.ID(t, s.Tracer(t, 2, testenv.XDPPass)), Persistent: true}
	dieAt(t, s, "pin: it is held", two, func() {})
	found := wantFindings(t, s, "leftover drift", "unpinned note 2")
	mend(t, found[0])
	qt.Check(t, qt.Equals(found[0].Mend, "dispatcher --bpffs "+s.BPFFS+" recover"))
	qt.Check(t, qt.StringContains(found[0].Text, s.BPFFS+"/libdispatcher/tmp_"))
	mends(t, s, "empty drift 2") // what was in there had held it
	s.Clear(t)

	s.Member(t, 1)
	attach := func() { s.Member(t, 2) }
	attach()
	dieAt(t, s, "unpin: before the rename", scene.Command{Op: "detach", Member: "2"}, func() {
		if s.Read(t).Member("2") == nil {
			attach()
		}
	})
	mends(t, s, "orphan drift 2")
	s.WantChain(t, "1*")
	s.Clear(t)

	// A chain that lost its last member to a process that was killed before it took the chain off.
	holder := s.AttachIn(t, s.Tracer(t, 3, testenv.XDPPass), dispatcher.Options{Name: "3"})
	dieAt(t, s, "swap: after", scene.Command{Op: "detach", Member: "3"}, func() {})
	found = mends(t, s, "closed drift")
	qt.Check(t, qt.Equals(found[0].Mend, fmt.Sprintf("dispatcher -n %s --bpffs %s detach xdp %s --all", s.Target.NetNS, s.BPFFS, s.ServerDev)))
	holder.Kill()
	s.WantFree(t)
}

// Moves that a process died at, at any step: the doctor finds them, or there is nothing to mend.
func TestDoctorMove(t *testing.T) {
	for _, h := range []hook.Hook{hook.TCXIngress, hook.CgroupConnect4} {
		t.Run(string(h), func(t *testing.T) {
			s := scene.NewOn(t, h)
			keepApps(t)
			for _, n := range []int{1, 2, 3} {
				s.Member(t, n)
			}
			moves := 0
			for n := 1; ; n++ {
				a := scene.NewApp(t)
				qt.Assert(t, qt.IsNil(a.Do(t, s.Command(scene.Command{Op: "open", Member: "3"}))))
				got := a.Try(t, s.Command(scene.Command{Op: "set", Settings: scene.Priority(5), DieAt: n}))
				a.Kill()
				if got.Died == "" {
					break
				}
				found := doctor(t, s)
				var checks []string
				for _, f := range found {
					checks = append(checks, f.Check)
				}
				if slices.Contains(checks, "move") {
					moves++
				}
				// Nothing is misread.
				for _, check := range checks {
					qt.Check(t, qt.IsTrue(slices.Contains([]string{"move", "leftover", "orphan"}, check)), qt.Commentf("%s: %+v", got.Died, found))
				}
				if len(pinsLike(t, s, "move_"))+len(pinsLike(t, s, "tmp_"))+len(pinsLike(t, s, h.Family())) > 3 {
					qt.Check(t, qt.Not(qt.HasLen(checks, 0)), qt.Commentf("%s: %v", got.Died, s.Pins(t)))
				}
				// The kernel frees links in its own time, so it may have to be done again.
				scene.Soon(t, func() bool { mend(t, mendable(doctor(t, s))...); return len(doctor(t, s)) == 0 })
				back := s.Open(t, "3")
				qt.Assert(t, qt.IsNil(back.Set(t.Context(), scene.Priority(30))))
				qt.Assert(t, qt.IsNil(back.Close()))
			}
			qt.Check(t, qt.IsTrue(moves > 0))
			s.Clear(t)
		})
	}
}

// A process that still has the old link of a member that was moved keeps a pin, and there is nothing to mend.
func TestDoctorMoved(t *testing.T) {
	s := scene.NewOn(t, hook.TCXIngress)
	s.Member(t, 1)
	s.Member(t, 2)
	held := s.Open(t, "2")
	keepApps(t)
	for n, died := 1, ""; died != "move: at both places"; n++ {
		qt.Assert(t, qt.IsNil(held.Set(t.Context(), scene.Priority(20))))
		a := scene.NewApp(t)
		qt.Assert(t, qt.IsNil(a.Do(t, s.Command(scene.Command{Op: "open", Member: "2"}))))
		died = a.Try(t, s.Command(scene.Command{Op: "set", Settings: scene.Priority(5), DieAt: n})).Died
		a.Kill()
		qt.Assert(t, qt.Not(qt.Equals(died, "")))
	}
	mend(t, wantFindings(t, s, "move drift")...)
	wantFindings(t, s, "move note")
	qt.Assert(t, qt.IsNil(held.Close()))
	s.Clear(t)
	wantFindings(t, s)
}

// pinsLike are the names in the library's folder that begin so.
func pinsLike(t testing.TB, s *scene.Scene, prefix string) []string {
	t.Helper()
	return slices.DeleteFunc(s.Pins(t), func(name string) bool { return !strings.HasPrefix(name, prefix) })
}

// Devices and cgroups that are gone.
func TestDoctorDefunct(t *testing.T) {
	s := scene.NewOn(t, hook.TCXIngress)
	keepApps(t)
	x := s.OnDevice(dispatcher.XDP(s.ServerDev).In(s.Server.Name))
	cgroup := testenv.NewCgroup(t)
	c := s.OnDevice(dispatcher.On(hook.CgroupConnect4, cgroup.Path))
	s.Member(t, 1)
	x.Member(t, 2)
	c.Member(t, 3)
	held := s.Attach(t, s.Tracer(t, 4), dispatcher.Options{Name: "4"})

	s.Server.IP(t, "link", "del", s.ServerDev)
	cgroup.Remove(t)
	scene.Soon(t, func() bool { return len(doctor(t, s)) == 3 })
	found := wantFindings(t, s, "defunct drift", "defunct drift", "defunct drift")
	for i, text := range []string{"cgroup is gone, or the link was detached; the pins are left, of 3;", "device is gone, or the link was detached; the pins are left, of 1;", "device is gone, or the link was detached; the pins are left, of 2;"} {
		qt.Check(t, qt.StringContains(found[i].Text, text))
	}
	// Of what is not pinned there is nothing to mend.
	all, err := dispatcher.Doctor(t.Context(), s.Look())
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.IsTrue(slices.ContainsFunc(all, func(f hook.Finding) bool {
		return f.Check == "defunct" && f.Level == hook.LevelNote && strings.HasSuffix(f.Text, ": 4")
	})))
	mend(t, found[0])
	qt.Check(t, qt.HasLen(s.Pins(t), 0))
	qt.Assert(t, qt.IsNil(held.Close()))
}

// What somebody did to the pins by hand.
func TestDoctorPins(t *testing.T) {
	s := scene.NewOn(t, hook.TCXIngress)
	keepApps(t)
	x := s.OnDevice(dispatcher.XDP(s.ServerDev).In(s.Server.Name))
	x.Member(t, 1)
	s.Member(t, 1)
	dir := s.BPFFS + "/libdispatcher"

	slot, err := filepath.Glob(dir + "/xdp_*/member_1/slot")
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.IsNil(os.Chmod(slot[0], 0o644)))
	qt.Assert(t, qt.IsNil(os.Chmod(dir, 0o755)))
	qt.Assert(t, qt.IsNil(os.Chown(filepath.Dir(slot[0]), 1000, 1000)))
	found := mends(t, s, "access drift", "access drift", "access drift")
	qt.Check(t, qt.DeepEquals([]string{found[0].Mend, found[1].Mend, found[2].Mend}, []string{
		"chmod 0700 " + dir, "chown root:root " + filepath.Dir(slot[0]), "chmod 0600 " + slot[0],
	}))
	for path, mode := range map[string]fs.FileMode{dir: 0o700, slot[0]: 0o600} {
		st, err := os.Stat(path)
		qt.Assert(t, qt.IsNil(err))
		qt.Check(t, qt.Equals(st.Mode().Perm(), mode))
	}

	// No process holds the link: only the folder is left.
	link, err := filepath.Glob(dir + "/tcx_*/member_1/link")
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.IsNil(os.Remove(link[0])))
	scene.Soon(t, func() bool { return len(s.Read(t).Members) == 0 })
	mends(t, s, "orphan drift")

	// A process holds it.
	owner := scene.NewApp(t)
	qt.Assert(t, qt.IsNil(owner.Do(t, s.Command(scene.Command{Op: "attach", Member: "2", Maps: true, Persistent: true}))))
	link, err = filepath.Glob(dir + "/tcx_*/member_2/link")
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.IsNil(os.Remove(link[0])))
	found = wantFindings(t, s, "incomplete drift 2")
	qt.Check(t, qt.Equals(found[0].Mend, "rm -r "+filepath.Dir(link[0])))
	mend(t, found[0])
	wantFindings(t, s)
	s.Clear(t)
	owner.Kill()

	// The root of a chain.
	open := x.Open(t, "1")
	root, err := filepath.Glob(dir + "/xdp_*/root")
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.IsNil(os.Remove(root[0])))
	wantFindings(t, s, "incomplete drift")
	x.Member(t, 2)
	wantFindings(t, s)
	qt.Assert(t, qt.IsNil(open.Close()))

	// Something else in its place.
	qt.Assert(t, qt.IsNil(os.Remove(root[0])))
	qt.Assert(t, qt.IsNil(s.Tracer(t, 7).Pin(root[0])))
	scene.Soon(t, func() bool { return len(doctor(t, s)) == 1 })
	wantFindings(t, s, "unreadable drift")
	qt.Assert(t, qt.IsNil(os.RemoveAll(dir)))
}
