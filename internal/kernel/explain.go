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

// Explain adds the most likely reason to a refusal by the kernel (EPERM, EACCES).
// It returns other errors as they are.
func Explain(err error) error {
	if !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EACCES) || errors.Is(err, hook.ErrPermission) {
		return err
	}
	// cilium/ebpf adds this guess to every EPERM.
	what := strings.ReplaceAll(err.Error(), " (MEMLOCK may be too low, consider rlimit.RemoveMemlock)", "")
	why := "refused although this process has the needed capabilities: a security module, seccomp or the kernel's policy forbids it"
	if missing := MissingCapabilities(); len(missing) > 0 {
		why = "missing " + strings.Join(missing, " and ") + "; run it as root"
	} else if limit, ok := memlock(); ok {
		why = fmt.Sprintf("before Linux 5.11 BPF memory counts towards RLIMIT_MEMLOCK, which is %d bytes here; raise it with ulimit -l, in Go with rlimit.RemoveMemlock", limit)
	} else if mode := lockdown(); mode == "confidentiality" {
		why = "the kernel is locked down (" + mode + ")"
	}
	return &refusal{what + ": " + why, err}
}

// A refusal is a hook.ErrPermission.
type refusal struct {
	text string
	err  error
}

func (r *refusal) Error() string   { return r.text }
func (r *refusal) Unwrap() []error { return []error{hook.ErrPermission, r.err} }

// memlock returns RLIMIT_MEMLOCK. counts is true if the limit is finite and this
// kernel counts BPF memory towards it.
func memlock() (limit uint64, counts bool) {
	var r unix.Rlimit
	if Since(5, 11) || unix.Getrlimit(unix.RLIMIT_MEMLOCK, &r) != nil {
		return 0, false
	}
	return r.Cur, r.Cur != unix.RLIM_INFINITY
}

// Since tells whether this is Linux major.minor or later. Use it only for what
// cannot be tried. A version that cannot be read counts as later.
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

// RaiseMemlock removes the RLIMIT_MEMLOCK of this process where the kernel counts
// BPF memory towards it (before Linux 5.11).
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

// Errno adds to the error of a system call what was tried.
func Errno(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, Explain(err))
}
