package dispatcher_test

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// keepApps makes apps outlive the doctor: an app is killed when the thread that started it ends, and threads that were in
// another namespace end when the doctor has done with them.
func keepApps(t testing.TB) {
	runtime.LockOSThread()
	t.Cleanup(runtime.UnlockOSThread)
}

// doctor returns what the doctor finds in the state of the scene, but for the checks that found nothing.
func (s *scene) doctor(t testing.TB) []dispatcher.Finding {
	t.Helper()
	found, err := dispatcher.Doctor(t.Context(), s.look())
	qt.Assert(t, qt.IsNil(err))
	return slices.DeleteFunc(found, func(f dispatcher.Finding) bool {
		ours := strings.Contains(f.Text+f.Mend, s.bpffs) || f.NetNS.Name == s.target.NetNS && f.NetNS.Name != "" ||
			f.Hook.OnCgroup() && f.Target == s.target.Cgroup
		return f.Level == dispatcher.LevelOK || !ours || f.Check == "bpffs"
	})
}

// wantFindings compares what the doctor finds with a summary, one line each: check, level, member. It returns the findings.
func (s *scene) wantFindings(t testing.TB, want ...string) []dispatcher.Finding {
	t.Helper()
	found := s.doctor(t)
	var got []string
	for _, f := range found {
		got = append(got, strings.TrimSpace(fmt.Sprintf("%s %s %s", f.Check, f.Level, f.Member)))
		qt.Check(t, qt.IsFalse(strings.Contains(f.Text+f.Mend, "\n")))
	}
	if !slices.Equal(got, want) {
		t.Fatalf("found %q, want %q:\n%+v", got, want, found)
	}
	return found
}

// mend runs the commands of findings, with the command as it is built now.
func mend(t testing.TB, found ...dispatcher.Finding) {
	t.Helper()
	bin := t.TempDir()
	if slices.ContainsFunc(found, func(f dispatcher.Finding) bool {
		return strings.HasPrefix(f.Mend, "dispatcher") && !strings.HasSuffix(f.Mend, "recover")
	}) {
		out, err := exec.Command("go", "build", "-o", bin, "./cmd/dispatcher").CombinedOutput()
		qt.Assert(t, qt.IsNil(err), qt.Commentf("%s", out))
	}
	for _, f := range found {
		qt.Assert(t, qt.Not(qt.Equals(f.Mend, "")), qt.Commentf("%s", f.Text))
		if words := strings.Fields(f.Mend); words[len(words)-1] == "recover" { // of which the verb is a thin layer
			_, err := dispatcher.Recover(t.Context(), dispatcher.RecoverOptions{BPFFS: words[2]})
			qt.Assert(t, qt.IsNil(err))
			continue
		}
		cmd := exec.Command("sh", "-c", f.Mend)
		cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"))
		out, err := cmd.CombinedOutput()
		qt.Assert(t, qt.IsNil(err), qt.Commentf("%s\n%s", f.Mend, out))
	}
}

// mends checks that those are the findings and that their commands do away with them, and with all others.
func (s *scene) mends(t testing.TB, want ...string) []dispatcher.Finding {
	t.Helper()
	found := s.wantFindings(t, want...)
	mend(t, slices.DeleteFunc(slices.Clone(found), func(f dispatcher.Finding) bool { return f.Mend == "" })...)
	s.wantFindings(t)
	return found
}

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

func (s *scene) persistent(t testing.TB, number int) {
	t.Helper()
	link := s.attach(t, s.tracer(t, number, testenv.XDPPass), dispatcher.Options{Name: fmt.Sprint(number), Settings: priority(10 * number), Persistent: true})
	qt.Assert(t, qt.IsNil(link.Close()))
}

// All is well, and is the same afterwards.
func TestDoctorChangesNothing(t *testing.T) {
	s := newLinkScene(t, hook.TCXIngress)
	x := s.onDevice(dispatcher.XDP(s.ServerDev).In(s.Server.Name))
	x.persistent(t, 1)
	owned := x.attach(t, s.scene.tracer(t, 2, testenv.XDPPass), dispatcher.Options{})
	for n := range 3 {
		s.member(t, n+1)
	}
	before, chain, links, records := s.allPins(t), x.read(t), s.read(t), s.registry(t)
	s.wantFindings(t)
	qt.Check(t, qt.DeepEquals(s.allPins(t), before))
	qt.Check(t, qt.DeepEquals(x.read(t), chain))
	qt.Check(t, qt.DeepEquals(s.read(t), links))
	qt.Check(t, qt.DeepEquals(s.registry(t), records))

	// All checks are there, each with a text.
	found, err := dispatcher.Doctor(t.Context(), s.look())
	qt.Assert(t, qt.IsNil(err))
	for _, f := range found {
		qt.Check(t, qt.IsTrue(f.Check != "" && f.Text != ""), qt.Commentf("%+v", f))
		qt.Check(t, qt.IsTrue(f.Level != dispatcher.LevelOK || f.Mend == ""), qt.Commentf("%+v", f))
	}
	qt.Assert(t, qt.IsNil(owned.Close()))
	x.clear(t)
	s.clear(t)
}

// allPins are the paths and modes of all there is in the bpffs.
func (s *scene) allPins(t testing.TB) (all []string) {
	t.Helper()
	err := filepath.WalkDir(s.bpffs, func(path string, d fs.DirEntry, err error) error {
		if err == nil {
			info, infoErr := d.Info()
			all, err = append(all, fmt.Sprintf("%v %s %v", info.Mode(), path, info.ModTime())), infoErr
		}
		return err
	})
	qt.Assert(t, qt.IsNil(err))
	return all
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

func TestDoctorRegistry(t *testing.T) {
	s := newLinkScene(t, hook.TCXIngress)
	s.member(t, 1)
	s.member(t, 2)
	s.member(t, 3)
	records := s.registry(t)
	link := map[string]uint32{}
	for _, m := range s.read(t).Members {
		link[m.Name] = m.LinkID
	}
	put := func(id uint32, record []byte) {
		t.Helper()
		m, err := ebpf.LoadPinnedMap(s.registryPath(), nil)
		qt.Assert(t, qt.IsNil(err))
		defer m.Close()
		if record == nil {
			qt.Assert(t, qt.IsNil(m.Delete(id)))
		} else {
			qt.Assert(t, qt.IsNil(m.Put(id, record)))
		}
	}

	// Whoever else may write to it gives a member another priority: byte 8 of the record.
	changed := slices.Clone(records[link["1"]])
	changed[8] = 90
	put(link["1"], changed)
	found := s.wantFindings(t, "order drift 1")
	qt.Check(t, qt.Equals(found[0].Mend, fmt.Sprintf("dispatcher -n %s --bpffs %s set tcx/ingress %s 1 --priority 90", s.target.NetNS, s.bpffs, s.ServerDev)))
	qt.Check(t, qt.StringContains(found[0].Text, "the order is 1 (90), 2 (20), 3 (30)"))
	mend(t, found...)
	s.wantFindings(t)
	s.wantRun(t, 2, 3, 1)

	// A record that is gone, and one that is none.
	put(link["3"], nil)
	s.mends(t, "priority note 3")
	s.wantRun(t, 2, 3, 1)
	put(link["2"], make([]byte, len(records[link["2"]])))
	s.wantFindings(t, "registry drift", "priority note 2")
	put(link["2"], records[link["2"]])
	s.wantFindings(t)

	// Something else in its place.
	qt.Assert(t, qt.IsNil(os.Remove(s.registryPath())))
	qt.Assert(t, qt.IsNil(s.tracer(t, 7).Pin(s.registryPath())))
	s.wantFindings(t, "registry drift", "priority note 2", "priority note 3", "priority note 1")
	mend(t, s.doctor(t)[0])
	s.wantFindings(t, "priority note 2", "priority note 3", "priority note 1")

	// One of a later version is for that version.
	later, err := ebpf.NewMap(&ebpf.MapSpec{Name: "ld_registry", Type: ebpf.Hash, KeySize: 4, ValueSize: 999, MaxEntries: 1})
	qt.Assert(t, qt.IsNil(err))
	defer later.Close()
	qt.Assert(t, qt.IsNil(later.Pin(s.registryPath())))
	found = s.doctor(t)
	qt.Check(t, qt.StringContains(found[0].Text, "of another version"))
	qt.Check(t, qt.Equals(found[0].Mend, ""))
	qt.Assert(t, qt.IsNil(os.Remove(s.registryPath())))
	s.clear(t)
}

// What is before the members.
func TestDoctorInFront(t *testing.T) {
	for _, h := range []hook.Hook{hook.TCXIngress, hook.CgroupConnect4} {
		t.Run(string(h), func(t *testing.T) {
			s := newLinkScene(t, h)
			s.member(t, 1)
			id := s.foreign(t, testenv.VerdictProgram(t, "ldt_other", s.goOn(), s.on()), kernel.Before(0, false))
			found := s.wantFindings(t, "in-front note")
			qt.Check(t, qt.StringContains(found[0].Text, fmt.Sprintf("link:%d (foreign, program ldt_other)", id)))
			s.clear(t)
		})
	}
}

// Members whose owner is gone.
func TestDoctorEmpty(t *testing.T) {
	s := newScene(t)
	keepApps(t)
	s.persistent(t, 1)
	open := s.attachIn(t, s.tracer(t, 2, testenv.XDPPass), dispatcher.Options{Name: "2"})
	door := s.attachIn(t, s.tracer(t, 3, testenv.XDPPass), dispatcher.Options{Name: "3", Settings: hook.Settings{OnMissing: hook.MissingDrop}})
	s.wantFindings(t)
	open.Kill()
	door.Kill()
	soon(t, func() bool { return s.drops(t) })
	found := s.wantFindings(t, "empty drift 2", "empty broken 3")
	qt.Check(t, qt.Equals(found[1].Mend, fmt.Sprintf("dispatcher -n %s --bpffs %s detach xdp %s 3", s.target.NetNS, s.bpffs, s.ServerDev)))
	mend(t, found[1])
	qt.Check(t, qt.IsFalse(s.drops(t)))
	s.wantFindings(t) // the change left the other one out
	s.clear(t)
}

func TestDoctorUnprotected(t *testing.T) {
	s := newScene(t)
	s.attachLegacy(t, s.tracer(t, 1, testenv.XDPPass))
	s.wantFindings(t) // not ours: no drift
	link, err := dispatcher.Adopt(t.Context(), s.target, dispatcher.AdoptOptions{NoGap: true, Options: dispatcher.Options{Name: "1", Persistent: true, BPFFS: s.bpffs}})
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.IsNil(link.Close()))
	s.mends(t, "unprotected drift")
	qt.Check(t, qt.IsTrue(s.read(t).Protected()))
	s.clear(t)
}

func TestDoctorTailCalls(t *testing.T) {
	s := newScene(t)
	s.attach(t, s.tracer(t, 1, testenv.XDPPass), dispatcher.Options{Name: "1", Settings: priority(1)})
	s.join(t, file("tailcall.o", "ldt_entry"), dispatcher.Options{Name: "jumper"})
	s.wantFindings(t) // the last one may do what it likes
	s.attach(t, s.tracer(t, 2, testenv.XDPPass), dispatcher.Options{Name: "2", Settings: hook.Settings{OnMissing: hook.MissingDrop}})
	found := s.wantFindings(t, "tail-calls note jumper")
	qt.Check(t, qt.StringContains(found[0].Text, "33 are allowed for a packet and the chain needs 3, so when its own are more than 30,"))
	qt.Check(t, qt.IsTrue(strings.HasSuffix(found[0].Text, ": 2 (drop)")))
	s.clear(t)
}

// Descriptions that this version cannot read.
func TestDoctorUnreadable(t *testing.T) {
	s := newScene(t)
	for version, text := range map[uint32]string{0: "damaged chain description", 2: "of version 2, this program knows up to 1"} {
		value := binary.NativeEndian.AppendUint32(binary.NativeEndian.AppendUint32(nil, 0x6c646331), version)
		m, err := ebpf.NewMap(&ebpf.MapSpec{
			Name: "ld_chain", Type: ebpf.Array, KeySize: 4, ValueSize: 4640, MaxEntries: 1, Flags: unix.BPF_F_RDONLY_PROG,
			Contents: []ebpf.MapKV{{Key: uint32(0), Value: append(value, make([]byte, 4640-len(value))...)}},
		})
		qt.Assert(t, qt.IsNil(err))
		defer m.Close()
		qt.Assert(t, qt.IsNil(m.Freeze()))
		spec := testenv.VerdictSpec("libdispatcher", testenv.XDPPass)
		prog, err := ebpf.NewProgram(spec)
		qt.Assert(t, qt.IsNil(err))
		defer prog.Close()
		qt.Assert(t, qt.IsNil(prog.BindMap(m)))
		s.attachLegacy(t, prog)
		found := s.wantFindings(t, "unreadable drift")
		qt.Check(t, qt.StringContains(found[0].Text, text))
		qt.Check(t, qt.Equals(found[0].Target, s.ServerDev))
		s.Server.IP(t, "link", "set", "dev", s.ServerDev, "xdp", "off")
	}
	s.wantFindings(t)
}

// Whoever made the link that a chain was put into may put another program into it.
func TestDoctorDisplaced(t *testing.T) {
	s := newScene(t)
	var theirs link.Link
	s.Server.Do(t, func() {
		var err error
		theirs, err = link.AttachXDP(link.XDPOptions{Program: s.tracer(t, 1, testenv.XDPPass), Interface: s.ServerIfindex})
		qt.Assert(t, qt.IsNil(err))
	})
	t.Cleanup(func() { theirs.Close() })
	info, err := theirs.Info()
	qt.Assert(t, qt.IsNil(err))
	adopted, err := dispatcher.AdoptLink(t.Context(), uint32(info.ID), dispatcher.AdoptOptions{Options: dispatcher.Options{Name: "1", Persistent: true, BPFFS: s.bpffs}})
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.IsNil(adopted.Close()))
	s.wantFindings(t)
	qt.Assert(t, qt.IsNil(theirs.Update(s.tracer(t, 2, testenv.XDPPass))))
	s.wantFindings(t, "displaced broken 1")
	qt.Assert(t, qt.IsNil(os.RemoveAll(s.bpffs+"/libdispatcher")))
	qt.Assert(t, qt.IsNil(theirs.Close()))
}

func init() {
	// weak is the doctor without capabilities.
	testenv.RegisterHelper("weak", func(args []string) {
		hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		runtime.LockOSThread() // capabilities are a thread's
		if err := unix.Capset(&hdr, &none[0]); err != nil {
			panic(err)
		}
		found, err := dispatcher.Doctor(context.Background(), dispatcher.ReadOptions{BPFFS: args[0]})
		if err != nil {
			panic(err)
		}
		fmt.Print("found ")
		_ = json.NewEncoder(os.Stdout).Encode(found)
	})
}

// Without capabilities the doctor says which, and what it cannot see.
func TestDoctorWeak(t *testing.T) {
	s := newScene(t)
	var found []dispatcher.Finding
	qt.Assert(t, qt.IsNil(json.Unmarshal([]byte(testenv.StartHelper(t, "weak", s.bpffs).Expect(t, "found")), &found)))
	levels := map[string]dispatcher.Level{}
	for _, f := range found {
		if levels[f.Check] != dispatcher.LevelBroken {
			levels[f.Check] = f.Level
		}
	}
	qt.Check(t, qt.Equals(levels["capabilities"], dispatcher.LevelBroken))
	qt.Check(t, qt.Equals(levels["features"], dispatcher.LevelNote))
	qt.Check(t, qt.Equals(levels["unreadable"], dispatcher.LevelBroken))
}

func TestDoctorMachine(t *testing.T) {
	s := newScene(t).withoutBPFFS(t)
	found, err := dispatcher.Doctor(t.Context(), s.look())
	qt.Assert(t, qt.IsNil(err))
	by := map[string]dispatcher.Finding{}
	for _, f := range found {
		by[f.Check] = f
	}
	qt.Check(t, qt.Equals(by["bpffs"].Level, dispatcher.LevelNote))
	qt.Check(t, qt.Equals(by["bpffs"].Mend, "mount -t bpf -o mode=0700 bpffs "+s.bpffs))
	qt.Check(t, qt.Equals(by["capabilities"].Level, dispatcher.LevelOK))
	features, err := dispatcher.Features(t.Context(), dispatcher.Target{}, s.look())
	qt.Assert(t, qt.IsNil(err))
	for _, f := range features {
		if f.Name != "bpffs" {
			qt.Check(t, qt.Equals(by["feature-"+f.Name].Level == dispatcher.LevelOK, f.Supported), qt.Commentf("%s", f.Name))
		}
	}

	// The end of the context is an error.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = dispatcher.Doctor(ctx, s.look())
	qt.Check(t, qt.IsTrue(errors.Is(err, context.Canceled)), qt.Commentf("%v", err))
}
