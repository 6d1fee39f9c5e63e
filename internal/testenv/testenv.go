// Package testenv gives tests a small network of their own: namespaces joined by a veth pair, a private
// bpffs, cgroups with processes, packets that really travel, programs that report what they saw, helper
// processes that can be killed, and a final check that nothing was left behind.
//
// It is for tests only. Everything it makes is named ldt-<pid>-<n> or ldt_*, belongs to one test and
// ends with it. The root network namespace is never touched. No test is skipped for lack of privileges:
// it fails and says what is missing.
//
// A test begins with [CheckLeaks], or with [Require] if leaks are not its subject:
//
//	func TestDrop(t *testing.T) {
//		testenv.CheckLeaks(t)
//		pair := testenv.NewPair(t)
//		drop := testenv.DropUDPPort(t, "ldt_drop", 7000)
//		pair.Server.Do(t, func() { ... attach drop to pair.ServerIfindex ... })
//		qt.Assert(t, qt.Equals(pair.Passed(t, 7000, 10), 0))
//	}
package testenv

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// Require fails the test unless it can do what the project's tests do: act as root with CAP_SYS_ADMIN
// and load an XDP program. It also says that this process is at work, see [work], and removes what killed
// test processes left behind.
func Require(t testing.TB) {
	t.Helper()
	beginWork(t)
	if err := usable(); err != nil {
		t.Fatalf("this test needs root and BPF: %v", err)
	}
}

var usable = sync.OnceValue(func() error {
	if uid := os.Geteuid(); uid != 0 {
		return fmt.Errorf("running as uid %d; run the tests with sudo", uid)
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	if err := unix.Capget(&hdr, &caps[0]); err != nil {
		return fmt.Errorf("read capabilities: %w", err)
	}
	if caps[0].Effective&(1<<unix.CAP_SYS_ADMIN) == 0 {
		return errors.New("root without CAP_SYS_ADMIN; run outside of a restricted container")
	}
	kernel.RaiseMemlock() // as users are told to do
	probe, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type:         ebpf.XDP,
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, XDPPass), asm.Return()},
		License:      license,
	})
	if err != nil {
		return fmt.Errorf("the kernel refuses to load an XDP program: %w", err)
	}
	probe.Close()
	return sweep()
})

// work is a lock that test processes on this machine share. A process has it from the first test that
// needs it to the last, so that it knows whether others run beside it: see [alone].
var work struct {
	sync.Mutex
	users int
	lock  *os.File
}

const workFile = "/run/libdispatcher-tests.lock"

func beginWork(t testing.TB) {
	t.Helper()
	work.Lock()
	defer work.Unlock()
	if work.users == 0 {
		lock, err := os.OpenFile(workFile, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			t.Fatalf("this test needs root: %v", err)
		}
		if err := flock(lock, unix.LOCK_SH); err != nil {
			lock.Close()
			t.Fatalf("lock %s: %v", workFile, err)
		}
		work.lock = lock
	}
	work.users++
	t.Cleanup(func() {
		work.Lock()
		defer work.Unlock()
		if work.users--; work.users == 0 {
			work.lock.Close()
		}
	})
}

// alone tells whether no other test process of this project is at work now.
func alone() bool {
	work.Lock()
	defer work.Unlock()
	err := flock(work.lock, unix.LOCK_EX|unix.LOCK_NB)
	return flock(work.lock, unix.LOCK_SH) == nil && err == nil
}

func flock(f *os.File, how int) error {
	for {
		if err := unix.Flock(int(f.Fd()), how); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// sweep removes the namespaces, mounts and cgroups of test processes that no longer exist.
func sweep() error {
	type place struct {
		folder string
		remove func(path string) error
	}
	places := []place{{kernel.NetNSDir, removeNetNS}, {os.TempDir(), removeBPFFS}}
	if root, err := cgroupRoot(); err == nil {
		places = append(places, place{root, removeCgroup})
	}
	var errs []error
	for _, place := range places {
		found, _ := filepath.Glob(filepath.Join(place.folder, prefix+"*"))
		for _, path := range found {
			var pid int
			if _, err := fmt.Sscanf(filepath.Base(path), prefix+"%d-", &pid); err != nil {
				continue
			}
			if err := unix.Kill(pid, 0); errors.Is(err, unix.ESRCH) {
				errs = append(errs, place.remove(path))
			}
		}
	}
	return errors.Join(errs...)
}
