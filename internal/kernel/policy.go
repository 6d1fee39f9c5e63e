package kernel

import (
	"slices"
	"strings"
)

// guards are the security modules that may refuse bpf(2) (security_bpf and what is
// called with it). Others, such as yama and landlock, have no say there.
var guards = []string{"selinux", "smack", "apparmor", "tomoyo", "bpf"}

// Suspects says in words what may refuse what capabilities allow, as far as that can be
// seen in the files that read reads.
func Suspects(read func(path string) ([]byte, error)) string {
	var seen []string
	if filtered, _ := Filtered(read); filtered {
		seen = append(seen, "a seccomp filter")
	}
	if mode := LockdownMode(read); mode != "" && mode != "none" {
		seen = append(seen, "lockdown ("+mode+")")
	}
	text, err := read("/sys/kernel/security/lsm")
	for name := range strings.SplitSeq(strings.TrimSpace(string(text)), ",") {
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

// Filtered tells whether a seccomp filter is in force.
func Filtered(read func(path string) ([]byte, error)) (bool, error) {
	status, err := read("/proc/thread-self/status")
	return strings.Contains("\n"+string(status)+"\n", "\nSeccomp:\t2\n"), err
}

// LockdownMode returns the active mode of lockdown; "" if there is none, or it is not
// known.
func LockdownMode(read func(path string) ([]byte, error)) string {
	modes, _ := read("/sys/kernel/security/lockdown")
	_, rest, _ := strings.Cut(string(modes), "[")
	mode, _, _ := strings.Cut(rest, "]")
	return mode
}
