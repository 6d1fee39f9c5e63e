package libxdp

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/holders"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
)

// Clean removes the pins of dispatchers that were made for the device and are
// not attached, such as a process leaves that dies in the middle of a change.
// With an empty Name it does so for all devices. It returns the folders that it
// emptied. Files of others in such a folder stay.
//
// "xdp-loader clean" looks only at its own network namespace, and removes the
// pins of devices in other namespaces that share the bpffs. Clean keeps the pins
// of a dispatcher that a process has open, or that anything but the links of its
// programs refers to; it compares what it found with the references that the
// kernel counts. On kernels without BPF iterators it looks at all network
// namespaces that it can find instead.
func (d Device) Clean(ctx context.Context) (removed []string, err error) {
	return d.clean(ctx, true)
}

// Leftovers returns the folders that Clean would empty.
func (d Device) Leftovers(ctx context.Context) ([]string, error) {
	return d.clean(ctx, false)
}

func (d Device) clean(ctx context.Context, remove bool) (found []string, err error) {
	err = d.at("clean", func(s *site) error {
		index := 0
		if s.Name != "" {
			dev, err := s.device()
			if err != nil {
				return err
			}
			index = dev.Index
		}
		f, err := folderToChange(s.BPFFS)
		if err != nil {
			return err
		}
		if _, err := os.Stat(f.path); errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		l, err := f.lock(ctx)
		if err != nil {
			return err
		}
		defer l.unlock()
		if !l.alone {
			return hook.Because(hook.ErrBusy, "the lock of %s%s was not released in %v", f.path, kernel.LockedBy(f.path), kernel.LockWait)
		}
		found, err = l.sweep(func(p pinned) bool { return index == 0 || p.ifindex == index }, remove)
		return err
	})
	return found, err
}

// Remove removes the pins of a dispatcher that is no longer on the device. It
// is not an error if the bpffs has none.
func Remove(ctx context.Context, bpffs string, ifindex int, dispatcher ebpf.ProgramID) error {
	f, err := folderToChange(cmp.Or(bpffs, kernel.DefaultBPFFS))
	if err != nil {
		return err
	}
	l, err := f.lock(ctx)
	if err != nil {
		return err
	}
	defer l.unlock()
	dir := f.of(ifindex, uint32(dispatcher))
	for n := range MaxMembers {
		if prog, err := ebpf.LoadPinnedProgram(filepath.Join(dir, progPin(n)), nil); err == nil {
			_ = os.Remove(l.slotOf(kernel.ProgramID(prog)))
			prog.Close()
		}
	}
	return l.unpin(dir)
}

// tidy removes the pins of the dispatcher that was on the device, and of
// dispatchers that dead processes left. It leaves a failure to the next tidy.
// next is the chain that is on the device now; nil for nothing.
func (l *locked) tidy(was *snapshot, next *Chain) {
	if was.chain != nil && was.chain.Folder != "" {
		_ = l.unpin(was.chain.Folder)
		l.dropSlots(was.chain, next)
	}
	_, _ = l.sweep(func(p pinned) bool {
		return p.ifindex == was.device.Index && (next == nil || p.prog != next.Dispatcher.ID)
	}, true)
}

// sweep finds the pins of dispatchers that are on no device, and removes them. Pins
// stay if that is not known. The error is then why.
func (l *locked) sweep(which func(pinned) bool, remove bool) (found []string, err error) {
	list, err := l.dispatchers()
	if err != nil || !l.alone {
		return nil, err
	}
	var idle func(pinned) (bool, error)
	var unknown error
	for _, p := range list {
		if !which(p) {
			continue
		}
		if len(pinsIn(p.dir)) > 0 {
			if idle == nil { // finding that out takes some 30 ms
				var done func()
				if idle, done, err = idleDispatchers(holders.Options{Self: true}); err != nil {
					return found, err
				}
				defer done()
			}
			if is, err := idle(p); err != nil {
				unknown = fmt.Errorf("whether the dispatcher of %s is on a device: %w", p.dir, err)
				continue
			} else if !is {
				continue
			}
		}
		if remove {
			if err := l.unpin(p.dir); err != nil {
				return found, err
			}
		}
		found = append(found, p.dir)
	}
	slots, err := l.sweepSlots(remove)
	return append(found, slots...), kernel.Join(unknown, err)
}

// idleDispatchers finds out what holds programs. idle tells that only the links
// of its own components hold a dispatcher: it is on no device, and no process
// is about to attach it.
func idleDispatchers(o holders.Options) (idle func(pinned) (bool, error), done func(), err error) {
	f := holders.Open(o)
	view, err := f.Look(hook.HolderProgram)
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	onDevices := sync.OnceValues(attached)
	return func(p pinned) (bool, error) {
		id := p.prog
		prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
		if errors.Is(err, fs.ErrNotExist) {
			return true, nil
		}
		if err != nil {
			return false, kernel.Errno(fmt.Sprintf("program id %d", id), err)
		}
		prog.Close()
		h, err := view.Of(hook.HolderRef{Kind: hook.HolderProgram, ID: id})
		if errors.Is(err, fs.ErrNotExist) {
			return false, nil // it was loaded since
		}
		if err != nil || len(h.Processes) > 0 || len(h.Pins) > 0 {
			return false, err
		}
		for _, o := range h.Objects {
			if o.Kind != hook.HolderLink || o.How != "attached to it" {
				return false, nil
			}
		}
		if h.Counted > 0 {
			return h.Verified || h.Counted == h.Found+untold(p, h.Objects), nil
		}
		on, err := onDevices()
		return err == nil && !on[id], err
	}, f.Close, nil
}

// untold counts the links of a dispatcher's components that are missing among
// the found objects. Each such link refers to the dispatcher. Before Linux
// 5.19, which has an iterator for links, all are missing.
func untold(p pinned, found []hook.HolderObject) (n int) {
	for slot := range MaxMembers {
		l, err := link.LoadPinnedLink(filepath.Join(p.dir, linkPin(slot)), nil)
		if err != nil {
			continue
		}
		info, err := l.Info()
		l.Close()
		if err != nil || info.Tracing() == nil {
			continue
		}
		// Before Linux 5.13 a link reports 0, whatever its target.
		target := uint32(info.Tracing().TargetObjectId)
		known := slices.ContainsFunc(found, func(o hook.HolderObject) bool { return o.ID == uint32(info.ID) })
		if !known && (target == 0 || target == p.prog) {
			n++
		}
	}
	return n
}

// attached returns the programs that are on devices, in all network namespaces
// that can be found. An error means that there may be others.
func attached() (map[uint32]bool, error) {
	on := map[uint32]bool{}
	all, err := kernel.NetNamespaces()
	for _, ns := range all {
		if err == nil {
			err = rtnl.In(ns, func(conn *rtnl.Conn) error {
				devices, err := conn.Devices()
				for _, d := range devices {
					for _, x := range d.XDP {
						on[x.Program] = true
					}
				}
				return err
			})
		}
		ns.Close()
	}
	return on, err
}
