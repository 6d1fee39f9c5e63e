package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/procfs"
)

const defaultBPFFS = kernel.DefaultBPFFS

// checkBPFFS refuses a --bpffs that is not a bpffs: members would seem to have
// no pins.
func (a *app) checkBPFFS(cmd *cobra.Command) error {
	f := cmd.Flags().Lookup("bpffs")
	if f == nil || !f.Changed {
		return nil
	}
	if err := kernel.FindBPFFS(a.bpffs); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if !isFile(a.bpffs) {
		return usage("", "--bpffs %s: there is no such folder", a.bpffs)
	}
	return usage(fmt.Sprintf("mount one with \"%s\"", kernel.MountCommand(a.bpffs)), "--bpffs %s: no bpffs is mounted there", a.bpffs)
}

// needBPFFS mounts the default bpffs for a verb that pins, if none is mounted
// there.
func (a *app) needBPFFS(pins bool) error {
	if !pins {
		return nil
	}
	a.pins = true
	if err := kernel.FindBPFFS(a.bpffs); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if inPrivateMounts() {
		return usage(a.outside(), "no bpffs is mounted at %s in this mount namespace, and pins in one that is mounted here would end with it", a.bpffs)
	}
	mounted, err := dispatcher.MountBPFFS(a.bpffs)
	if mounted {
		a.note("mounted a bpffs at %s, for the pins", a.bpffs)
	}
	return err
}

// outside says how to make pins that outlast this mount namespace. "ip netns exec" makes one
// for each command: then the same command line does it in the shell around it.
func (a *app) outside() string {
	if own := procfs.Namespace("/proc/self", "net"); a.netns == "" {
		for _, e := range entriesOf(kernel.NetNSDir, "") {
			var st unix.Stat_t
			if unix.Stat(filepath.Join(kernel.NetNSDir, e.Name()), &st) == nil && st.Ino == own {
				return fmt.Sprintf("outside of it run \"%s\"", kernel.Shell(append([]string{"dispatcher", "-n", e.Name()}, a.args...)...))
			}
		}
	}
	return fmt.Sprintf("run \"%s\" outside of it, or give --bpffs one that is mounted outside too", kernel.Shell(append([]string{"dispatcher"}, a.args...)...))
}

// warnPrivate warns of a bpffs whose pins may not last as long as the machine runs.
func (a *app) warnPrivate() {
	switch life := kernel.LifeOf(a.bpffs); life {
	case kernel.Lasting:
	case kernel.Unknown: // it may be well
		a.note("the bpffs at %s %v; %s", a.bpffs, life, kernel.LastingHint)
	default:
		a.warn("the bpffs at %s %v; %s", a.bpffs, life, kernel.LastingHint)
	}
}

// inPrivateMounts tells whether the command runs in a mount namespace that one
// of its ancestors does not share. "ip netns exec", with its own /sys, and
// services with private mounts are like that. A bpffs that is mounted there
// ends with the command, and the members with it.
func inPrivateMounts() bool {
	own := procfs.Namespace("/proc/self", "mnt")
	if own == 0 {
		return false
	}
	for pid := os.Getppid(); pid > 0; pid = parent(pid) {
		// It cannot be read for some processes, such as init in a sandbox.
		ns := procfs.Namespace(fmt.Sprintf("/proc/%d", pid), "mnt")
		if ns != 0 && ns != own {
			return true
		}
	}
	return false
}

// parent returns the parent of a process, or 0 when it is not known.
func parent(pid int) (ppid int) {
	stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	// pid (name) state parent ...: the name may contain any characters.
	var state string
	_, _ = fmt.Sscan(string(stat[bytes.LastIndexByte(stat, ')')+1:]), &state, &ppid)
	return ppid
}
