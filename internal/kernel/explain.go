package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
)

// needed are the capabilities that the library cannot do without.
var needed = []struct {
	bit  int
	name string
}{
	{unix.CAP_NET_ADMIN, "CAP_NET_ADMIN"}, // to attach
	{unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN"}, // to find objects by id; implies CAP_BPF and CAP_PERFMON
}

// MissingCapabilities returns the names of the capabilities that the calling
// thread lacks.
func MissingCapabilities() []string {
	var missing []string
	for _, c := range needed {
		if !HasCapability(c.bit) {
			missing = append(missing, c.name)
		}
	}
	return missing
}

// HasCapability tells whether the calling thread has a capability. One that cannot be
// told counts as there.
func HasCapability(bit int) bool {
	var sets [2]unix.CapUserData
	err := unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &sets[0])
	return err != nil || sets[bit/32].Effective&(1<<(bit%32)) != 0
}

// Explain adds to a refusal by the kernel (EPERM, EACCES) what refuses, to ENOMEM which limit
// was reached, and says which file system is missing where one that is needed is not mounted.
// It returns other errors as they are.
func Explain(err error) error {
	if missing := unmounted(err); missing != "" {
		return errors.New(err.Error() + ": " + missing) // what was looked for is not known to be gone
	}
	var at *fs.PathError
	if errors.Is(err, unix.ENOENT) && errors.As(err, &at) && (strings.HasPrefix(at.Path, "/proc/self/") || strings.HasPrefix(at.Path, "/proc/thread-self/")) {
		// This is about this process, and not about what was looked for. Without memory the kernel says ENOENT of
		// files that are there (proc_fdinfo_instantiate, fs/proc/fd.c).
		return errors.New(err.Error())
	}
	if errors.Is(err, unix.ENOMEM) {
		return explainMemory(err)
	}
	if !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EACCES) || errors.Is(err, hook.ErrPermission) {
		return err
	}
	// cilium/ebpf adds this guess to every EPERM.
	what := strings.ReplaceAll(err.Error(), " (MEMLOCK may be too low, consider rlimit.RemoveMemlock)", "")
	var verifier *ebpf.VerifierError
	why := denied(err)
	if why != "" {
	} else if InUserNS() {
		why = "this process is in a user namespace, whose capabilities do not count for BPF; run it as root outside of it"
	} else if missing := MissingCapabilities(); len(missing) > 0 {
		why = "missing " + strings.Join(missing, " and ") + "; run it as root"
	} else if errors.As(err, &verifier) && len(verifier.Log) > 0 {
		return err // the log says why
	} else if limit, ok := Memlock(); ok {
		why = fmt.Sprintf("before Linux 5.11 BPF memory counts towards RLIMIT_MEMLOCK, which is %d bytes here; raise it with ulimit -l, in Go with rlimit.RemoveMemlock", limit)
	} else {
		why = "refused although this process has the needed capabilities: " + Suspects(os.ReadFile)
	}
	return &refusal{what + ": " + why, err}
}

// unmounted says which file system is not mounted where err looked for a file of it, as in
// a chroot; empty if that is not so.
func unmounted(err error) string {
	var at *fs.PathError
	if !errors.Is(err, unix.ENOENT) || !errors.As(err, &at) {
		return ""
	}
	for _, of := range []struct {
		folder, name string
		magic        int64
	}{{"/proc", "proc", unix.PROC_SUPER_MAGIC}, {"/sys", "sysfs", unix.SYSFS_MAGIC}} {
		var st unix.Statfs_t
		if strings.HasPrefix(at.Path, of.folder+"/") && !strings.HasPrefix(at.Path, DefaultBPFFS) &&
			(unix.Statfs(of.folder, &st) != nil || st.Type != of.magic) {
			return fmt.Sprintf("no %s is mounted at %s here, as in a chroot; mount it with \"%s\"", of.name, of.folder, Shell("mount", "-t", of.name, of.name, of.folder))
		}
	}
	return ""
}

// A refusal is a hook.ErrPermission.
type refusal struct {
	text string
	err  error
}

func (r *refusal) Error() string   { return r.text }
func (r *refusal) Unwrap() []error { return []error{hook.ErrPermission, r.err} }

// Memlock returns RLIMIT_MEMLOCK. counts is true if the limit is finite and this
// kernel counts BPF memory towards it.
func Memlock() (limit uint64, counts bool) {
	var r unix.Rlimit
	if Since(5, 11) || unix.Getrlimit(unix.RLIMIT_MEMLOCK, &r) != nil {
		return 0, false
	}
	return r.Cur, r.Cur != unix.RLIM_INFINITY
}

// Since tells whether this is Linux major.minor or later. Use it only for what
// cannot be tried. A version that cannot be read counts as later.
func Since(major, minor int) bool { return since(Release(), major, minor) }

func since(release string, major, minor int) bool {
	var a, b int
	n, _ := fmt.Sscanf(release, "%d.%d", &a, &b)
	return n != 2 || a > major || a == major && b >= minor
}

// Release is what "uname -r" prints.
func Release() string {
	var uts unix.Utsname
	_ = unix.Uname(&uts)
	return unix.ByteSliceToString(uts.Release[:])
}

// RaiseMemlock removes the RLIMIT_MEMLOCK of this process where the kernel counts
// BPF memory towards it (before Linux 5.11).
func RaiseMemlock() {
	if _, counts := Memlock(); counts {
		_ = unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY})
	}
}

// Errno adds to the error of a system call what was tried.
func Errno(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, Explain(err))
}
