package kernel

import (
	"errors"
	"fmt"
	"io/fs"

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
	return hook.Because(ebpf.ErrNotSupported, "%s: this kernel refuses freplace (BPF_PROG_TYPE_EXT), with which libxdp chains programs: %w", what, err).
		Hint("an owned chain does without (--style owned)")
}

// RefusedXDP explains why a device did not take a dispatcher.
func RefusedXDP(device string, mode hook.Mode, err error) error {
	switch {
	case errors.Is(err, unix.ENODEV):
		return hook.Because(fs.ErrNotExist, "device %q does not exist any more", device)
	case errors.Is(err, unix.EOPNOTSUPP) && mode == hook.ModeNative:
		return hook.Because(ebpf.ErrNotSupported, "the driver has no native XDP: %w", err).
			Hint("use generic mode")
	case errors.Is(err, unix.EPERM):
		return Errno("attach the dispatcher", err)
	}
	return hook.WithHint(fmt.Errorf("the kernel or the driver refused the dispatcher: %w", err),
		"common reasons are an MTU above what XDP takes (a page less headers, unless all members have frags), or too few queues; generic mode has fewer demands")
}
