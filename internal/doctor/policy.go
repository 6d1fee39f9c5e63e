package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/procfs"
)

// memlock looks at RLIMIT_MEMLOCK where BPF memory counts towards it.
func (m machine) memlock() []hook.Finding {
	f := hook.Finding{Check: "memlock", Level: hook.LevelOK, Text: "BPF memory does not count towards RLIMIT_MEMLOCK"}
	var limit unix.Rlimit
	if before(kernelRelease(), 5, 11) && unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit) == nil && limit.Cur != unix.RLIM_INFINITY {
		f.Level, f.Mend = hook.LevelNote, "ulimit -l unlimited"
		f.Text = fmt.Sprintf("before Linux 5.11 BPF memory counts towards RLIMIT_MEMLOCK, which is %d bytes; the command raises it for itself, other programs have to", limit.Cur)
	}
	return []hook.Finding{f}
}

func (m machine) lockdown() []hook.Finding {
	f := hook.Finding{Check: "lockdown", Level: hook.LevelOK, Text: "cannot be told: /sys/kernel/security is not mounted, or the kernel has no lockdown"}
	switch mode := m.lockdownMode(); mode {
	case "":
	case "confidentiality":
		f.Level = hook.LevelNote
		f.Text = "confidentiality: programs that read the kernel's memory are refused"
	default:
		f.Text = mode
	}
	return []hook.Finding{f}
}

// lockdownMode returns the mode of lockdown; empty when the mode is not known.
func (m machine) lockdownMode() string {
	text, _ := m.read("/sys/kernel/security/lockdown")
	_, rest, _ := strings.Cut(text, "[")
	mode, _, _ := strings.Cut(rest, "]")
	return mode
}

// modules looks at the security modules: they may refuse what capabilities allow.
func (m machine) modules() []hook.Finding {
	text, err := m.read("/sys/kernel/security/lsm")
	if errors.Is(err, fs.ErrNotExist) {
		text = "cannot be told: /sys/kernel/security is not mounted"
	} else if err != nil {
		text = "cannot be told: " + oneLine(err)
	}
	return []hook.Finding{{Check: "lsm", Level: hook.LevelOK, Text: text}}
}

func (m machine) seccomp() []hook.Finding {
	status, err := m.status()
	if err != nil {
		return []hook.Finding{{Check: "seccomp", Level: hook.LevelOK, Text: "cannot be told: " + oneLine(err)}}
	}
	if status["Seccomp"] == "2" {
		return []hook.Finding{{Check: "seccomp", Level: hook.LevelNote, Text: "system calls of this process are filtered, bpf(2) may be among those refused"}}
	}
	return []hook.Finding{{Check: "seccomp", Level: hook.LevelOK, Text: "no filter"}}
}

// guards are the security modules that may refuse bpf(2) (security_bpf and what is
// called with it). Others, such as yama and landlock, have no say there.
var guards = []string{"selinux", "smack", "apparmor", "tomoyo", "bpf"}

// suspects says in words what may refuse what capabilities allow, as far as that can be
// seen.
func (m machine) suspects() string {
	var seen []string
	if status, _ := m.status(); status["Seccomp"] == "2" {
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
	note := func(text string) {
		found = append(found, hook.Finding{Check: "namespaces", Level: hook.LevelNote, Text: text})
	}
	if ns := procfs.Namespace("/proc/thread-self", "user"); ns != 0 && ns != procfs.InitialUserNS {
		note("in a user namespace, whose capabilities do not count for BPF")
	}
	if ns := procfs.Namespace("/proc/thread-self", "pid"); ns != 0 && ns != procfs.InitialPIDNS {
		note("in a pid namespace: network namespaces of processes outside of it are not found")
	}
	own, first := procfs.Namespace("/proc/thread-self", "mnt"), procfs.Namespace("/proc/1", "mnt")
	if own != 0 && first != 0 && own != first {
		note("in a mount namespace of its own: a bpffs that is mounted only in here goes with it, and what is pinned there")
	}
	if len(found) == 0 {
		found = append(found, hook.Finding{Check: "namespaces", Level: hook.LevelOK, Text: "none that hides anything"})
	}
	return found
}
