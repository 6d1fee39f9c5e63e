package doctor

import (
	"errors"
	"fmt"
	"io/fs"

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
	switch mode := kernel.LockdownMode(m.bytes); mode {
	case "":
		return nil
	case "confidentiality":
		return note("", "confidentiality: programs that read the kernel's memory are refused")
	default:
		return ok(mode)
	}
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
	switch filtered, err := kernel.Filtered(m.bytes); {
	case err != nil:
		return ok("cannot be told: " + oneLine(err))
	case filtered:
		return note("", "system calls of this process are filtered, bpf(2) may be among those refused")
	}
	return nil
}

// namespaces looks for namespaces that hide things from this process.
func namespaces() []hook.Finding {
	var found []hook.Finding
	add := func(text string) { found = append(found, note("", text)...) }
	if kernel.InUserNS() {
		add("in a user namespace, whose capabilities do not count for BPF")
	}
	if ns := procfs.Namespace("/proc/thread-self", "pid"); ns != 0 && ns != procfs.InitialPIDNS {
		add("in a pid namespace: network namespaces of processes outside of it are not found")
	}
	return found
}
