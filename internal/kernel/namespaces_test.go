package kernel_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// The helper "headless" ends the first thread, so it must run there.
func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) {
	testenv.RegisterHelper("sleep", func([]string) {
		fmt.Println("ready")
		io.Copy(io.Discard, os.Stdin)
	})
	testenv.RegisterHelper("headless", func([]string) {
		ready := make(chan struct{})
		var linger func()
		linger = func() {
			runtime.LockOSThread()
			if unix.Gettid() == os.Getpid() {
				go linger()
				<-ready
				unix.Syscall(unix.SYS_EXIT, 0, 0, 0) // this thread alone
			}
			fmt.Println("tid", unix.Gettid())
			close(ready)
			io.Copy(io.Discard, os.Stdin)
			os.Exit(0)
		}
		linger()
	})
	testenv.Main(m)
}

func stat(t *testing.T, path string) unix.Stat_t {
	t.Helper()
	var st unix.Stat_t
	qt.Assert(t, qt.IsNil(unix.Stat(path, &st)), qt.Commentf("%s", path))
	return st
}

// find returns what NetNamespaces says about the namespace with that inode; nil if it is not found. It
// checks all that NetNamespaces returns.
func find(t *testing.T, ino uint64) *hook.NetNS {
	t.Helper()
	all, err := kernel.NetNamespaces()
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(all[0].ID().Name, ""))
	qt.Check(t, qt.Equals(all[0].ID().Inode, inode(t, "/proc/thread-self/ns/net")))
	var found *hook.NetNS
	seen := map[uint64]bool{}
	for _, ns := range all {
		id := ns.ID()
		qt.Check(t, qt.IsFalse(seen[id.Inode]))
		seen[id.Inode] = true
		qt.Check(t, qt.IsNil(ns.Do(func() error { return nil })))
		if id.Inode == ino {
			found = &id
		}
		qt.Check(t, qt.IsNil(ns.Close()))
	}
	return found
}

// wantFound checks that the namespace is found under that name, and that the name leads to it.
func wantFound(t *testing.T, ino uint64, name string) {
	t.Helper()
	id := find(t, ino)
	qt.Assert(t, qt.IsNotNil(id))
	qt.Check(t, qt.Equals(id.Name, name))
	ns, err := kernel.OpenNetNS(id.Name)
	qt.Assert(t, qt.IsNil(err))
	defer ns.Close()
	qt.Check(t, qt.Equals(ns.ID(), hook.NetNS{Inode: ino, Cookie: id.Cookie}))
	qt.Check(t, qt.Equals(id.Cookie != 0, testenv.Has(t, testenv.FeatureNetNSCookie)))
}

func TestNetNamespaces(t *testing.T) {
	testenv.CheckLeaks(t)
	ns := testenv.NewNetNS(t)
	ino := inode(t, ns.Path())

	// A name comes first, then a process, then what a process has open.
	var holder *testenv.Proc
	ns.Do(t, func() { holder = testenv.StartHelper(t, "sleep") })
	holder.Expect(t, "ready")
	file, err := os.Open(ns.Path())
	qt.Assert(t, qt.IsNil(err))
	defer file.Close()
	wantFound(t, ino, ns.Name)

	qt.Assert(t, qt.IsNil(ns.Delete()))
	wantFound(t, ino, fmt.Sprintf("/proc/%d/ns/net", holder.Pid))

	holder.Kill()
	wantFound(t, ino, fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), file.Fd()))

	file.Close()
	qt.Assert(t, qt.IsNil(find(t, ino)))
}

func TestNetNamespaceOfThread(t *testing.T) {
	testenv.CheckLeaks(t)
	thread, end := make(chan int), make(chan struct{})
	defer close(end)
	var unshare func()
	unshare = func() {
		runtime.LockOSThread() // and never unlock: Go ends the thread
		if unix.Gettid() == os.Getpid() {
			go unshare() // not the first thread, which is the process
		} else if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			close(thread)
		} else {
			thread <- unix.Gettid()
		}
		<-end
	}
	go unshare()
	path := fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), <-thread)
	wantFound(t, inode(t, path), path)
}

// The first thread of a process may end before the others.
func TestNetNamespaceOfHeadlessProcess(t *testing.T) {
	testenv.CheckLeaks(t)
	ns := testenv.NewNetNS(t)
	var holder *testenv.Proc
	ns.Do(t, func() { holder = testenv.StartHelper(t, "headless") })
	pid := holder.Pid
	tid := holder.Expect(t, "tid")
	ino := inode(t, ns.Path())
	qt.Assert(t, qt.IsNil(ns.Delete()))
	for start := time.Now(); ; time.Sleep(time.Millisecond) {
		if _, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid)); err != nil {
			break
		}
		qt.Assert(t, qt.IsTrue(time.Since(start) < 5*time.Second))
	}
	id := find(t, ino)
	qt.Assert(t, qt.IsNotNil(id))
	qt.Assert(t, qt.IsTrue(strings.HasPrefix(id.Name, fmt.Sprintf("/proc/%d/task/", pid))), qt.Commentf("%s, tid %s", id.Name, tid))
}

func TestNetNamespaceMounted(t *testing.T) {
	testenv.CheckLeaks(t)
	ns := testenv.NewNetNS(t)
	ino := inode(t, ns.Path())
	point := filepath.Join(t.TempDir(), "a mount")
	qt.Assert(t, qt.IsNil(os.WriteFile(point, nil, 0o600)))

	// The mount is in the mount namespace of another process.
	sh := exec.Command("sh", "-c", `mount --bind "$0" "$1" && echo ready && read end`, ns.Path(), point)
	sh.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	stdin, err := sh.StdinPipe()
	qt.Assert(t, qt.IsNil(err))
	stdout, err := sh.StdoutPipe()
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.IsNil(sh.Start()))
	defer sh.Wait()
	defer stdin.Close()
	line, _ := bufio.NewReader(stdout).ReadString('\n')
	qt.Assert(t, qt.Equals(line, "ready\n"))
	qt.Assert(t, qt.IsNil(ns.Delete()))
	wantFound(t, ino, fmt.Sprintf("/proc/%d/root%s", sh.Process.Pid, point))

	// The mount is in our own mount namespace: the path works without the process.
	qt.Assert(t, qt.IsNil(unix.Mount(fmt.Sprintf("/proc/%d/root%s", sh.Process.Pid, point), point, "", unix.MS_BIND, "")))
	wantFound(t, ino, point)
	qt.Assert(t, qt.IsNil(unix.Unmount(point, unix.MNT_DETACH)))
}

// A namespace that is gone is not listed, and processes that end meanwhile do no harm.
func TestNetNamespacesVanish(t *testing.T) {
	testenv.CheckLeaks(t)
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-end:
				return
			default:
			}
			cmd := exec.Command("true")
			cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS}
			if err := cmd.Run(); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	for range 100 {
		find(t, 0)
	}
	close(end)
	<-ended
}

func TestFindNetNS(t *testing.T) {
	testenv.CheckLeaks(t)
	ns := testenv.NewNetNS(t)
	ino := inode(t, ns.Path())
	found, err := kernel.FindNetNS(func(ns *kernel.NetNS) error {
		if ns.ID().Inode != ino {
			return fs.ErrNotExist
		}
		return nil
	})
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.Equals(found.ID().Name, ns.Name))
	qt.Assert(t, qt.IsNil(found.Do(func() error { return nil })))

	// A name does not change the identity.
	found.Release()
	qt.Assert(t, qt.Equals(found.FD(), -1))
	qt.Assert(t, qt.IsNil(found.Do(func() error { return nil })))
	qt.Assert(t, qt.IsNil(ns.Delete()))
	qt.Assert(t, qt.ErrorIs(found.Do(func() error { return nil }), kernel.ErrNetNSGone))

	_, err = kernel.FindNetNS(func(*kernel.NetNS) error { return fs.ErrNotExist })
	qt.Assert(t, qt.ErrorIs(err, fs.ErrNotExist))
	// One that could not be looked at may be the one.
	_, err = kernel.FindNetNS(func(*kernel.NetNS) error { return unix.EPERM })
	qt.Assert(t, qt.ErrorIs(err, unix.EPERM))
	qt.Assert(t, qt.Not(qt.ErrorIs(err, fs.ErrNotExist)))
}

// A process that can open no more files does not take a namespace for gone, nor a list of them for whole.
func TestNetNSWithoutFiles(t *testing.T) {
	testenv.CheckLeaks(t)
	ns := testenv.NewNetNS(t)
	opened, err := kernel.OpenNetNS(ns.Name)
	qt.Assert(t, qt.IsNil(err))
	opened.Release()
	emfile := func(err error) {
		qt.Check(t, qt.IsTrue(err == nil || errors.Is(err, unix.EMFILE)), qt.Commentf("%v", err))
	}
	testenv.EachLimit(t, func() error { return opened.Do(func() error { return nil }) }, emfile)
	testenv.EachLimit(t, func() error {
		all, err := kernel.NetNamespaces()
		for _, ns := range all {
			ns.Close()
		}
		if err == nil {
			i := slices.IndexFunc(all, func(found *kernel.NetNS) bool { return found.ID().Inode == opened.ID().Inode })
			qt.Assert(t, qt.IsTrue(i >= 0), qt.Commentf("it is not among %d", len(all)))
			qt.Check(t, qt.Equals(all[i].ID().Cookie, opened.ID().Cookie))
		}
		return err
	}, emfile)
}
