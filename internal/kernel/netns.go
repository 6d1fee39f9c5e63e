package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
)

// NetNSDir is the folder of the names that "ip netns" gives.
const NetNSDir = "/run/netns"

// A NetNS is a network namespace. While it is open the namespace stays.
type NetNS struct {
	spec string
	file *os.File // nil once released
	id   hook.NetNS
}

// ErrNetNSGone: the namespace is no longer found where it was.
var ErrNetNSGone = errors.New("the network namespace is gone")

// OpenNetNS opens the namespace that spec names: a name as in "ip netns", a
// path, or a process id. Empty gives the namespace of the calling thread.
// The caller closes it.
func OpenNetNS(spec string) (*NetNS, error) {
	path := netnsPath(spec)
	ns, err := openNetNS(path)
	if errors.Is(err, fs.ErrNotExist) && spec != "" {
		return nil, hook.Because(fs.ErrNotExist, "there is no network namespace %q (looked at %s)", spec, path)
	}
	if err != nil {
		return nil, err
	}
	ns.spec = spec
	if err := ns.identify(); err != nil {
		ns.Close()
		return nil, err
	}
	return ns, nil
}

// netnsPath returns the file of the namespace that spec names.
func netnsPath(spec string) string {
	switch pid, err := strconv.Atoi(spec); {
	case spec == "":
		return "/proc/thread-self/ns/net"
	case strings.Contains(spec, "/"):
		return spec
	case err == nil && pid > 0:
		return fmt.Sprintf("/proc/%d/ns/net", pid)
	}
	return filepath.Join(NetNSDir, spec)
}

// openNetNS opens the namespace that is the file at path. Its id has the inode only.
func openNetNS(path string) (*NetNS, error) {
	// O_NONBLOCK, because opening a pipe waits for a writer.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("network namespace: %w", Explain(err))
	}
	kind, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE)
	if err != nil || kind != unix.CLONE_NEWNET {
		f.Close()
		return nil, hook.Because(hook.ErrUsage, "%s is not a network namespace", path)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		f.Close()
		return nil, fmt.Errorf("network namespace %s: %w", path, err)
	}
	return &NetNS{spec: path, file: f, id: hook.NetNS{Inode: st.Ino}}, nil
}

// identify completes the id; for this it enters the namespace.
func (ns *NetNS) identify() error {
	return ns.Do(func() (err error) {
		ns.id.Cookie, err = cookie()
		return err
	})
}

// InNetNS runs fn in the namespace that spec names, see [OpenNetNS] and [NetNS.Do].
func InNetNS(spec string, fn func() error) error {
	ns, err := OpenNetNS(spec)
	if err != nil {
		return err
	}
	defer ns.Close()
	return ns.Do(fn)
}

// ID identifies the namespace. It has a Name if [NetNamespaces] found the namespace.
func (ns *NetNS) ID() hook.NetNS { return ns.id }

// FD is the descriptor of the namespace, -1 after Release. It is valid as long as ns
// is open.
func (ns *NetNS) FD() int {
	if ns.file == nil {
		return -1
	}
	return int(ns.file.Fd())
}

// Close releases the namespace.
func (ns *NetNS) Close() error {
	if ns.file == nil {
		return nil
	}
	return ns.file.Close()
}

// Release closes the namespace, so that the kernel can remove it with all its
// devices when nothing else uses it. Do opens it again as OpenNetNS did, if it is
// still there.
func (ns *NetNS) Release() {
	ns.Close()
	ns.file = nil
}

// Do runs fn in the namespace, on a thread of its own unless the calling thread is in the
// namespace already: to enter one needs CAP_SYS_ADMIN, also the one where one is (netns_install,
// net/core/net_namespace.c). Goroutines that fn starts may not be in the namespace. The error is ErrNetNSGone if the namespace was released and
// is no longer found.
func (ns *NetNS) Do(fn func() error) error {
	if ns.file == nil {
		found, err := OpenNetNS(ns.spec)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) || errors.Is(err, hook.ErrUsage) {
			return fmt.Errorf("%w: %w", ErrNetNSGone, err)
		}
		if err != nil {
			return err
		}
		defer found.Close()
		if found.id.Inode != ns.id.Inode || found.id.Cookie != ns.id.Cookie {
			return fmt.Errorf("%w: its name belongs to another one now", ErrNetNSGone)
		}
		return found.Do(fn)
	}
	if inside, err := ns.inside(fn); inside {
		return err
	}
	errs := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		back, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			errs <- Errno("own network namespace", err)
			runtime.UnlockOSThread()
			return
		}
		defer back.Close()
		if err := unix.Setns(int(ns.file.Fd()), unix.CLONE_NEWNET); err != nil {
			runtime.UnlockOSThread()
			errs <- fmt.Errorf("enter network namespace: %w", Explain(err))
			return
		}
		err = fn()
		// On failure the thread stays locked, and Go ends it with the goroutine: no
		// other goroutine may run in the wrong namespace.
		if unix.Setns(int(back.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		errs <- err
	}()
	return <-errs
}

// inside runs fn if the calling thread is in the namespace.
func (ns *NetNS) inside(fn func() error) (is bool, err error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var here, there unix.Stat_t
	if unix.Stat("/proc/thread-self/ns/net", &here) != nil || unix.Fstat(int(ns.file.Fd()), &there) != nil || here.Ino != there.Ino || here.Dev != there.Dev {
		return false, nil
	}
	return true, fn()
}

// cookie returns the cookie of the calling thread's namespace, 0 where the
// kernel has none (SO_NETNS_COOKIE, Linux 5.14).
func cookie() (uint64, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("cookie of the network namespace: %w", err)
	}
	defer unix.Close(fd)
	c, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if errors.Is(err, unix.ENOPROTOOPT) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("cookie of the network namespace: %w", err)
	}
	return c, nil
}
