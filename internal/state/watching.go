package state

import (
	"encoding/binary"
	"fmt"
	"io/fs"
	"time"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

const (
	watchName  = "watch"     // of the prog array; NewSlot adds a prefix
	countsName = "ld_counts" // of the map of counters
)

// A Watch is what a process that watches a chain has open: a prog array with the
// counting dispatcher, and the counters. The dispatcher that is attached tail-calls into
// the prog array. The array is owned like a slot: when the last watcher closes it or
// dies, the kernel empties it, and packets run the plain code after that call.
type Watch struct {
	ID     uint32 // map id of the prog array
	array  *ebpf.Map
	opened Slots // has the array if another watcher made it
	counts *ebpf.Map
	slots  []uint32 // map ids, in the order of the counters
}

// BuildWatched loads a dispatcher that can be watched, and the counting dispatcher. The
// caller closes both.
func BuildWatched(c *Chain, slots []*ebpf.Map, codes []*dispatch.Code) (*Dispatcher, *Watch, error) {
	w := &Watch{}
	prog, err := w.build(c, c.members(slots, codes))
	if err != nil {
		w.Close()
		return nil, nil, err
	}
	return prog, w, nil
}

func (w *Watch) build(c *Chain, m members) (*Dispatcher, error) {
	var err error
	w.setSlots(c)
	w.counts, err = ebpf.NewMap(&ebpf.MapSpec{
		Name: countsName, Type: ebpf.PerCPUArray, KeySize: 4, ValueSize: w.size(), MaxEntries: 1,
	})
	if err != nil {
		return nil, kernel.Errno("create counters", err)
	}
	if w.array, err = NewSlot(watchName); err != nil {
		return nil, err
	}
	if w.ID, err = kernel.MapID(w.array); err != nil {
		return nil, err
	}

	bySlots := m
	bySlots.codes = nil // the programs of linked members are in their slots as well
	counting, err := bySlots.loadCode(dispatch.CountingName, dispatch.Counting(m.settings), map[string]*ebpf.Map{dispatch.CountsRef: w.counts}, 0)
	if err != nil {
		return nil, err
	}
	defer counting.Close()
	if err := Fill(w.array, counting); err != nil {
		return nil, err
	}
	prog, err := m.load(dispatch.Watched, map[string]*ebpf.Map{dispatch.WatchRef: w.array})
	if err != nil {
		return nil, err
	}
	c.Watch = w.ID
	return m.complete(prog, c)
}

func (w *Watch) setSlots(c *Chain) {
	for _, s := range c.Slots {
		w.slots = append(w.slots, s.MapID)
	}
}

// size is the size of the counters of one CPU.
func (w *Watch) size() uint32 { return uint32(max(len(w.slots), 1) * dispatch.CountsSize) }

// OpenWatch makes the caller a watcher of a chain that is watched already. The error is
// fs.ErrNotExist if no process watches it any more.
func OpenWatch(c *Chain) (*Watch, error) {
	w := &Watch{ID: c.Watch}
	w.setSlots(c)
	if err := w.open(); err != nil {
		w.Close()
		return nil, err
	}
	return w, nil
}

func (w *Watch) open() error {
	var err error
	if w.array, err = w.opened.Open(w.ID, false); err != nil {
		return err
	}
	w.opened.Wait() // if the last watcher has just gone, the array becomes empty
	id, err := Occupant(w.array)
	if err == nil && id == 0 {
		err = hook.Because(fs.ErrNotExist, "no process watches the chain any more")
	}
	if err != nil {
		return err
	}
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
	if err != nil {
		return kernel.Errno("counting dispatcher", err)
	}
	defer prog.Close()
	info, err := prog.Info()
	if err != nil {
		return kernel.Errno("counting dispatcher", err)
	}
	// The counters come first in the code, and so in the list of maps. The other maps
	// are slots: do not open them, see Slots.
	maps, _ := info.MapIDs()
	if info.Name != dispatch.CountingName || len(maps) == 0 {
		return fmt.Errorf("what counts for map id %d is a program %q: %w", w.ID, info.Name, ebpf.ErrNotSupported)
	}
	if w.counts, err = ebpf.NewMapFromID(maps[0]); err != nil {
		return kernel.Errno("counters", err)
	}
	if m := w.counts; m.Type() != ebpf.PerCPUArray || m.ValueSize() != w.size() {
		return fmt.Errorf("the counters for map id %d are a %v with values of %d bytes: %w", w.ID, m.Type(), m.ValueSize(), ebpf.ErrNotSupported)
	}
	return nil
}

// Abandoned tells whether a chain has a dispatcher that can be watched but no process
// watches. It opens the prog array for a moment, see [Slots].
func Abandoned(c *Chain) bool {
	if c.Watch == 0 {
		return false
	}
	var opened Slots
	defer opened.Close()
	array, err := opened.Open(c.Watch, false)
	if err != nil {
		return false
	}
	opened.Wait()
	id, err := Occupant(array)
	return err == nil && id == 0
}

// Read returns what was counted so far on all CPUs, for each slot by its map id.
func (w *Watch) Read() (map[uint32]dispatch.Counts, error) {
	value, err := w.counts.LookupBytes(uint32(0))
	if err != nil {
		return nil, kernel.Errno("read counters", err)
	}
	each := make([]dispatch.Counts, len(value)/dispatch.CountsSize)
	if _, err := binary.Decode(value, binary.NativeEndian, each); err != nil {
		return nil, fmt.Errorf("read counters: %w", err)
	}
	sums := make(map[uint32]dispatch.Counts, len(w.slots))
	for i, slot := range w.slots {
		for ; i < len(each); i += len(w.slots) { // the counters of a CPU follow those of the one before
			sums[slot] = sums[slot].Plus(each[i])
		}
	}
	return sums, nil
}

// Alive tells whether the counting dispatcher is still in the prog array.
func (w *Watch) Alive() bool {
	id, err := Occupant(w.array)
	return err == nil && id != 0
}

// Close ends the watch.
func (w *Watch) Close() {
	w.opened.Close()
	for _, m := range []*ebpf.Map{w.array, w.counts} {
		if m != nil {
			m.Close()
		}
	}
}

// ClockTime measures how long a program takes to read the clock.
func ClockTime() (time.Duration, error) {
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "ld_clock", Type: ebpf.XDP, Instructions: dispatch.Clock(), License: "Dual BSD/GPL",
	})
	if err != nil {
		return 0, kernel.Errno("load a clock", err)
	}
	defer prog.Close()
	const runs = 100
	best := uint32(1<<32 - 1) // the shortest: longer runs were interrupted
	for range runs {
		took, err := prog.Run(&ebpf.RunOptions{Data: make([]byte, 64)})
		if err != nil {
			return 0, kernel.Errno("run a clock", err)
		}
		best = min(best, took)
	}
	return time.Duration(best) * time.Nanosecond / dispatch.ClockCalls, nil
}
