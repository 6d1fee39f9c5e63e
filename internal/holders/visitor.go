package holders

import (
	"io"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/internal/procfs"
)

// visitor is a thread that enters other mount namespaces. For that it must have a root
// and a working directory of its own, and can never share the process's again. It
// waits for the next visit instead of ending, because children that were started on
// it may be killed when it ends (PR_SET_PDEATHSIG).
var visitor struct {
	sync.Mutex
	jobs chan func()
	err  error // why it cannot enter any namespace
}

// visit calls fn on a thread in the mount namespace of descriptor there. Then it
// brings the thread back to the namespace of descriptor home. An error means that fn
// was not called.
func visit(there, home int, fn func()) error {
	if there < 0 || home < 0 {
		return unix.EBADF
	}
	visitor.Lock()
	defer visitor.Unlock()
	if visitor.jobs == nil {
		visitor.jobs = make(chan func())
		ready := make(chan struct{})
		go receiveVisits(ready)
		<-ready
	}
	done := make(chan error)
	visitor.jobs <- func() {
		err := visitor.err
		if err == nil {
			err = unix.Setns(there, unix.CLONE_NEWNS)
		}
		if err == nil {
			fn()
			_ = unix.Setns(home, unix.CLONE_NEWNS) // without effect on the next visit
		}
		done <- err
	}
	return <-done
}

func receiveVisits(ready chan struct{}) {
	runtime.LockOSThread()
	if unix.Gettid() == os.Getpid() {
		// The first thread represents the process in /proc, so it must stay. While
		// this goroutine is locked to it the next one gets another thread.
		defer runtime.UnlockOSThread()
		other := make(chan struct{})
		go receiveVisits(other)
		<-other
		close(ready)
		return
	}
	visitor.err = unix.Unshare(unix.CLONE_FS)
	close(ready)
	for job := range visitor.jobs {
		job()
	}
}

// visitMounts calls fn for each mount of a namespace, on a thread that has entered
// the namespace; then prefix is empty. If the namespace cannot be entered the mounts
// are those that one of its tasks sees, and prefix leads this process there.
func (fs *filesystems) visitMounts(ns *mountNS, fn func(prefix string, m procfs.Mount)) {
	proc, ok := fs.open(unix.AT_FDCWD, "/proc", unix.O_PATH)
	if !ok {
		return
	}
	defer unix.Close(proc)
	err := visit(ns.fd, fs.spaces.list[0].fd, func() {
		// This /proc may not be mounted there, or not at this path.
		fd, ok := fs.open(proc, "thread-self/mountinfo", unix.O_RDONLY)
		if !ok {
			return
		}
		f := os.NewFile(uintptr(fd), "mountinfo")
		defer f.Close()
		text, _ := io.ReadAll(f)
		for _, m := range procfs.ParseMounts(string(text)) {
			fn("", m)
		}
	})
	for i := 0; err != nil && i < len(ns.tasks); i++ {
		var list []procfs.Mount
		list, err = procfs.Mounts(ns.tasks[i] + "/mountinfo")
		fs.ok(err)
		for _, m := range list {
			fn(rootOf(ns.tasks[i]), m)
		}
	}
}
