package holders_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/holders"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// processes are descriptors by pid, in the form that a test compares.
func processes(h *hook.Holders) map[int][]int {
	m := map[int][]int{}
	for _, p := range h.Processes {
		m[p.PID] = p.FDs
	}
	return m
}

func TestProcess(t *testing.T) {
	testenv.CheckLeaks(t)
	p := newHolder(t)
	var fd int
	ref := newLink(t, func(ref hook.HolderRef) { fd = p.ask("open link %d", ref.ID) })
	h := complete(t, ref)
	qt.Assert(t, qt.DeepEquals(processes(h), map[int][]int{p.Pid: {fd}}))
	qt.Check(t, qt.Equals(h.Counted, 1))
	exe, err := os.Executable()
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(h.Processes[0].Exe, exe))
	qt.Check(t, qt.Equals(h.Processes[0].Comm, "exe"))
}

// The executable of a process in another mount namespace is named by a path that leads to it from here.
func TestExecutableElsewhere(t *testing.T) {
	testenv.CheckLeaks(t)
	p, dir := isolated(t), t.TempDir()
	p.do("tmpfs %s", dir)
	p.do("touch %s/sleep", dir)
	p.do("bind /bin/sleep %s/sleep", dir)
	ref := newLink(t, func(ref hook.HolderRef) {
		fd := p.ask("open link %d", ref.ID)
		p.ask("fork %d %s/sleep", fd, dir)
		p.do("close %d", fd)
	})
	h := complete(t, ref)
	qt.Assert(t, qt.HasLen(h.Processes, 1))
	qt.Check(t, qt.Equals(h.Processes[0].Exe, fmt.Sprintf("/proc/%d/root%s/sleep", h.Processes[0].PID, dir)))
	_, err := os.Stat(h.Processes[0].Exe)
	qt.Check(t, qt.IsNil(err))
}

// Two processes have one open file, and one of them has it twice.
func TestShared(t *testing.T) {
	testenv.CheckLeaks(t)
	p := newHolder(t)
	var fd, again, child int
	ref := newLink(t, func(ref hook.HolderRef) {
		fd = p.ask("open link %d", ref.ID)
		again = p.ask("dup %d", fd)
		child = p.ask("fork %d", fd)
	})
	h := complete(t, ref)
	qt.Check(t, qt.DeepEquals(processes(h), map[int][]int{p.Pid: {min(fd, again), max(fd, again)}, child: {3}}))
	qt.Check(t, qt.Equals(h.Files, 1))
	qt.Check(t, qt.Equals(h.Counted, 1))
}

func TestSeparate(t *testing.T) {
	testenv.CheckLeaks(t)
	p, q := newHolder(t), newHolder(t)
	ref := newLink(t, func(ref hook.HolderRef) {
		p.ask("open link %d", ref.ID)
		p.ask("open link %d", ref.ID)
		q.ask("open link %d", ref.ID)
	})
	h := complete(t, ref)
	qt.Check(t, qt.HasLen(h.Processes, 2))
	qt.Check(t, qt.Equals(h.Files, 3))
	qt.Check(t, qt.Equals(h.Counted, 3))
}

func TestThread(t *testing.T) {
	testenv.CheckLeaks(t)
	p := newHolder(t)
	var tid int
	ref := newLink(t, func(ref hook.HolderRef) { tid = p.ask("thread link %d", ref.ID) })
	h := complete(t, ref)
	qt.Assert(t, qt.HasLen(h.Processes, 1))
	qt.Check(t, qt.Equals(h.Processes[0].PID, p.Pid))
	qt.Check(t, qt.Equals(h.Processes[0].TID, tid))
}

func TestSelf(t *testing.T) {
	testenv.CheckLeaks(t)
	p := newHolder(t)
	ref := newLink(t, func(ref hook.HolderRef) {
		p.ask("open link %d", ref.ID)
		own := open("link", strconv.Itoa(int(ref.ID)))
		defer unix.Close(own)

		h := complete(t, ref)
		qt.Check(t, qt.HasLen(h.Processes, 1)) // neither newLink nor own counts
		qt.Check(t, qt.Equals(h.Counted, 1))

		f := holders.Open(holders.Options{Self: true})
		defer f.Close()
		view, err := f.Look(hook.HolderLink)
		qt.Assert(t, qt.IsNil(err))
		h, err = view.Of(ref)
		qt.Assert(t, qt.IsNil(err))
		qt.Check(t, qt.HasLen(h.Processes, 2))
		qt.Check(t, qt.Equals(h.Counted, 3))
		qt.Check(t, qt.IsTrue(h.Verified))
	})
	qt.Check(t, qt.HasLen(complete(t, ref).Processes, 1))
}

func TestNamespaces(t *testing.T) {
	testenv.CheckLeaks(t)
	p := isolated(t)
	var fd int
	ref := newLink(t, func(ref hook.HolderRef) { fd = p.ask("open link %d", ref.ID) })
	h := complete(t, ref)
	qt.Assert(t, qt.DeepEquals(processes(h), map[int][]int{p.Pid: {fd}}))
	for _, ns := range []struct {
		name  string
		inode uint64
	}{{"pid", h.Processes[0].PIDNS}, {"mnt", h.Processes[0].MountNS}} {
		own, err := os.Readlink("/proc/self/ns/" + ns.name)
		qt.Assert(t, qt.IsNil(err))
		its, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", p.Pid, ns.name))
		qt.Assert(t, qt.IsNil(err))
		qt.Check(t, qt.Not(qt.Equals(its, own)))
		qt.Check(t, qt.Equals(its, fmt.Sprintf("%s:[%d]", ns.name, ns.inode)))
	}
}

// The kernel counts a descriptor in a message, but it cannot be found.
func TestInFlight(t *testing.T) {
	testenv.CheckLeaks(t)
	p := newHolder(t)
	ref := newLink(t, func(ref hook.HolderRef) {
		p.ask("open link %d", ref.ID)
		p.do("send %d", p.ask("open link %d", ref.ID))
	})
	h := look(t, ref)
	qt.Check(t, qt.Equals(h.Counted, 2))
	qt.Check(t, qt.Equals(h.Found, 1))
	qt.Check(t, qt.IsFalse(h.Verified))
	qt.Check(t, qt.StringContains(h.Missing, "1 of 2 references not found"))
	qt.Check(t, qt.StringContains(h.Missing, "descriptors in the queue of its socket"))
	qt.Assert(t, qt.HasLen(h.Suspects, 1))
	qt.Check(t, qt.Equals(h.Suspects[0].PID, p.Pid))
}

func TestRing(t *testing.T) {
	testenv.CheckLeaks(t)
	p := newHolder(t)
	ref := newLink(t, func(ref hook.HolderRef) { p.do("ring %d", p.ask("open link %d", ref.ID)) })
	h := look(t, ref)
	qt.Check(t, qt.Equals(h.Counted, 1))
	qt.Check(t, qt.Equals(h.Found, 0))
	qt.Assert(t, qt.HasLen(h.Suspects, 1))
	qt.Check(t, qt.Equals(h.Suspects[0].PID, p.Pid))
	qt.Check(t, qt.StringContains(h.Missing, "registered in its io_uring"))
}

func TestGone(t *testing.T) {
	testenv.CheckLeaks(t)
	ref := newLink(t, func(hook.HolderRef) {})
	for _, o := range []holders.Options{{}, {NoIterators: true}} {
		f := holders.Open(o)
		defer f.Close()
		var err error
		for range 20 { // the kernel frees a cgroup's link a little later
			var view *holders.View
			view, err = f.Look(hook.HolderLink)
			qt.Assert(t, qt.IsNil(err))
			if _, err = view.Of(ref); err != nil {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
	}
}

// A search that can open no more files is an error, and never says that nobody holds the
// object.
func TestExhausted(t *testing.T) {
	testenv.CheckLeaks(t)
	p := newHolder(t)
	dir := testenv.BPFFS(t)
	ref := newLink(t, func(ref hook.HolderRef) {
		p.ask("open link %d", ref.ID)
		p.do("mkdir %s/a", dir)
		p.do("pin link %d %s/a/one", ref.ID, dir)
	})
	for _, o := range []holders.Options{{}, {NoIterators: true}} {
		f := holders.Open(o)
		defer f.Close()
		var h *hook.Holders
		testenv.EachLimit(t, func() error {
			view, err := f.Look(hook.HolderLink)
			if err == nil {
				h, err = view.Of(ref)
			}
			return err
		}, func(err error) {
			qt.Check(t, qt.IsTrue(err == nil || errors.Is(err, unix.EMFILE)), qt.Commentf("%v", err))
		})
		qt.Check(t, qt.HasLen(h.Processes, 1))
		qt.Check(t, qt.HasLen(h.Pins, 1))
	}
}

// Without privileges the answer says what is missing.
func TestUnprivileged(t *testing.T) {
	testenv.CheckLeaks(t)
	var found int
	var missing string
	newLink(t, func(ref hook.HolderRef) {
		p := testenv.StartHelper(t, "unprivileged", strconv.Itoa(int(ref.ID)))
		found, missing = number(p.Expect(t, "found")), p.Expect(t, "missing")
		qt.Check(t, qt.IsNil(p.Wait()))
	})
	qt.Check(t, qt.Equals(found, 1))
	qt.Check(t, qt.StringContains(missing, "it is not known how many references the kernel counts"))
	qt.Check(t, qt.StringContains(missing, "run it as root"))
}

func unprivilegedHelper(args []string) {
	open("link", args[0])
	must(syscall.Setuid(65534))
	must(unix.Prctl(unix.PR_SET_DUMPABLE, 1, 0, 0, 0)) // else the process may not read its own /proc
	f := holders.Open(holders.Options{Self: true})
	defer f.Close()
	view, err := f.Look(hook.HolderLink)
	must(err)
	h, err := view.Of(hook.HolderRef{Kind: hook.HolderLink, ID: uint32(number(args[0]))})
	must(err)
	fmt.Println("found", h.Found)
	fmt.Println("missing", h.Missing)
}
