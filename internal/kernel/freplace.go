package kernel

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
)

// Freplace explains an error of a program that is to take the place of a
// function of another one (BPF_PROG_TYPE_EXT): ebpf.ErrNotSupported where the
// kernel does not let any do that, though the capabilities are there. EPERM is
// the policy's, ENOTSUPP and EOPNOTSUPP an architecture's without trampolines.
func Freplace(what string, err error) error {
	const enotsupp = unix.Errno(524) // linux/errno.h; not for user space, but it comes
	refused := errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, enotsupp) ||
		errors.Is(err, unix.EPERM) && len(MissingCapabilities()) == 0
	if !refused || errors.Is(err, ebpf.ErrNotSupported) {
		return Errno(what, err)
	}
	return &hook.Error{
		Err:  fmt.Errorf("%s: this kernel refuses freplace (BPF_PROG_TYPE_EXT), with which libxdp chains programs: %w: %w", what, ebpf.ErrNotSupported, err),
		Hint: "an owned chain does without (--style owned)",
	}
}
