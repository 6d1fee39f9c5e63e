package libxdp

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/holders"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
)

// Clean removes the pins of dispatchers that were made for the device and are on
// none, as a process leaves them that dies in the middle of a change; for an
// empty Name, those of all devices. It returns the folders that it emptied. What
// others have put into such a folder stays there.
//
// "xdp-loader clean" looks only at the network namespace that it runs in, and
// takes the pins of devices in others that share the bpffs. Here a dispatcher
// keeps its pins if a process has it open or anything refers to it but the links
// of its programs, which is compared with the references that the kernel counts.
// Where the kernel has no BPF iterators to tell them, all network namespaces are
// looked at that can be found.
func (d Device) Clean(ctx context.Context) (removed []string, err error) {
	return d.clean(ctx, true)
}

// Leftovers returns what Clean would remove.
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
			return hook.Because(hook.ErrBusy, "another process has had the lock of %s for %v", f.path, kernel.LockWait)
		}
		found, err = l.sweep(func(p pinned) bool { return index == 0 || p.ifindex == index }, remove)
		return err
	})
	return found, err
}

// Remove takes away the pins of a dispatcher that is on the device no more.
// Where the bpffs has none that is no error.
func Remove(ctx context.Context, bpffs string, ifindex int, dispatcher ebpf.ProgramID) error {
	if bpffs == "" {
		bpffs = kernel.DefaultBPFFS
	}
	f, err := folderToChange(bpffs)
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
			_ = os.Remove(l.slotOf(describe(prog).ID))
			prog.Close()
		}
	}
	return l.unpin(dir)
}

// tidy takes away the pins of the dispatcher that was on the device, and of
// those that processes left behind which died before they came to that. A
// failure leaves it to the next one. next is what is there now; nil for nothing.
func (l *locked) tidy(was *snapshot, next *Chain) {
	if was.chain != nil && was.chain.Folder != "" {
		_ = l.unpin(was.chain.Folder)
		l.dropSlots(was.chain, next)
	}
	_, _ = l.sweep(func(p pinned) bool {
		return p.ifindex == was.device.Index && (next == nil || p.prog != next.Dispatcher.ID)
	}, true)
}

// sweep finds the pins of those dispatchers that are on no device, and takes
// them away.
func (l *locked) sweep(which func(pinned) bool, remove bool) (found []string, err error) {
	list, err := l.dispatchers()
	if err != nil || !l.alone {
		return nil, err
	}
	var idle func(pinned) bool
	for _, p := range list {
		if !which(p) {
			continue
		}
		if len(pinsIn(p.dir)) > 0 {
			if idle == nil { // it takes some 30 ms to find out
				var done func()
				if idle, done, err = idleDispatchers(); err != nil {
					return found, err
				}
				defer done()
			}
			if !idle(p) {
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
	return append(found, slots...), err
}

// idleDispatchers looks at what holds programs. idle tells that nothing holds a
// dispatcher but the links of its own components, so that it is on no device,
// and nobody is about to put it on one.
func idleDispatchers() (idle func(pinned) bool, done func(), err error) {
	f := holders.Open(holders.Options{Self: true})
	view, err := f.Look(holders.Program)
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	var on map[uint32]bool
	return func(p pinned) bool {
		id := p.prog
		prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
		if errors.Is(err, fs.ErrNotExist) {
			return true
		}
		prog.Close()
		h, err := view.Of(holders.Ref{Kind: holders.Program, ID: id})
		if err != nil || len(h.Processes) > 0 || len(h.Pins) > 0 {
			return false
		}
		for _, o := range h.Objects {
			if o.Kind != holders.Link || o.How != "attached to it" {
				return false
			}
		}
		if h.Counted > 0 {
			return h.Verified || h.Counted == h.Found+untold(p, h.Objects)
		}
		if on == nil {
			on = attached()
		}
		return !on[id]
	}, f.Close, nil
}

// untold counts the links of a dispatcher's components, each of which refers to
// it, that are not among what was found to refer to it: all before Linux 5.19,
// which has no iterator for links.
func untold(p pinned, found []holders.Object) (n int) {
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
		// 0 is what a link says before Linux 5.13, whatever it is attached to.
		target := uint32(info.Tracing().TargetObjectId)
		known := slices.ContainsFunc(found, func(o holders.Object) bool { return o.ID == uint32(info.ID) })
		if !known && (target == 0 || target == p.prog) {
			n++
		}
	}
	return n
}

// attached returns the programs that are on devices, in all network namespaces
// that can be found; nil is none.
func attached() map[uint32]bool {
	on := map[uint32]bool{}
	all, err := kernel.NetNamespaces()
	if err != nil {
		return nil
	}
	for _, ns := range all {
		defer ns.Close()
		_ = rtnl.In(ns, func(conn *rtnl.Conn) error {
			devices, err := conn.Devices()
			for _, d := range devices {
				for _, x := range d.XDP {
					on[x.Program] = true
				}
			}
			return err
		})
	}
	return on
}
