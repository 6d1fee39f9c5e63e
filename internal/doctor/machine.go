package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/features"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// A machine is a look at the machine. It reads files through read, so that tests can
// give it their own.
type machine struct {
	bpffs string
	read  func(path string) (string, error)
}

func readFile(path string) (string, error) {
	text, err := os.ReadFile(path)
	return strings.TrimSpace(string(text)), err
}

func (m machine) look(ctx context.Context) []hook.Finding {
	found := m.capabilities()
	found = append(found, release(kernelRelease())...)
	found = append(found, m.features(ctx)...)
	for _, check := range []func() []hook.Finding{
		m.jit, m.unprivileged, m.memlock, m.bpffsMount, m.otherMounts, cgroups, m.lockdown, m.modules, m.seccomp, namespaces,
	} {
		found = append(found, check()...)
	}
	return found
}

// needed are the features that every chain needs. Each other feature is for one hook,
// or for convenience.
var needed = map[string]bool{"xdp": true, "slots": true, "description": true, "xdp-link": true, "xdp-link-update": true}

// features tries which features work.
func (m machine) features(ctx context.Context) []hook.Finding {
	list, err := features.Probe(ctx, target.Target{BPFFS: m.bpffs})
	if err != nil {
		return []hook.Finding{{Check: "features", Level: hook.LevelNote, Text: "not tried: " + oneLine(err)}}
	}
	var found []hook.Finding
	var refused []string
	for _, f := range list {
		if f.Name == "bpffs" {
			continue // has its own check
		}
		finding := hook.Finding{Check: "feature-" + f.Name, Level: hook.LevelOK, Text: "works"}
		switch {
		case f.Supported:
		case needed[f.Name]:
			finding.Level = hook.LevelBroken
		default:
			finding.Level = hook.LevelNote
		}
		if !f.Supported {
			finding.Text = fmt.Sprintf("does not work: %s (needs %s)", f.Detail, f.Needs)
		}
		if strings.Contains(f.Detail, unix.EPERM.Error()) {
			refused = append(refused, f.Name)
		}
		found = append(found, finding)
	}
	if len(refused) > 0 {
		found = append(found, hook.Finding{
			Check: "refused", Level: hook.LevelNote,
			Text: fmt.Sprintf("refused although the capabilities are there: %s; %s", strings.Join(refused, ", "), m.suspects()),
		})
	}
	return found
}

func kernelRelease() string {
	var uts unix.Utsname
	if unix.Uname(&uts) != nil {
		return ""
	}
	return unix.ByteSliceToString(uts.Release[:])
}

// before tells whether a kernel is older than that version. It is false for a release
// that cannot be parsed.
func before(release string, major, minor int) bool {
	var x, y int
	if n, _ := fmt.Sscanf(release, "%d.%d", &x, &y); n != 2 {
		return false
	}
	return x < major || x == major && y < minor
}

func release(version string) []hook.Finding {
	f := hook.Finding{Check: "kernel", Level: hook.LevelOK, Text: "Linux " + version}
	if before(version, 5, 10) {
		f.Level = hook.LevelBroken
		f.Text += ": 5.10 is the oldest that chains work on"
	}
	return []hook.Finding{f}
}

// capabilities looks for missing capabilities, the most common reason for a refusal.
func (m machine) capabilities() []hook.Finding {
	var found []hook.Finding
	if missing := kernel.MissingCapabilities(); len(missing) > 0 {
		f := hook.Finding{Check: "capabilities", Level: hook.LevelBroken, Text: "missing:"}
		for i, name := range missing {
			if i > 0 {
				f.Text += ";"
			}
			f.Text += " " + name + ", without which " + forbids[name]
		}
		if os.Geteuid() != 0 {
			f.Mend = "sudo " + kernel.Command("", m.bpffs, "doctor")
		}
		found = append(found, f)
	}
	status, _ := m.status()
	if effective, ok := status["CapEff"]; ok && !has(effective, unix.CAP_SYS_PTRACE) {
		found = append(found, hook.Finding{
			Check: "capabilities", Level: hook.LevelNote,
			Text: "missing: CAP_SYS_PTRACE, without which network namespaces that have no name are not found",
		})
	}
	if len(found) == 0 {
		found = append(found, hook.Finding{Check: "capabilities", Level: hook.LevelOK, Text: "all are there"})
	}
	return found
}

var forbids = map[string]string{
	"CAP_NET_ADMIN": "nothing can be attached to a device or a cgroup",
	"CAP_SYS_ADMIN": "chains and links cannot be found, and network namespaces not be entered",
}

func has(hex string, bit int) bool {
	var set uint64
	_, err := fmt.Sscanf(hex, "%x", &set)
	return err == nil && set&(1<<bit) != 0
}

// status returns the fields of /proc/thread-self/status.
func (m machine) status() (map[string]string, error) {
	text, err := m.read("/proc/thread-self/status")
	fields := map[string]string{}
	for line := range strings.Lines(text) {
		if name, value, ok := strings.Cut(line, ":"); ok {
			fields[name] = strings.TrimSpace(value)
		}
	}
	return fields, err
}

// jit looks at how programs are compiled. The settings are visible only in the initial
// network namespace.
func (m machine) jit() []hook.Finding {
	enable, err := m.read("/proc/sys/net/core/bpf_jit_enable")
	if err != nil {
		return []hook.Finding{{Check: "jit", Level: hook.LevelOK, Text: "not to be seen here; feature-slots tells whether it is on"}}
	}
	if enable == "0" {
		return []hook.Finding{{
			Check: "jit", Level: hook.LevelBroken, Mend: "sysctl -w net.core.bpf_jit_enable=1",
			Text: "the BPF JIT is off: a chain cannot call its members without it",
		}}
	}
	var found []hook.Finding
	if enable == "2" {
		found = append(found, hook.Finding{
			Check: "jit", Level: hook.LevelNote, Mend: "sysctl -w net.core.bpf_jit_enable=1",
			Text: "the BPF JIT writes all code to the kernel's log (net.core.bpf_jit_enable is 2)",
		})
	}
	if harden, err := m.read("/proc/sys/net/core/bpf_jit_harden"); err == nil && harden == "2" {
		found = append(found, hook.Finding{Check: "jit", Level: hook.LevelNote, Text: "constants are blinded for root, too, which makes programs slower (net.core.bpf_jit_harden is 2)"})
	}
	if names, err := m.read("/proc/sys/net/core/bpf_jit_kallsyms"); err == nil && names == "0" {
		found = append(found, hook.Finding{Check: "jit", Level: hook.LevelNote, Text: "profilers see no names of BPF programs (net.core.bpf_jit_kallsyms is 0)"})
	}
	if len(found) == 0 {
		found = append(found, hook.Finding{Check: "jit", Level: hook.LevelOK, Text: "on"})
	}
	return found
}

func (m machine) unprivileged() []hook.Finding {
	value, err := m.read("/proc/sys/kernel/unprivileged_bpf_disabled")
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return []hook.Finding{{Check: "unprivileged-bpf", Level: hook.LevelOK, Text: "not known to this kernel"}}
	case err != nil:
		return []hook.Finding{{Check: "unprivileged-bpf", Level: hook.LevelOK, Text: "cannot be told: " + oneLine(err)}}
	case value == "0":
		return []hook.Finding{{
			Check: "unprivileged-bpf", Level: hook.LevelNote, Mend: "sysctl -w kernel.unprivileged_bpf_disabled=2",
			Text: "every user may load BPF programs; nothing here needs that",
		}}
	}
	return []hook.Finding{{Check: "unprivileged-bpf", Level: hook.LevelOK, Text: "off"}}
}
