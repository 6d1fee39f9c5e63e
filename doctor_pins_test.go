package dispatcher_test

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
)

// dieAt has an app die at a step of an operation. What it did in the tries before, when it came to another one, is undone.
func (s *scene) dieAt(t testing.TB, step string, c command, undo func()) {
	t.Helper()
	for n := 1; ; n++ {
		a := newApp(t)
		c.DieAt = n
		got := a.try(t, s.command(c))
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
	s := newScene(t)
	keepApps(t)
	s.persistent(t, 1)
	two := command{Op: "attach", Member: "2", Program: idOf(t, s.tracer(t, 2, testenv.XDPPass)), Persistent: true}
	s.dieAt(t, "pin: it is held", two, func() {})
	found := s.wantFindings(t, "leftover drift", "unpinned note 2")
	mend(t, found[0])
	qt.Check(t, qt.Equals(found[0].Mend, "dispatcher --bpffs "+s.bpffs+" recover"))
	qt.Check(t, qt.StringContains(found[0].Text, s.bpffs+"/libdispatcher/tmp_"))
	s.mends(t, "empty drift 2") // what was in there had held it
	s.clear(t)

	s.persistent(t, 1)
	attach := func() { s.persistent(t, 2) }
	attach()
	s.dieAt(t, "unpin: before the rename", command{Op: "detach", Member: "2"}, func() {
		if s.read(t).Member("2") == nil {
			attach()
		}
	})
	s.mends(t, "orphan drift 2")
	s.wantChain(t, "1*")
	s.clear(t)

	// A chain that lost its last member by somebody who did not live to take it off.
	holder := s.attachIn(t, s.tracer(t, 3, testenv.XDPPass), dispatcher.Options{Name: "3"})
	s.dieAt(t, "swap: after", command{Op: "detach", Member: "3"}, func() {})
	found = s.mends(t, "closed drift")
	qt.Check(t, qt.Equals(found[0].Mend, fmt.Sprintf("dispatcher -n %s --bpffs %s detach xdp %s --all", s.target.NetNS, s.bpffs, s.ServerDev)))
	holder.Kill()
	s.wantFree(t)
}

// Moves that a process died at, at any step: the doctor finds them, or there is nothing to mend.
func TestDoctorMove(t *testing.T) {
	for _, h := range []hook.Hook{hook.TCXIngress, hook.CgroupConnect4} {
		t.Run(string(h), func(t *testing.T) {
			s := newLinkScene(t, h)
			keepApps(t)
			for _, n := range []int{1, 2, 3} {
				s.member(t, n)
			}
			moves := 0
			for n := 1; ; n++ {
				a := newApp(t)
				qt.Assert(t, qt.IsNil(a.do(t, s.command(command{Op: "open", Member: "3"}))))
				got := a.try(t, s.command(command{Op: "set", Settings: priority(5), DieAt: n}))
				a.Kill()
				if got.Died == "" {
					break
				}
				found := s.doctor(t)
				var checks []string
				for _, f := range found {
					checks = append(checks, f.Check)
				}
				if slices.Contains(checks, "move") {
					moves++
				}
				// Nothing is misread.
				for _, check := range checks {
					qt.Check(t, qt.IsTrue(slices.Contains([]string{"move", "leftover", "orphan", "record"}, check)), qt.Commentf("%s: %+v", got.Died, found))
				}
				if len(s.pinsLike(t, "move_"))+len(s.pinsLike(t, "tmp_"))+len(s.pinsLike(t, h.Family())) > 3 {
					qt.Check(t, qt.Not(qt.HasLen(checks, 0)), qt.Commentf("%s: %v", got.Died, s.pins(t)))
				}
				// The kernel frees links in its own time, so it may have to be done again.
				soon(t, func() bool { mend(t, s.doctor(t)...); return len(s.doctor(t)) == 0 })
				back := s.open(t, "3")
				qt.Assert(t, qt.IsNil(back.Set(t.Context(), priority(30))))
				qt.Assert(t, qt.IsNil(back.Close()))
			}
			qt.Check(t, qt.IsTrue(moves > 0))
			s.clear(t)
		})
	}
}

// Who still has the old link of a member that was moved keeps a pin, and there is nothing to mend.
func TestDoctorMoved(t *testing.T) {
	s := newLinkScene(t, hook.TCXIngress)
	s.member(t, 1)
	s.member(t, 2)
	held := s.open(t, "2")
	keepApps(t)
	for n, died := 1, ""; died != "move: at both places"; n++ {
		qt.Assert(t, qt.IsNil(held.Set(t.Context(), priority(20))))
		a := newApp(t)
		qt.Assert(t, qt.IsNil(a.do(t, s.command(command{Op: "open", Member: "2"}))))
		died = a.try(t, s.command(command{Op: "set", Settings: priority(5), DieAt: n})).Died
		a.Kill()
		qt.Assert(t, qt.Not(qt.Equals(died, "")))
	}
	mend(t, s.wantFindings(t, "move drift")...)
	s.wantFindings(t, "move note")
	qt.Assert(t, qt.IsNil(held.Close()))
	s.clear(t)
	s.wantFindings(t)
}

// pinsLike are the names in the library's folder that begin so.
func (s *scene) pinsLike(t testing.TB, prefix string) []string {
	t.Helper()
	return slices.DeleteFunc(s.pins(t), func(name string) bool { return !strings.HasPrefix(name, prefix) })
}

// Devices and cgroups that are gone.
func TestDoctorDefunct(t *testing.T) {
	s := newLinkScene(t, hook.TCXIngress)
	keepApps(t)
	x := s.onDevice(dispatcher.XDP(s.ServerDev).In(s.Server.Name))
	cgroup := testenv.NewCgroup(t)
	c := s.sameOn(hook.TCXIngress)
	c.scene, c.hook, c.cgroup = s.onDevice(dispatcher.On(hook.CgroupConnect4, cgroup.Path)), hook.CgroupConnect4, cgroup
	s.member(t, 1)
	x.persistent(t, 2)
	c.member(t, 3)
	held := s.attach(t, s.tracer(t, 4), dispatcher.Options{Name: "4"})

	s.Server.IP(t, "link", "del", s.ServerDev)
	cgroup.Remove(t)
	soon(t, func() bool { return len(s.doctor(t)) == 3 })
	found := s.wantFindings(t, "defunct drift", "defunct drift", "defunct drift")
	for i, text := range []string{"cgroup is gone, or the link was detached; the pins are left, of 3;", "device is gone, or the link was detached; the pins are left, of 1;", "device is gone, or the link was detached; the pins are left, of 2;"} {
		qt.Check(t, qt.StringContains(found[i].Text, text))
	}
	// Of what is not pinned there is nothing to mend.
	all, err := dispatcher.Doctor(t.Context(), s.look())
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.IsTrue(slices.ContainsFunc(all, func(f dispatcher.Finding) bool {
		return f.Check == "defunct" && f.Level == dispatcher.LevelNote && strings.HasSuffix(f.Text, ": 4")
	})))
	mend(t, found[0])
	qt.Check(t, qt.HasLen(slices.DeleteFunc(s.pins(t), func(name string) bool { return name == "registry" }), 0))
	qt.Assert(t, qt.IsNil(held.Close()))
}

// What somebody did to the pins by hand.
func TestDoctorPins(t *testing.T) {
	s := newLinkScene(t, hook.TCXIngress)
	keepApps(t)
	x := s.onDevice(dispatcher.XDP(s.ServerDev).In(s.Server.Name))
	x.persistent(t, 1)
	s.member(t, 1)
	dir := s.bpffs + "/libdispatcher"

	slot, err := filepath.Glob(dir + "/xdp_*/member_1/slot")
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.IsNil(os.Chmod(slot[0], 0o644)))
	qt.Assert(t, qt.IsNil(os.Chmod(dir, 0o755)))
	qt.Assert(t, qt.IsNil(os.Chown(filepath.Dir(slot[0]), 1000, 1000)))
	found := s.mends(t, "access drift", "access drift", "access drift")
	qt.Check(t, qt.DeepEquals([]string{found[0].Mend, found[1].Mend, found[2].Mend}, []string{
		"chmod 0700 " + dir, "chown root:root " + filepath.Dir(slot[0]), "chmod 0600 " + slot[0],
	}))
	for path, mode := range map[string]fs.FileMode{dir: 0o700, slot[0]: 0o600} {
		st, err := os.Stat(path)
		qt.Assert(t, qt.IsNil(err))
		qt.Check(t, qt.Equals(st.Mode().Perm(), mode))
	}

	// Nobody holds the link: only the maps are left, or the record.
	link, err := filepath.Glob(dir + "/tcx_*/member_1/link")
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.IsNil(os.Remove(link[0])))
	soon(t, func() bool { return len(s.read(t).Members) == 0 })
	s.mends(t, "orphan drift", "record note")
	qt.Check(t, qt.HasLen(s.registry(t), 0))

	// A process holds it.
	owner := newApp(t)
	qt.Assert(t, qt.IsNil(owner.do(t, s.command(command{Op: "attach", Member: "2", Maps: true, Persistent: true}))))
	link, err = filepath.Glob(dir + "/tcx_*/member_2/link")
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.IsNil(os.Remove(link[0])))
	found = s.wantFindings(t, "incomplete drift 2")
	qt.Check(t, qt.Equals(found[0].Mend, "rm -r "+filepath.Dir(link[0])))
	mend(t, found[0])
	s.wantFindings(t)
	s.clear(t)
	owner.Kill()

	// The root of a chain.
	open := x.open(t, "1")
	root, err := filepath.Glob(dir + "/xdp_*/root")
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.IsNil(os.Remove(root[0])))
	s.wantFindings(t, "incomplete drift")
	x.persistent(t, 2)
	s.wantFindings(t)
	qt.Assert(t, qt.IsNil(open.Close()))

	// Something else in its place.
	qt.Assert(t, qt.IsNil(os.Remove(root[0])))
	qt.Assert(t, qt.IsNil(s.tracer(t, 7).Pin(root[0])))
	soon(t, func() bool { return len(s.doctor(t)) == 1 })
	s.wantFindings(t, "unreadable drift")
	qt.Assert(t, qt.IsNil(os.RemoveAll(dir)))
}
