package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

func TestDemo(t *testing.T) {
	testenv.CheckLeaks(t)
	cmd := exec.Command("dispatcher", "demo")
	out, err := cmd.CombinedOutput()
	transcript := string(out)
	if err != nil {
		t.Fatalf("%v\n%s", err, transcript)
	}
	for act := 1; act <= 16; act++ {
		qt.Check(t, qt.StringContains(transcript, fmt.Sprintf("== %d. ", act)))
	}
	qt.Check(t, qt.IsFalse(strings.Contains(transcript, "FAILED")))
	qt.Check(t, qt.StringContains(transcript, "Can't replace active BPF XDP link"))
	end := "\nAll 16 acts went as they should"
	if !testenv.Has(t, testenv.FeatureTCX) {
		qt.Check(t, qt.StringContains(transcript, "\nNOT HERE  TCX, which came with Linux 6.6"))
		end = "\nOf 16 acts 1 could not be played on this machine, 2 could only in part; the others went as they should"
	}
	qt.Check(t, qt.StringContains(transcript, end))
	qt.Check(t, qt.IsFalse(strings.Contains(transcript, "\x1b")), qt.Commentf("no colour but on a terminal"))
	demoGone(t, cmd.Process.Pid)
}

func TestDemoInterrupted(t *testing.T) {
	for name, test := range map[string]struct {
		line string // the line of the transcript after which the demo is interrupted
		want string
	}{
		"while members are held": {"== 3.", "dispatcher: the demo was interrupted in act 3\n"},
		"in the flood":           {"# for i in", "dispatcher: the demo was interrupted in act 5\n"},
		"with a cgroup":          {"you have reached 10.66.0.3", "dispatcher: the demo was interrupted in act 12\n"},
	} {
		t.Run(name, func(t *testing.T) {
			testenv.CheckLeaks(t)
			cmd := exec.Command("dispatcher", "demo")
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			stdout, err := cmd.StdoutPipe()
			qt.Assert(t, qt.IsNil(err))
			qt.Assert(t, qt.IsNil(cmd.Start()))
			t.Cleanup(func() { _ = cmd.Process.Kill() })

			r := bufio.NewReader(stdout)
			for line := ""; !strings.HasPrefix(line, test.line); {
				line, err = r.ReadString('\n')
				qt.Assert(t, qt.IsNil(err), qt.Commentf("stderr: %s", &stderr))
			}
			qt.Assert(t, qt.IsNil(cmd.Process.Signal(syscall.SIGINT)))
			rest, err := io.ReadAll(r)
			qt.Assert(t, qt.IsNil(err))
			var exit *exec.ExitError
			qt.Assert(t, qt.ErrorAs(cmd.Wait(), &exit))
			qt.Check(t, qt.Equals(exit.ExitCode(), statusFailed))
			qt.Check(t, qt.Equals(stderr.String(), test.want))
			qt.Check(t, qt.StringContains(string(rest), "ok  nothing is left"))
			demoGone(t, cmd.Process.Pid)
		})
	}
}

// A reader that goes away is no reason to leave anything behind.
func TestDemoWithoutReader(t *testing.T) {
	testenv.CheckLeaks(t)
	cmd := exec.Command("dispatcher", "demo")
	stdout, err := cmd.StdoutPipe()
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.IsNil(cmd.Start()))
	_, err = bufio.NewReader(stdout).ReadString('\n')
	qt.Assert(t, qt.IsNil(err))
	stdout.Close()
	var exit *exec.ExitError
	qt.Assert(t, qt.ErrorAs(cmd.Wait(), &exit))
	qt.Check(t, qt.Equals(exit.ExitCode(), statusFailed))
	demoGone(t, cmd.Process.Pid)
}

// Without the privileges, or without ip, the demo does not begin.
func TestDemoNotReady(t *testing.T) {
	testenv.Require(t)
	for name, test := range map[string]struct {
		command []string
		want    string
	}{
		"no capabilities": {
			[]string{"setpriv", "--bounding-set=-all", "dispatcher", "demo"},
			"dispatcher: missing CAP_NET_ADMIN and CAP_SYS_ADMIN; run the demo as root\n",
		},
		"no tc": {
			[]string{"env", "PATH=" + only(t, "ip"), dispatcherPath(t), "demo"},
			"dispatcher: the demo needs the command tc of iproute2; install the package iproute2 (Debian, Alpine, Arch) or iproute-tc (Fedora, RHEL)\n",
		},
		"no ip": {
			[]string{"env", "PATH=/nonexistent", dispatcherPath(t), "demo"},
			"dispatcher: the demo needs the command ip of iproute2; install the package iproute2 (Debian, Alpine, Arch) or iproute (Fedora, RHEL)\n",
		},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := exec.Command(test.command[0], test.command[1:]...).CombinedOutput()
			var exit *exec.ExitError
			qt.Assert(t, qt.ErrorAs(err, &exit))
			qt.Check(t, qt.Equals(exit.ExitCode(), statusFailed))
			qt.Check(t, qt.Equals(string(out), test.want))
		})
	}
}

// only returns a folder with one command in it.
func only(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	qt.Assert(t, qt.IsNil(err))
	dir := t.TempDir()
	qt.Assert(t, qt.IsNil(os.Symlink(path, filepath.Join(dir, name))))
	return dir
}

func dispatcherPath(t *testing.T) string {
	t.Helper()
	path, err := exec.LookPath("dispatcher")
	qt.Assert(t, qt.IsNil(err))
	return path
}

// demoGone checks what the process made and CheckLeaks does not know.
func demoGone(t *testing.T, pid int) {
	t.Helper()
	name := fmt.Sprintf("ld-demo-%d", pid)
	paths := []string{"/run/netns/" + name + "-client", "/run/netns/" + name + "-server", filepath.Join(os.TempDir(), name)}
	if root, err := kernel.CgroupRoot(); err == nil {
		paths = append(paths, filepath.Join(root, name))
	}
	for _, path := range paths {
		_, err := os.Lstat(path)
		qt.Check(t, qt.ErrorIs(err, os.ErrNotExist), qt.Commentf(path))
	}
	// Every process that the demo starts has the demo's name in its command
	// line.
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	qt.Check(t, qt.IsNil(err))
	for _, path := range lines {
		line, err := os.ReadFile(path)
		if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, syscall.ESRCH) {
			t.Error(err)
		}
		qt.Check(t, qt.IsFalse(bytes.Contains(line, []byte(name+"-"))), qt.Commentf("process %s", path))
	}
}
