package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/procfs"
)

// memlock looks at RLIMIT_MEMLOCK where BPF memory counts towards it.
func memlock() []hook.Finding {
	limit, counts := kernel.Memlock()
	if !counts {
		return nil
	}
	return note("ulimit -l unlimited", fmt.Sprintf("before Linux 5.11 BPF memory counts towards RLIMIT_MEMLOCK, which is %d bytes; the command raises it for itself, other programs have to", limit))
}

func (m machine) lockdown() []hook.Finding {
	switch mode := m.lockdownMode(); mode {
	case "":
		return nil
	case "confidentiality":
		return note("", "confidentiality: programs that read the kernel's memory are refused")
	default:
		return ok(mode)
	}
}

// lockdownMode returns the mode of lockdown; empty when the mode is not known.
func (m machine) lockdownMode() string {
	text, _ := m.read("/sys/kernel/security/lockdown")
	return kernel.LockdownMode(text)
}

// modules looks at the security modules: they may refuse what capabilities allow.
func (m machine) modules() []hook.Finding {
	text, err := m.read("/sys/kernel/security/lsm")
	if errors.Is(err, fs.ErrNotExist) {
		text = "cannot be told: /sys/kernel/security is not mounted"
	} else if err != nil {
		text = "cannot be told: " + oneLine(err)
	}
	return ok(text)
}

func (m machine) seccomp() []hook.Finding {
	switch filtered, err := m.filtered(); {
	case err != nil:
		return ok("cannot be told: " + oneLine(err))
	case filtered:
		return note("", "system calls of this process are filtered, bpf(2) may be among those refused")
	}
	return nil
}

// filtered tells whether a seccomp filter is in force.
func (m machine) filtered() (bool, error) {
	status, err := m.read("/proc/thread-self/status")
	return strings.Contains("\n"+status+"\n", "\nSeccomp:\t2\n"), err
}

// guards are the security modules that may refuse bpf(2) (security_bpf and what is
// called with it). Others, such as yama and landlock, have no say there.
var guards = []string{"selinux", "smack", "apparmor", "tomoyo", "bpf"}

// suspects says in words what may refuse what capabilities allow, as far as that can be
// seen.
func (m machine) suspects() string {
	var seen []string
	if filtered, _ := m.filtered(); filtered {
		seen = append(seen, "a seccomp filter")
	}
	if mode := m.lockdownMode(); mode != "" && mode != "none" {
		seen = append(seen, "lockdown ("+mode+")")
	}
	text, err := m.read("/sys/kernel/security/lsm")
	for name := range strings.SplitSeq(text, ",") {
		if slices.Contains(guards, name) {
			seen = append(seen, "the security module "+name)
		}
	}
	switch {
	case len(seen) > 0:
		return "it may be " + strings.Join(seen, ", or ")
	case err != nil:
		return "it is the kernel's own policy, or a security module, which cannot be seen without /sys/kernel/security"
	}
	return "no seccomp filter, lockdown or security module does that, so it is the kernel's own policy"
}

// namespaces looks for namespaces that hide things from this process.
func namespaces() []hook.Finding {
	var found []hook.Finding
	add := func(text string) { found = append(found, note("", text)...) }
	if ns := procfs.Namespace("/proc/thread-self", "user"); ns != 0 && ns != procfs.InitialUserNS {
		add("in a user namespace, whose capabilities do not count for BPF")
	}
	if ns := procfs.Namespace("/proc/thread-self", "pid"); ns != 0 && ns != procfs.InitialPIDNS {
		add("in a pid namespace: network namespaces of processes outside of it are not found")
	}
	return found
}
