package kernel

import (
	"io/fs"
	"testing"

	"github.com/go-quicktest/qt"
)

// The security modules that may refuse what capabilities allow are named.
func TestSuspects(t *testing.T) {
	const status, lsm, lockdown = "/proc/thread-self/status", "/sys/kernel/security/lsm", "/sys/kernel/security/lockdown"
	for _, test := range []struct {
		files map[string]string
		want  string
	}{
		{nil, "it is the kernel's own policy, or a security module, .*"},
		{map[string]string{lsm: "capability,landlock,yama\n"}, "no seccomp filter, .* so it is the kernel's own policy"},
		{map[string]string{lsm: "lockdown,capability,selinux,bpf\n", lockdown: "none [integrity] confidentiality\n"}, `it may be lockdown \(integrity\), or the security module selinux, or the security module bpf`},
		{map[string]string{status: "Seccomp:\t2\n"}, "it may be a seccomp filter"},
	} {
		qt.Check(t, qt.Matches(Suspects(func(path string) ([]byte, error) {
			text, ok := test.files[path]
			if !ok {
				return nil, fs.ErrNotExist
			}
			return []byte(text), nil
		}), test.want))
	}
}
