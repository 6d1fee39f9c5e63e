package state

import (
	"errors"
	"fmt"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

const readOnlyProg = unix.BPF_F_RDONLY_PROG

// NewSlot returns an empty slot. The processes that have it open, and its pins, own the
// member: the kernel empties a prog array when the last of them goes
// (bpf_map_put_uref, kernel/bpf/syscall.c), even while a dispatcher refers to it.
func NewSlot(name string) (*ebpf.Map, error) {
	m, err := ebpf.NewMap(&ebpf.MapSpec{
		Name: "ld_" + name, Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 1,
	})
	if err != nil {
		return nil, kernel.Errno("create slot", err)
	}
	return m, nil
}

// Slots are slots that were opened by their map ids. They do not become empty while
// they are open, so close them soon. Close waits where that would be too soon.
type Slots struct {
	// Pinned opens a slot by its pin, for a process that may not open it by its id; may
	// be nil.
	Pinned func(id uint32) (*ebpf.Map, error)
	maps   []*ebpf.Map
	unsure time.Time // when a slot without a known owner was opened last
}

// When the last user reference of a prog array goes, the kernel queues the work that
// empties the array, and takes a reference for it. If the last user reference goes
// again while that work is still queued, the kernel never releases the second
// reference, and the map stays until reboot (prog_array_map_clear,
// kernel/bpf/arraymap.c; seen on 6.18). While a slot is open here no work is queued. So
// it is enough to wait until work that was queued before has begun, and until work that
// has begun is done: meanwhile it can be queued again, but not start.
//
// hold is how long to wait where the kernel does not tell.
const hold = 5 * time.Millisecond

// statRefresh is a file that makes every CPU do some work when it is read, and waits for
// that (vmstat_refresh, mm/vmstat.c, Linux 4.7). The work goes through the same queue
// as the work that empties slots, in order. That takes 0.1 ms, also on busy CPUs.
const statRefresh = "/proc/sys/vm/stat_refresh"

// waitForQueuedWork waits until all CPUs have begun the work that was queued on them
// before.
func waitForQueuedWork() error {
	fd, err := unix.Open(statRefresh, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, err = unix.Read(fd, make([]byte, 1))
	return err
}

// Open opens a slot. owned means that it certainly has an owner, so that closing it
// here cannot empty it.
func (s *Slots) Open(id uint32, owned bool) (*ebpf.Map, error) {
	m, err := ebpf.NewMapFromID(ebpf.MapID(id))
	if err != nil {
		err = kernel.Errno(fmt.Sprintf("open slot with map id %d", id), err)
		if !errors.Is(err, unix.EPERM) || s.Pinned == nil {
			return nil, err
		}
		if m, err = s.Pinned(id); err != nil {
			return nil, err
		}
		owned = true
	}
	s.maps = append(s.maps, m)
	if !owned {
		s.unsure = time.Now()
	}
	if m.Type() != ebpf.ProgramArray || m.MaxEntries() != 1 {
		return nil, fmt.Errorf("map id %d is a %v of %d entries: not a slot", id, m.Type(), m.MaxEntries())
	}
	return m, nil
}

// Wait waits until slots that had no owner when they were opened are empty.
func (s *Slots) Wait() {
	if !s.unsure.IsZero() && waitForQueuedWork() != nil {
		time.Sleep(hold - time.Since(s.unsure))
	}
	s.unsure = time.Time{}
}

// Close waits, and closes the slots.
func (s *Slots) Close() {
	s.Wait()
	for _, m := range s.maps {
		if prog, err := Occupant(m); err == nil && prog == 0 {
			// There is nothing to delete. But the work that empties the slot may still
			// have the lock that Delete takes, for 10 to 35 ms: it waits for an RCU grace
			// period for each dispatcher that is not freed yet (prog_array_map_poke_run).
			_ = m.Delete(uint32(0))
			s.unsure = time.Now()
		}
	}
	s.Wait()
	for _, m := range s.maps {
		m.Close()
	}
	*s = Slots{Pinned: s.Pinned}
}

// Occupant returns the id of the program in a slot; 0 if the slot is empty.
func Occupant(slot *ebpf.Map) (uint32, error) {
	var id uint32
	err := slot.Lookup(uint32(0), &id)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, kernel.Errno("read slot", err)
	}
	return id, nil
}

// Fill puts a program in a slot, atomically for packets. The error is
// hook.ErrIncompatible if the kernel finds that the program does not fit.
func Fill(slot *ebpf.Map, prog *ebpf.Program) error {
	err := slot.Put(uint32(0), uint32(prog.FD()))
	switch {
	case errors.Is(err, unix.EINVAL):
		return hook.Because(hook.ErrIncompatible, "the program does not fit the slot: %w", err)
	case errors.Is(err, unix.EBUSY):
		return hook.Because(hook.ErrIncompatible, "another program extends this one (freplace), so it cannot be tail-called: %w", err)
	}
	return kernel.Errno("fill slot", err)
}

// ShapeOf finds out the shape of a loaded XDP program. The kernel does not report it, so
// ShapeOf tries to put the program into a slot of a dispatcher of each shape.
func ShapeOf(prog *ebpf.Program) (dispatch.Shape, error) {
	if prog.Type() != ebpf.XDP {
		return dispatch.Shape{}, hook.Because(hook.ErrIncompatible, "it is a %v program, not an XDP program", prog.Type())
	}
	var cause error
	for _, shape := range []dispatch.Shape{
		dispatch.Plain,
		{AttachType: ebpf.AttachXDP, Frags: true},
		{AttachType: ebpf.AttachNone},
		{AttachType: ebpf.AttachNone, Frags: true},
	} {
		err := Fits(prog, shape)
		if err == nil {
			return shape, nil
		}
		if !errors.Is(err, unix.EINVAL) {
			return dispatch.Shape{}, err
		}
		cause = err
	}
	for _, t := range []ebpf.AttachType{ebpf.AttachXDPDevMap, ebpf.AttachXDPCPUMap} {
		for _, frags := range []bool{false, true} {
			if Fits(prog, dispatch.Shape{AttachType: t, Frags: frags}) == nil {
				return dispatch.Shape{}, hook.Because(hook.ErrIncompatible,
					"it was loaded for a map entry (%v) and can run only there; load it from SEC(\"xdp\")", t)
			}
		}
	}
	return dispatch.Shape{}, hook.Because(hook.ErrIncompatible,
		"it cannot be tail-called: it may be bound to a device (offloaded or dev-bound-only); load it without a device: %w", cause)
}

// Fits tries whether the program can be a member of a chain of that shape.
func Fits(prog *ebpf.Program, shape dispatch.Shape) error {
	slot, err := NewSlot("probe")
	if err != nil {
		return err
	}
	defer slot.Close()
	m := members{shape, []hook.Settings{hook.Settings{}.WithDefaults()}, []*ebpf.Map{slot}, nil}
	probe, err := m.load(nil, nil)
	if err != nil {
		return err
	}
	defer probe.Close()
	if err := Fill(slot, prog); err != nil {
		return err
	}
	if kernel.Since(6, 18) { // this kernel has compared the types
		return nil
	}
	if t := entryType(prog); t != ebpf.AttachNone && t != shape.AttachType {
		return hook.Because(hook.ErrIncompatible, "the program is for a map entry: %w", unix.EINVAL)
	}
	return nil
}
