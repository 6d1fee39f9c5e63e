package observe

import (
	"context"
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

	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// keepApps makes apps outlive the doctor: an app is killed when the thread that started it ends, and threads that were in
// another namespace end when the doctor has done with them.
func keepApps(t testing.TB) {
	runtime.LockOSThread()
	t.Cleanup(runtime.UnlockOSThread)
}

// doctor returns what the doctor finds in the state of the scene, but for the checks that found nothing. The bpffs is also named
// in what it finds on hooks of others.
func doctor(t testing.TB, s *scene.Scene) []hook.Finding {
	t.Helper()
	found, err := dispatcher.Doctor(t.Context(), s.Look())
	qt.Assert(t, qt.IsNil(err))
	return slices.DeleteFunc(found, func(f hook.Finding) bool {
		ours := f.Hook == "" && strings.Contains(f.Text+f.Mend, s.BPFFS) || f.NetNS.Name == s.Target.NetNS && f.NetNS.Name != "" ||
			f.Hook.OnCgroup() && f.Target == s.Target.Cgroup
		return f.Level == hook.LevelOK || !ours || f.Check == "bpffs"
	})
}

// wantFindings compares what the doctor finds with a summary, one line each: check, level, member. It returns the findings.
func wantFindings(t testing.TB, s *scene.Scene, want ...string) []hook.Finding {
	t.Helper()
	found := doctor(t, s)
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
func mend(t testing.TB, found ...hook.Finding) {
	t.Helper()
	bin := t.TempDir()
	if slices.ContainsFunc(found, func(f hook.Finding) bool {
		return strings.HasPrefix(f.Mend, "dispatcher") && !strings.HasSuffix(f.Mend, "recover")
	}) {
		out, err := exec.Command("go", "build", "-o", bin, "../../cmd/dispatcher").CombinedOutput()
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
func mends(t testing.TB, s *scene.Scene, want ...string) []hook.Finding {
	t.Helper()
	found := wantFindings(t, s, want...)
	mend(t, mendable(found)...)
	wantFindings(t, s)
	return found
}

// mendable are the findings with a command.
func mendable(found []hook.Finding) []hook.Finding {
	return slices.DeleteFunc(slices.Clone(found), func(f hook.Finding) bool { return f.Mend == "" })
}

// All is well, and is the same afterwards.
func TestDoctorChangesNothing(t *testing.T) {
	s := scene.NewOn(t, hook.TCXIngress)
	x := s.OnDevice(dispatcher.XDP(s.ServerDev).In(s.Server.Name))
	x.Member(t, 1)
	owned := x.Attach(t, x.Tracer(t, 2, testenv.XDPPass), dispatcher.Options{})
	for n := range 3 {
		s.Member(t, n+1)
	}
	before, chain, links := allPins(t, s), x.Read(t), s.Read(t)
	wantFindings(t, s)
	qt.Check(t, qt.DeepEquals(allPins(t, s), before))
	qt.Check(t, qt.DeepEquals(x.Read(t), chain))
	qt.Check(t, qt.DeepEquals(s.Read(t), links))

	// All checks are there, each with a text.
	found, err := dispatcher.Doctor(t.Context(), s.Look())
	qt.Assert(t, qt.IsNil(err))
	for _, f := range found {
		qt.Check(t, qt.IsTrue(f.Check != "" && f.Text != ""), qt.Commentf("%+v", f))
		qt.Check(t, qt.IsTrue(f.Level != hook.LevelOK || f.Mend == ""), qt.Commentf("%+v", f))
	}
	qt.Assert(t, qt.IsNil(owned.Close()))
	x.Clear(t)
	s.Clear(t)
}

// allPins are the paths and modes of all there is in the bpffs.
func allPins(t testing.TB, s *scene.Scene) (all []string) {
	t.Helper()
	err := filepath.WalkDir(s.BPFFS, func(path string, d fs.DirEntry, err error) error {
		if err == nil {
			info, infoErr := d.Info()
			all, err = append(all, fmt.Sprintf("%v %s %v", info.Mode(), path, info.ModTime())), infoErr
		}
		return err
	})
	qt.Assert(t, qt.IsNil(err))
	return all
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
	s := scene.New(t)
	var found []hook.Finding
	qt.Assert(t, qt.IsNil(json.Unmarshal([]byte(testenv.StartHelper(t, "weak", s.BPFFS).Expect(t, "found")), &found)))
	levels := map[string]hook.Level{}
	for _, f := range found {
		if levels[f.Check] != hook.LevelBroken {
			levels[f.Check] = f.Level
		}
	}
	qt.Check(t, qt.Equals(levels["capabilities"], hook.LevelBroken))
	qt.Check(t, qt.Equals(levels["features"], hook.LevelNote))
	qt.Check(t, qt.Equals(levels["unreadable"], hook.LevelBroken))
}

func TestDoctorMachine(t *testing.T) {
	s := scene.New(t).WithoutBPFFS(t)
	found, err := dispatcher.Doctor(t.Context(), s.Look())
	qt.Assert(t, qt.IsNil(err))
	by := map[string]hook.Finding{}
	for _, f := range found {
		by[f.Check] = f
	}
	qt.Check(t, qt.Equals(by["bpffs"].Level, hook.LevelNote))
	qt.Check(t, qt.Equals(by["bpffs"].Mend, "mount -t bpf -o mode=0700 bpffs "+s.BPFFS))
	qt.Check(t, qt.Equals(by["capabilities"].Level, hook.LevelOK))
	features, err := dispatcher.Features(t.Context(), dispatcher.Target{}, s.Look())
	qt.Assert(t, qt.IsNil(err))
	for _, f := range features {
		if f.Name != "bpffs" {
			qt.Check(t, qt.Equals(by["feature-"+f.Name].Level == hook.LevelOK, f.Supported), qt.Commentf("%s", f.Name))
		}
	}

	// The end of the context is an error.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = dispatcher.Doctor(ctx, s.Look())
	qt.Check(t, qt.IsTrue(errors.Is(err, context.Canceled)), qt.Commentf("%v", err))
}
