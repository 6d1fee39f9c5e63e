package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
)

const enotsupp = unix.Errno(524) // linux/errno.h; internal to the kernel, but user space gets it

// uncompiled are the verifier's words for code that only compiled programs may have, on
// kernels since 5.10: tail calls of functions (check_map_func_compatibility), calls of the
// kernel's functions (add_kfunc_call), callbacks (fixup_call_args, kernel/bpf/verifier.c).
var uncompiled = []string{"mixing of tail_calls and bpf-to-bpf calls", "non-JITed", "JIT is required"}

// Uncompiled returns the error, ebpf.ErrNotSupported, of code that this kernel would have to
// compile, and did not; nil for any other error.
func Uncompiled(err error) error {
	setting, _ := os.ReadFile("/proc/sys/net/core/bpf_jit_enable") // of the first network namespace only
	return uncompiledWith(err, string(setting))
}

func uncompiledWith(err error, setting string) error {
	var refusal *ebpf.VerifierError
	if !errors.As(err, &refusal) || !slices.ContainsFunc(refusal.Log, func(line string) bool {
		return slices.ContainsFunc(uncompiled, func(words string) bool { return strings.Contains(line, words) })
	}) {
		return nil
	}
	const mend = "sysctl -w net.core.bpf_jit_enable=1"
	switch strings.TrimSpace(setting) {
	case "0":
		return hook.Because(ebpf.ErrNotSupported, "the BPF JIT is off (net.core.bpf_jit_enable is 0), and such code must be compiled: %w", err).
			Hint("switch it on with \"%s\"", mend)
	case "":
		return hook.Because(ebpf.ErrNotSupported, "the kernel did not compile the code, and such code must be compiled: %w", err).
			Hint("if the BPF JIT is off (net.core.bpf_jit_enable is 0), which can be seen in the first network namespace only, switch it on with \"%s\"", mend)
	}
	return hook.Because(ebpf.ErrNotSupported, "the BPF JIT is on, but has not compiled the code, and such code must be compiled: %w", err).
		Hint("the JIT of this architecture cannot, or net.core.bpf_jit_limit is used up")
}

// Freplace explains an error of a program that should replace a function of
// another program (BPF_PROG_TYPE_EXT). It returns ebpf.ErrNotSupported where the
// kernel refuses all such programs, although the process has the capabilities:
// with EPERM because of its policy, with ENOTSUPP or EOPNOTSUPP because the
// architecture has no trampolines.
func Freplace(what string, err error) error {
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
