package kernel

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
)

// Freplace explains an error of a program that should replace a function of
// another program (BPF_PROG_TYPE_EXT). It returns ebpf.ErrNotSupported where the
// kernel refuses all such programs, although the process has the capabilities:
// with EPERM because of its policy, with ENOTSUPP or EOPNOTSUPP because the
// architecture has no trampolines.
func Freplace(what string, err error) error {
	const enotsupp = unix.Errno(524) // linux/errno.h; internal to the kernel, but user space gets it
	for _, refusal := range []unix.Errno{unix.EOPNOTSUPP, enotsupp, unix.EPERM} {
		if !errors.Is(err, refusal) || errors.Is(err, ebpf.ErrNotSupported) || refusal == unix.EPERM && len(MissingCapabilities()) > 0 {
			continue
		}
		// The rest of the text is what cilium/ebpf guesses.
		return hook.Because(ebpf.ErrNotSupported, "%s: this kernel refuses freplace (BPF_PROG_TYPE_EXT): %w", what, refusal).
			Hint("libxdp's chains are built on it; an owned chain works without it (--style owned)")
	}
	return Errno(what, err)
}

// RefusedXDP explains why a device refused a dispatcher: ebpf.ErrNotSupported, if it was the
// driver. The reason is in the kernel's words, or empty.
func RefusedXDP(device string, mode hook.Mode, reason string, err error) error {
	switch {
	case errors.Is(err, unix.ENODEV):
		return hook.Because(fs.ErrNotExist, "device %q does not exist any more", device)
	case errors.Is(err, unix.EPERM):
		return Errno("attach the dispatcher", err)
	}
	if reason != "" {
		reason = ": " + reason
	}
	if errno := unix.Errno(0); errors.As(err, &errno) {
		err = errno // without the words of the library that made the system call
	}
	if mode == hook.ModeGeneric {
		return fmt.Errorf("the kernel refused the dispatcher%s: %w", reason, err)
	}
	return hook.Because(ebpf.ErrNotSupported, "the driver of %s refused native XDP%s: %w", device, reason, err).
		Hint("use generic mode")
}
