package state

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// A Dispatcher is a loaded dispatcher with its description.
type Dispatcher struct {
	*ebpf.Program
	description *ebpf.Map
}

// Close closes the descriptors; a nil Dispatcher is none.
func (d *Dispatcher) Close() error {
	if d == nil {
		return nil
	}
	d.description.Close()
	return d.Program.Close()
}

// Clone opens the dispatcher once more.
func (d *Dispatcher) Clone() (*Dispatcher, error) {
	prog, err := d.Program.Clone()
	if err != nil {
		return nil, kernel.Errno("dispatcher", err)
	}
	description, err := d.description.Clone()
	if err != nil {
		prog.Close()
		return nil, kernel.Errno("dispatcher", err)
	}
	return &Dispatcher{prog, description}, nil
}

// OpenDispatcher opens the description of a loaded dispatcher. The Dispatcher has a
// descriptor of its own for the program; the caller closes it. The error is ErrNotOurs if
// the program has no description.
func OpenDispatcher(prog *ebpf.Program) (*Dispatcher, error) {
	info, err := prog.Info()
	if err != nil {
		return nil, kernel.Errno("dispatcher", err)
	}
	if info.Name != dispatch.ProgramName {
		return nil, ErrNotOurs
	}
	ids, _ := info.MapIDs()
	// The description was bound last. The search begins there, so that it opens no
	// slot; see Slots for the harm that could do.
	description, err := firstFrozen(slices.Backward(ids), MapName)
	if err != nil {
		return nil, err
	}
	twin, err := prog.Clone()
	if err != nil {
		description.Close()
		return nil, kernel.Errno("dispatcher", err)
	}
	return &Dispatcher{twin, description}, nil
}

// Chain reads the description.
func (d *Dispatcher) Chain() (*Chain, error) {
	value, err := d.description.LookupBytes(uint32(0))
	if err != nil {
		return nil, kernel.Errno(MapName, err)
	}
	return Unmarshal(value)
}

// Find reads the description of a chain from its dispatcher. The error is ErrNotOurs
// if the program has no description.
func Find(prog *ebpf.Program) (*Chain, error) {
	d, err := OpenDispatcher(prog)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.Chain()
}

// The pins of a dispatcher and its description are in the folder of the chain, with the id
// of the program in their names.
const (
	dispatcherPrefix  = "dispatcher_"
	descriptionPrefix = "description_"
)

func ofDispatcher(name string) bool {
	return strings.HasPrefix(name, dispatcherPrefix) || strings.HasPrefix(name, descriptionPrefix)
}

func (p *Pins) dispatcherPaths(folder string, prog uint32) (program, description string) {
	id := strconv.FormatUint(uint64(prog), 10)
	return p.Path(folder, dispatcherPrefix+id), p.Path(folder, descriptionPrefix+id)
}

// PinDispatcher pins a dispatcher beside the members of its chain, for processes that may
// not open it by its id. It does nothing where the chain has no pins; and without a word
// where it cannot pin: the chain does not need these pins, and a sweep makes them later.
// The dispatcher can be pinned once.
func (p *Pins) PinDispatcher(folder string, d *Dispatcher) {
	if p == nil {
		return
	}
	program, description := p.dispatcherPaths(folder, kernel.ProgramID(d.Program))
	err := d.Program.Pin(program)
	if errors.Is(err, fs.ErrExist) { // of a process that died before it had pinned both
		p.UnpinDispatcher(folder, kernel.ProgramID(d.Program))
		err = d.Program.Pin(program)
	}
	if err != nil {
		return
	}
	if d.description.Pin(description) != nil {
		_ = os.Remove(program)
	}
}

// UnpinDispatcher removes the pins of a dispatcher that the chain does not have any more.
func (p *Pins) UnpinDispatcher(folder string, prog uint32) {
	if p == nil {
		return
	}
	program, description := p.dispatcherPaths(folder, prog)
	_ = os.Remove(description)
	_ = os.Remove(program)
}

// HasDispatcher tells whether the dispatcher is pinned.
func (p *Pins) HasDispatcher(folder string, prog uint32) bool {
	program, description := p.dispatcherPaths(folder, prog)
	_, err := os.Lstat(program)
	if err == nil {
		_, err = os.Lstat(description)
	}
	return err == nil
}

// Dispatcher opens the dispatcher by its pins. The error is fs.ErrNotExist if it is not
// pinned.
func (p *Pins) Dispatcher(folder string, id uint32) (*Dispatcher, error) {
	program, description := p.dispatcherPaths(folder, id)
	prog, err := ebpf.LoadPinnedProgram(program, nil)
	if err != nil {
		return nil, kernel.PathErrno("open the pin", program, err)
	}
	m, err := ebpf.LoadPinnedMap(description, nil)
	if err != nil {
		prog.Close()
		return nil, kernel.PathErrno("open the pin", description, err)
	}
	d := &Dispatcher{prog, m}
	if err := d.check(id); err != nil {
		d.Close()
		return nil, fmt.Errorf("%s: %w", description, err)
	}
	return d, nil
}

// check returns ErrNotOurs unless the description belongs to the program of that id.
func (d *Dispatcher) check(id uint32) error {
	info, err := d.Program.Info()
	if err != nil {
		return kernel.Errno("dispatcher", err)
	}
	description, err := kernel.MapID(d.description)
	if err != nil {
		return err
	}
	ids, _ := info.MapIDs()
	if has, _ := info.ID(); uint32(has) != id || info.Name != dispatch.ProgramName || !slices.Contains(ids, ebpf.MapID(description)) {
		return ErrNotOurs
	}
	return isFrozen(d.description, MapName)
}

// DropDispatchers removes the pins of all dispatchers in the folder but the one with the id:
// processes that died left them.
func (l *Locked) DropDispatchers(folder string, but uint32) {
	program, description := l.dispatcherPaths(folder, but)
	entries, _ := entriesOf(l.Path(folder), "d")
	for _, e := range entries {
		if path := l.Path(folder, e.Name()); ofDispatcher(e.Name()) && path != program && path != description {
			_ = os.Remove(path)
		}
	}
}

// Slot opens the slot of a member by its pin. The error is fs.ErrNotExist if the member has
// no pin of that slot.
func (p *Pins) Slot(folder, member string, id uint32) (*ebpf.Map, error) {
	path := p.HeldPath(folder, member)
	m, err := ebpf.LoadPinnedMap(path, nil)
	if err != nil {
		return nil, kernel.PathErrno("open the pin", path, err)
	}
	switch has, err := kernel.MapID(m); {
	case err != nil:
		m.Close()
		return nil, err
	case has != id:
		m.Close()
		return nil, fs.ErrNotExist
	}
	return m, nil
}
