package main

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/internal/kernel"
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
	return usage(kernel.MountHint(a.bpffs), "--bpffs %s: no bpffs is mounted there", a.bpffs)
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
	if kernel.InPrivateMounts() {
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
	if name := kernel.NetNSName(); name != "" && a.netns == "" {
		return fmt.Sprintf("outside of it run \"%s\"", kernel.Shell(append([]string{"dispatcher", "-n", name}, a.args...)...))
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
