package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
)

func TestJoin(t *testing.T) {
	qt.Check(t, qt.IsNil(Join(nil, nil)))
	qt.Check(t, qt.Equals(Join(nil, fs.ErrExist), fs.ErrExist))
	err := Join(fs.ErrExist, nil, fs.ErrNotExist, fs.ErrClosed)
	qt.Check(t, qt.ErrorMatches(err, "file already exists, and file does not exist, and file already closed"))
	for _, is := range []error{fs.ErrExist, fs.ErrNotExist, fs.ErrClosed} {
		qt.Check(t, qt.ErrorIs(err, is))
	}
}

func TestUndo(t *testing.T) {
	qt.Check(t, qt.Equals(Undo(fs.ErrExist, nil, nil), fs.ErrExist))
	err := Undo(fs.ErrExist, nil, fs.ErrNotExist)
	qt.Check(t, qt.ErrorMatches(err, "file already exists, and undoing that failed: file does not exist"))
	qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
}

// What stands in the way is said once, however the errors were wrapped.
func TestFreplace(t *testing.T) {
	err := Wrap("attach", hook.XDP, "eth0", Errno("x.o", Freplace("load program", errors.Join(errors.New("guess"), unix.EOPNOTSUPP))))
	qt.Check(t, qt.ErrorMatches(err, `attach xdp eth0: x\.o: load program: this kernel refuses freplace \(BPF_PROG_TYPE_EXT\): operation not supported; `+
		`libxdp's chains are built on it; an owned chain works without it \(--style owned\)`))
	qt.Check(t, qt.ErrorIs(err, ebpf.ErrNotSupported))
	qt.Check(t, qt.ErrorIs(err, unix.EOPNOTSUPP))
	qt.Check(t, qt.ErrorMatches(Freplace("load program", unix.EINVAL), "load program: invalid argument"))
}

func TestRefusedXDP(t *testing.T) {
	for _, test := range []struct {
		mode hook.Mode
		err  error
		want string
		is   error
	}{
		{hook.ModeAuto, unix.ENODEV, `attach xdp eth0: device "eth0" does not exist any more`, fs.ErrNotExist},
		{hook.ModeNative, unix.EOPNOTSUPP, "attach xdp eth0: the driver of eth0 refused native XDP: its words: operation not supported; use generic mode", ebpf.ErrNotSupported},
		{hook.ModeAuto, unix.ERANGE, "attach xdp eth0: the driver of eth0 refused native XDP: its words: numerical result out of range; use generic mode", unix.ERANGE},
		{hook.ModeGeneric, unix.EINVAL, "attach xdp eth0: the kernel refused the dispatcher: its words: invalid argument", unix.EINVAL},
		{hook.ModeNative, unix.EPERM, "attach xdp eth0: attach the dispatcher: operation not permitted: .*", hook.ErrPermission},
	} {
		err := Wrap("attach", hook.XDP, "eth0", RefusedXDP("eth0", test.mode, "its words", test.err))
		qt.Check(t, qt.ErrorMatches(err, test.want))
		qt.Check(t, qt.ErrorIs(err, test.is))
	}
}

// Code that must be compiled, and was not, is told from code that the verifier refuses.
func TestUncompiled(t *testing.T) {
	log := func(line string) error {
		return fmt.Errorf("load program: %w", &ebpf.VerifierError{Cause: unix.EINVAL, Log: []string{"func#0 @0", line, "processed 9 insns"}})
	}
	for _, line := range []string{
		"mixing of tail_calls and bpf-to-bpf calls is not supported",
		"tail_calls are not allowed in non-JITed programs with bpf-to-bpf calls",
		"calling kernel functions are not allowed in non-JITed programs",
		"callbacks are not allowed in non-JITed programs",
		"JIT is required for calling kernel function",
	} {
		for setting, want := range map[string]string{
			"0\n": `.*the BPF JIT is off \(net\.core\.bpf_jit_enable is 0\), .*; switch it on with "sysctl -w net\.core\.bpf_jit_enable=1"`,
			"":    `.*the kernel did not compile the code, .*; if the BPF JIT is off .*`,
			"1\n": `.*the BPF JIT is on, but has not compiled the code, .*`,
		} {
			err := hook.Wrap("attach", hook.XDP, "eth0", uncompiledWith(log(line), setting))
			qt.Check(t, qt.ErrorMatches(err, want))
			qt.Check(t, qt.ErrorIs(err, ebpf.ErrNotSupported))
			qt.Check(t, qt.ErrorIs(err, unix.EINVAL))
		}
	}
	qt.Check(t, qt.IsNil(uncompiledWith(log("R0 !read_ok"), "0")))
	qt.Check(t, qt.IsNil(uncompiledWith(unix.EINVAL, "0")))
}

func TestSince(t *testing.T) {
	for release, want := range map[string]bool{"6.1.0": false, "5.15": false, "6.2.0-rc1": true, "6.18.44": true, "10.0": true, "x": true} {
		qt.Check(t, qt.Equals(since(release, 6, 2), want), qt.Commentf("%s", release))
	}
}
