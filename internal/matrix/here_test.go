package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/internal/procfs"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// The check changes the namespaces of its process, so it runs in another process
// than the test.
func TestMain(m *testing.M) {
	if os.Getenv("MATRIX_TEST") == "here" {
		if err := hereCommand(context.Background(), nil); err != nil {
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// Where the other tests run, the demo runs too. The check leaves nothing behind.
func TestHere(t *testing.T) {
	testenv.CheckLeaks(t)
	mounts := mountsOfOthers(t)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "MATRIX_TEST=here")
	out, err := cmd.CombinedOutput()
	qt.Check(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(string(out), ""))
	qt.Check(t, qt.DeepEquals(mountsOfOthers(t), mounts))
}

// mountsOfOthers are the points of all mounts, without those of the tests that run beside this one.
func mountsOfOthers(t *testing.T) (points []string) {
	t.Helper()
	all, err := procfs.Mounts("/proc/self/mountinfo")
	qt.Assert(t, qt.IsNil(err))
	for _, m := range all {
		if !strings.Contains(m.Point, "/ldt-") && m.Point != "/run/netns" {
			points = append(points, m.Point)
		}
	}
	return points
}

func TestBecause(t *testing.T) {
	for _, test := range []struct {
		err  error
		want string
	}{
		{unix.EPERM, "cannot mount, although this is root: a container, or the kernel's policy, does not allow it .*"},
		{fmt.Errorf("mount: %w", syscall.EACCES), "cannot mount, although this is root: .*"},
		{unix.ENOSYS, "cannot mount: this kernel was built without what it needs .*"},
		{unix.ENODEV, "cannot mount: this kernel was built without what it needs .*"},
		{ebpf.ErrNotSupported, "cannot mount: this kernel was built without what it needs .*"},
		{errors.New("disk full"), "cannot mount: disk full"},
	} {
		qt.Check(t, qt.ErrorMatches(explain("mount", test.err), test.want))
	}
}
