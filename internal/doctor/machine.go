package doctor

import (
	"cmp"
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

func (m machine) bytes(path string) ([]byte, error) {
	text, err := m.read(path)
	return []byte(text), err
}

// look does the checks of the machine.
func (m machine) look(ctx context.Context) []hook.Finding {
	var found []hook.Finding
	for _, c := range []struct {
		name, good string // good is the text for when it finds nothing
		look       func() []hook.Finding
	}{
		{"capabilities", "all are there", m.capabilities},
		{"kernel", "Linux " + kernel.Release(), release},
		{"features", "none was tried", func() []hook.Finding { return m.features(ctx) }},
		{"jit", "on", m.jit},
		{"unprivileged-bpf", "off", m.unprivileged},
		{"memlock", "BPF memory does not count towards RLIMIT_MEMLOCK", memlock},
		{"bpffs", "mounted at " + m.bpffs, m.bpffsMount},
		{"other-bpffs", "no other one has pins of members", m.otherMounts},
		{"cgroups", "mounted", cgroups},
		{"lockdown", "cannot be told: /sys/kernel/security is not mounted, or the kernel has no lockdown", m.lockdown},
		{"lsm", "none", m.modules},
		{"seccomp", "no filter", m.seccomp},
		{"namespaces", "none that hides anything", namespaces},
	} {
		of := c.look()
		if len(of) == 0 {
			of = ok(c.good)
		}
		for _, f := range of {
			f.Check = cmp.Or(f.Check, c.name)
			found = append(found, f)
		}
	}
	return found
}

func ok(text string) []hook.Finding { return []hook.Finding{{Level: hook.LevelOK, Text: text}} }

func note(mend, text string) []hook.Finding {
	return []hook.Finding{{Level: hook.LevelNote, Mend: mend, Text: text}}
}

func broken(mend, text string) []hook.Finding {
	return []hook.Finding{{Level: hook.LevelBroken, Mend: mend, Text: text}}
}

// needed are the features that every chain needs. Each other feature is for one hook,
// or for convenience.
var needed = map[string]bool{"xdp": true, "slots": true, "description": true, "xdp-link": true, "xdp-link-update": true}

// features tries which features work.
func (m machine) features(ctx context.Context) []hook.Finding {
	list, err := features.Probe(ctx, target.Target{BPFFS: m.bpffs})
	if err != nil {
		return note("", "not tried: "+oneLine(err))
	}
	var found []hook.Finding
	var refused []string
	for _, f := range list {
		if f.Name == "bpffs" {
			continue // has its own check
		}
		finding := hook.Finding{Check: "feature-" + f.Name, Level: hook.LevelOK, Text: "works"}
		if !f.Supported {
			finding.Level = hook.LevelNote
			if needed[f.Name] {
				finding.Level = hook.LevelBroken
			}
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
			Text: fmt.Sprintf("refused although the capabilities are there: %s; %s", strings.Join(refused, ", "), kernel.Suspects(m.bytes)),
		})
	}
	return found
}

func release() []hook.Finding {
	if kernel.Since(5, 10) {
		return nil
	}
	return broken("", "Linux "+kernel.Release()+": 5.10 is the oldest that chains work on")
}

// capabilities looks for missing capabilities, the most common reason for a refusal.
func (m machine) capabilities() []hook.Finding {
	var found []hook.Finding
	var missing []string
	for _, name := range kernel.MissingCapabilities() {
		missing = append(missing, name+", without which "+forbids[name])
	}
	if len(missing) > 0 {
		mend := ""
		if os.Geteuid() != 0 {
			mend = "sudo " + kernel.Command("", m.bpffs, nil, "doctor")
		}
		found = broken(mend, "missing: "+strings.Join(missing, "; "))
	}
	if !kernel.HasCapability(unix.CAP_SYS_PTRACE) {
		found = append(found, note("", "missing: CAP_SYS_PTRACE, without which network namespaces that have no name are not found")...)
	}
	return found
}

var forbids = map[string]string{
	"CAP_NET_ADMIN": "nothing can be attached to a device or a cgroup",
	"CAP_SYS_ADMIN": "chains and links cannot be found, and network namespaces not be entered",
}

// jit looks at how programs are compiled. The settings are visible only in the initial
// network namespace.
func (m machine) jit() []hook.Finding {
	enable, err := m.read("/proc/sys/net/core/bpf_jit_enable")
	if err != nil {
		return ok("not to be seen here; feature-slots tells whether it is on")
	}
	const mend = "sysctl -w net.core.bpf_jit_enable=1"
	if enable == "0" {
		return broken(mend, "the BPF JIT is off: a chain cannot call its members without it")
	}
	var found []hook.Finding
	if enable == "2" {
		found = note(mend, "the BPF JIT writes all code to the kernel's log (net.core.bpf_jit_enable is 2)")
	}
	if harden, _ := m.read("/proc/sys/net/core/bpf_jit_harden"); harden == "2" {
		found = append(found, note("", "constants are blinded for root, too, which makes programs slower (net.core.bpf_jit_harden is 2)")...)
	}
	if names, _ := m.read("/proc/sys/net/core/bpf_jit_kallsyms"); names == "0" {
		found = append(found, note("", "profilers see no names of BPF programs (net.core.bpf_jit_kallsyms is 0)")...)
	}
	return found
}

func (m machine) unprivileged() []hook.Finding {
	value, err := m.read("/proc/sys/kernel/unprivileged_bpf_disabled")
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return ok("not known to this kernel")
	case err != nil:
		return ok("cannot be told: " + oneLine(err))
	case value == "0":
		return note("sysctl -w kernel.unprivileged_bpf_disabled=2", "every user may load BPF programs; nothing here needs that")
	}
	return nil
}
