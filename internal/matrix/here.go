package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// hereCommand runs "matrix here". It fails and says why the demo and the tests cannot run on this
// machine as this user, or it succeeds silently.
func hereCommand(context.Context, []string) error {
	result := make(chan error)
	// The thread changes its namespaces and ends.
	go func() {
		runtime.LockOSThread()
		result <- canRunHere()
	}()
	if err := <-result; err != nil {
		fmt.Println(err)
		return exitStatus(1)
	}
	return nil
}

// canRunHere tries what the demo and all tests do, in namespaces that end with this
// thread.
func canRunHere() error {
	if uid := os.Geteuid(); uid != 0 {
		return fmt.Errorf("this needs root, and you are user %d", uid)
	}
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("separate this thread's folder from the other threads': %w", err)
	}
	if err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS); err != nil {
		return explain("make a network namespace", err)
	}
	err := unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	if errors.Is(err, unix.EINVAL) { // do_change_type, fs/namespace.c
		return errors.New("the root folder is no mount point, as in a chroot: mounts made here cannot be kept private")
	}
	if err != nil {
		return explain("mount", err)
	}
	dir, err := os.MkdirTemp("", "libdispatcher-here-")
	if err != nil {
		return err
	}
	defer os.Remove(dir)
	if err := unix.Mount("bpf", dir, "bpf", 0, ""); err != nil {
		return explain("mount a bpffs", err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type:         ebpf.XDP,
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()},
		License:      "Dual BSD/GPL",
	})
	if err != nil {
		return explain("load an XDP program", err)
	}
	defer prog.Close()
	if err := prog.Pin(dir + "/probe"); err != nil {
		return explain("pin a program", err)
	}
	return nil
}

// explain says why this machine refuses something.
func explain(what string, err error) error {
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return fmt.Errorf("cannot %s, although this is root: a container, or the kernel's policy, does not allow it (%v)", what, err)
	case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.ENODEV), errors.Is(err, unix.EINVAL), errors.Is(err, ebpf.ErrNotSupported):
		return fmt.Errorf("cannot %s: this kernel was built without what it needs (%v)", what, err)
	}
	return fmt.Errorf("cannot %s: %w", what, err)
}
