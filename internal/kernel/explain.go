package kernel

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
)

// needed are the capabilities for attaching and for finding objects by id.
var needed = []struct {
	bit  int
	name string
}{
	{unix.CAP_NET_ADMIN, "CAP_NET_ADMIN"},
	{unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN"}, // finding objects by id; implies CAP_BPF and CAP_PERFMON
}

// MissingCapabilities returns the names of the capabilities that the calling
// thread lacks.
func MissingCapabilities() []string {
	status, err := os.ReadFile("/proc/thread-self/status")
	if err != nil {
		return nil
	}
	var effective uint64
	for line := range strings.Lines(string(status)) {
		if hex, ok := strings.CutPrefix(line, "CapEff:"); ok {
			effective, _ = strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
		}
	}
	var missing []string
	for _, c := range needed {
		if effective&(1<<c.bit) == 0 {
			missing = append(missing, c.name)
		}
	}
	return missing
}

// Explain adds to a refusal of the kernel's (EPERM, EACCES) what can be known
// of the reason. Other errors are returned as they are.
func Explain(err error) error {
	if !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EACCES) || errors.Is(err, hook.ErrPermission) {
		return err
	}
	// A guess that cilium/ebpf adds to every EPERM.
	what := strings.ReplaceAll(err.Error(), " (MEMLOCK may be too low, consider rlimit.RemoveMemlock)", "")
	why := "refused although the needed capabilities are there: a security module, seccomp or the kernel's policy stands in the way"
	if missing := MissingCapabilities(); len(missing) > 0 {
		why = "missing " + strings.Join(missing, " and ") + "; run it as root"
	} else if limit, ok := memlock(); ok {
		why = fmt.Sprintf("before Linux 5.11 BPF memory counts towards RLIMIT_MEMLOCK, which is %d bytes here; raise it with ulimit -l, in Go with rlimit.RemoveMemlock", limit)
	} else if mode := lockdown(); mode == "confidentiality" {
		why = "the kernel is locked down (" + mode + ")"
	}
	return &refusal{what + ": " + why, err}
}

// refusal is a hook.ErrPermission.
type refusal struct {
	text string
	err  error
}

func (r *refusal) Error() string   { return r.text }
func (r *refusal) Unwrap() []error { return []error{hook.ErrPermission, r.err} }

// memlock returns RLIMIT_MEMLOCK if this kernel counts BPF memory towards it
// and it is limited.
func memlock() (limit uint64, counts bool) {
	var r unix.Rlimit
	if Since(5, 11) || unix.Getrlimit(unix.RLIMIT_MEMLOCK, &r) != nil {
		return 0, false
	}
	return r.Cur, r.Cur != unix.RLIM_INFINITY
}

// Since tells whether this is Linux major.minor or a later one. Only what
// cannot be tried goes by it; a version that cannot be read counts as late.
func Since(major, minor int) bool {
	var uts unix.Utsname
	var a, b int
	if unix.Uname(&uts) != nil {
		return true
	}
	if n, _ := fmt.Sscanf(unix.ByteSliceToString(uts.Release[:]), "%d.%d", &a, &b); n != 2 {
		return true
	}
	return a > major || a == major && b >= minor
}

// RaiseMemlock lifts RLIMIT_MEMLOCK of this process where BPF memory counts
// towards it (before Linux 5.11).
func RaiseMemlock() {
	if _, counts := memlock(); counts {
		_ = unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY})
	}
}

// lockdown returns the active lockdown mode (security/lockdown), or "".
func lockdown() string {
	modes, err := os.ReadFile("/sys/kernel/security/lockdown")
	if err != nil {
		return ""
	}
	_, rest, ok := strings.Cut(string(modes), "[")
	if !ok {
		return ""
	}
	mode, _, _ := strings.Cut(rest, "]")
	return mode
}

// Errno wraps a system call's error with what was tried.
func Errno(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, Explain(err))
}
