package kernel

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

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
	if missing := MissingCapabilities(); len(missing) > 0 {
		return hook.Because(hook.ErrPermission, "%w: missing %s; run it as root", err, strings.Join(missing, " and "))
	}
	if mode := lockdown(); mode == "confidentiality" {
		return hook.Because(hook.ErrPermission, "%w: the kernel is locked down (%s)", err, mode)
	}
	return hook.Because(hook.ErrPermission, "%w: refused although the needed capabilities are there; a security module, seccomp or a namespace stands in the way", err)
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

// BootTime returns the time that was since after boot (CLOCK_BOOTTIME), in
// whole seconds: more would only look exact.
func BootTime(since time.Duration) time.Time {
	var now unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &now) != nil {
		return time.Time{}
	}
	return time.Now().Add(since - time.Duration(now.Nano())).Round(time.Second)
}
