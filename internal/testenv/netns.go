package testenv

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/internal/kernel"
)

const prefix = "ldt-"

var serial atomic.Int64

// uniqueName returns a name that contains the pid, so that [sweep] can find what a killed process
// left behind.
func uniqueName() string {
	return fmt.Sprintf("%s%d-%d", prefix, os.Getpid(), serial.Add(1))
}

// NetNS is a named network namespace, as `ip netns add` makes it.
type NetNS struct {
	Name string
}

// NewNetNS creates a network namespace with its loopback device up. The namespace ends
// with the test.
func NewNetNS(t testing.TB) *NetNS {
	t.Helper()
	Require(t)
	ns := &NetNS{Name: uniqueName()}
	if _, err := ip("", "netns", "add", ns.Name); err != nil {
		t.Fatalf("create netns: %v", err)
	}
	t.Cleanup(func() {
		if err := ns.Delete(); err != nil {
			t.Errorf("delete netns %s: %v", ns.Name, err)
		}
	})
	ns.IP(t, "link", "set", "lo", "up")
	return ns
}

// Path returns the file that names the namespace.
func (ns *NetNS) Path() string {
	return filepath.Join(kernel.NetNSDir, ns.Name)
}

// Delete removes the name. The kernel destroys the namespace and its devices soon afterwards, unless
// something else still uses it. Deleting it again does nothing.
func (ns *NetNS) Delete() error {
	return removeNetNS(ns.Path())
}

func removeNetNS(path string) error {
	// EINVAL: not a mount point, as after an interrupted `ip netns add`.
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && err != unix.EINVAL && err != unix.ENOENT {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Do calls fn inside the namespace and fails the test when it cannot. Like [NetNS.Run] it stays on the
// test's goroutine, so fn may call t.Fatal.
func (ns *NetNS) Do(t testing.TB, fn func()) {
	t.Helper()
	if err := ns.Run(func() error { fn(); return nil }); err != nil {
		t.Fatal(err)
	}
}

// Run calls fn on this goroutine with its thread inside the namespace, and returns fn's error.
// Sockets opened and processes started by fn belong to the namespace for good; goroutines started
// by fn do not.
func (ns *NetNS) Run(fn func() error) (err error) {
	runtime.LockOSThread()
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer home.Close()
	if err := setNetNS(ns.Path()); err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer func() {
		// If the thread cannot return it stays locked: the runtime then ends it with this
		// goroutine and runs no other code on it.
		if back := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); back != nil {
			err = errors.Join(err, fmt.Errorf("leave netns %s: %w", ns.Name, back))
			return
		}
		runtime.UnlockOSThread()
	}()
	return fn()
}

func setNetNS(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("enter netns: %w", err)
	}
	defer f.Close()
	if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter netns %s: %w", path, err)
	}
	return nil
}

// IP runs `ip -n NAME args...` and returns what it prints. An error fails the test.
func (ns *NetNS) IP(t testing.TB, args ...string) string {
	t.Helper()
	out, err := ns.TryIP(args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TryIP runs `ip -n NAME args...` and returns what it prints. The error contains ip's
// message.
func (ns *NetNS) TryIP(args ...string) (string, error) {
	return ip("", append([]string{"-n", ns.Name}, args...)...)
}

// TC runs `tc -n NAME args...` and returns what it prints. An error fails the test.
func (ns *NetNS) TC(t testing.TB, args ...string) string {
	t.Helper()
	out, err := run("", "tc", append([]string{"-n", ns.Name}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// batch runs several ip commands in the namespace with one process.
func (ns *NetNS) batch(t testing.TB, commands ...string) {
	t.Helper()
	if _, err := ip(strings.Join(commands, "\n"), "-n", ns.Name, "-batch", "-"); err != nil {
		t.Fatal(err)
	}
}

func ip(stdin string, args ...string) (string, error) { return run(stdin, "ip", args...) }

func run(stdin, tool string, args ...string) (string, error) {
	cmd := exec.Command(tool, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s %s: %w: %s", tool, strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}
