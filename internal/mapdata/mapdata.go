// Package mapdata finds, reads and changes the maps of a loaded program.
package mapdata

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/typed"
)

// A Map is a map of a program, open for reading only.
type Map struct {
	ID         uint32
	Name       string // as the kernel has it: cut after 15 bytes
	Type       ebpf.MapType
	Key, Value typed.Type
	MaxEntries uint32
	PerCPU     bool // each CPU has a value of its own
	Frozen     bool // nobody can change it from outside programs

	fd *ebpf.Map
}

// ours are the maps that libdispatcher binds to programs.
var ours = []string{"ld_chain", "ld_code", "ld_mark", "ld_records"}

// Of opens the maps of a program, by rising name; the caller closes them with Close.
func Of(program uint32) (maps []*Map, err error) {
	prog, err := kernel.OpenProgram(program, fmt.Sprintf("program id %d", program))
	if err != nil {
		return nil, err
	}
	defer prog.Close()
	ids, err := kernel.ProgramMaps(prog)
	if err != nil {
		return nil, err
	}
	for _, id := range ids {
		m, err := open(id)
		if errors.Is(err, fs.ErrNotExist) {
			continue // gone meanwhile
		}
		if err != nil {
			Close(maps)
			return nil, err
		}
		if slices.Contains(ours, m.Name) {
			m.fd.Close()
			continue
		}
		maps = append(maps, m)
	}
	slices.SortStableFunc(maps, func(a, b *Map) int { return strings.Compare(a.Name, b.Name) })
	return maps, nil
}

// Close closes maps.
func Close(maps []*Map) {
	for _, m := range maps {
		m.fd.Close()
	}
}

// mapInfo is the beginning of struct bpf_map_info (linux/bpf.h).
type mapInfo struct {
	_, id, keySize, valueSize, maxEntries, _ uint32
	name                                     [unix.BPF_OBJ_NAME_LEN]byte
	_, _                                     uint32 // the device, a type of the kernel's
	_, _                                     uint64 // the device's namespace
	btf, key, value                          uint32
	_                                        uint32
}

func open(id ebpf.MapID) (*Map, error) {
	fd, err := handle(id, unix.BPF_F_RDONLY)
	if err != nil {
		return nil, err
	}
	var info mapInfo
	if err := kernel.ObjectInfo(fd.FD(), &info); err != nil {
		fd.Close()
		return nil, kernel.Errno("map", err)
	}
	m := &Map{
		ID: info.id, Name: unix.ByteSliceToString(info.name[:]), Type: fd.Type(), MaxEntries: info.maxEntries, fd: fd,
		Key: typed.Of(nil, int(info.keySize)), Value: typed.Of(nil, int(info.valueSize)),
	}
	switch m.Type {
	case ebpf.PerCPUHash, ebpf.PerCPUArray, ebpf.LRUCPUHash, ebpf.PerCPUCGroupStorage:
		m.PerCPU = true
	}
	if all, err := fd.Info(); err == nil {
		m.Frozen = all.Frozen()
	}
	key, value := types(fd, &info)
	m.Value = typed.Of(value, int(info.valueSize))
	m.Key = typed.Of(key, int(info.keySize))
	if m.Type == ebpf.LPMTrie {
		m.Key = typed.KeyOf(key, int(info.keySize))
	} else if key == nil && m.array() {
		m.Key = typed.Of(&btf.Int{Name: "index", Size: 4}, 4)
	}
	return m, nil
}

// array tells whether the keys are the numbers below MaxEntries.
func (m *Map) array() bool { return m.Type == ebpf.Array || m.Type == ebpf.PerCPUArray }

// types returns the types of a map's keys and values; nil for what has none.
func types(m *ebpf.Map, info *mapInfo) (key, value btf.Type) {
	if info.btf == 0 {
		return nil, nil
	}
	h, err := btf.NewHandleFromID(btf.ID(info.btf))
	if err != nil {
		return nil, nil
	}
	defer h.Close()
	spec, err := h.Spec(nil)
	if err != nil {
		return nil, nil
	}
	if info.key != 0 {
		key, _ = spec.TypeByID(btf.TypeID(info.key))
	}
	if info.value != 0 {
		value, _ = spec.TypeByID(btf.TypeID(info.value))
	}
	return key, value
}

func handle(id ebpf.MapID, flags uint32) (*ebpf.Map, error) {
	fd, err := kernel.OpenMap(id, flags)
	if err != nil {
		return nil, kernel.Errno(fmt.Sprintf("map id %d", id), err)
	}
	m, err := ebpf.NewMapFromFD(fd)
	return m, kernel.Errno(fmt.Sprintf("map id %d", id), err)
}

// Called tells whether the map has the name. The kernel cuts names.
func (m *Map) Called(name string) bool {
	return name == m.Name || len(m.Name) == unix.BPF_OBJ_NAME_LEN-1 && strings.HasPrefix(name, m.Name)
}

// An Entry is a key and its value. Of a map with a value for each CPU, Value is their sum.
type Entry struct {
	Key, Value []byte
	PerCPU     [][]byte
}

// Zero tells whether the value is zero on all CPUs.
func (e Entry) Zero() bool {
	zero := func(b []byte) bool { return !slices.ContainsFunc(b, func(c byte) bool { return c != 0 }) }
	return zero(e.Value) && !slices.ContainsFunc(e.PerCPU, func(b []byte) bool { return !zero(b) })
}

// ErrNoKeys: the map is one whose entries have no keys, or cannot be listed: a ring buffer, a queue.
var ErrNoKeys = errors.New("its entries cannot be listed")

// Each calls fn for each entry. While programs change the map, entries may be missing, and an
// entry may be there twice.
func (m *Map) Each(fn func(Entry) error) error {
	if m.Key.Size() == 0 {
		return ErrNoKeys
	}
	it := m.fd.Iterate()
	for {
		var e Entry // a lookup writes into the slice that is there
		if !it.Next(&e.Key, m.room(&e)) {
			break
		}
		m.sum(&e)
		if err := fn(e); err != nil {
			return err
		}
	}
	switch err := it.Err(); {
	case err == nil, errors.Is(err, ebpf.ErrIterationAborted): // it changes faster than it is read
		return nil
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.Errno(524)): // ENOTSUPP, of include/linux/errno.h
		return ErrNoKeys
	default:
		return m.errno("read", err)
	}
}

// room returns where a lookup puts a value.
func (m *Map) room(e *Entry) any {
	if !m.PerCPU {
		return &e.Value
	}
	e.PerCPU = make([][]byte, ebpf.MustPossibleCPU())
	return e.PerCPU
}

func (m *Map) sum(e *Entry) {
	if m.PerCPU {
		e.Value = m.Value.Sum(e.PerCPU)
	}
}

// Get returns the entry with the key. The error is fs.ErrNotExist when there is none.
func (m *Map) Get(key []byte) (Entry, error) {
	e := Entry{Key: key}
	err := m.fd.Lookup(key, m.room(&e))
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return e, m.none(key)
	}
	if err != nil {
		return e, m.errno("read", err)
	}
	m.sum(&e)
	return e, nil
}

func (m *Map) none(key []byte) error {
	return hook.Because(fs.ErrNotExist, "map %s has no entry %s", m.Name, typed.Words(m.Key.Value(key)))
}

// Put writes an entry. Of a map with a value for each CPU the first CPU gets the value, and
// the others zero, so that the sum is the value. If it must be new, the error for a key that
// there is is fs.ErrExist.
func (m *Map) Put(key, value []byte, mustBeNew bool) error {
	flags := ebpf.UpdateAny
	if mustBeNew && !m.array() { // an array has all entries from the start
		flags = ebpf.UpdateNoExist
		if m.Type == ebpf.LPMTrie && trieOverwrites() {
			err := m.Each(func(e Entry) error {
				if bytes.Equal(e.Key, key) {
					return m.exists(key)
				}
				return nil
			})
			if err != nil {
				return err
			}
		}
	}
	return m.change(func(w *ebpf.Map) error {
		var v any = value
		if m.PerCPU {
			v = [][]byte{value}
		}
		err := w.Update(key, v, flags)
		switch {
		case errors.Is(err, ebpf.ErrKeyExist):
			return m.exists(key)
		case errors.Is(err, unix.E2BIG) && m.array():
			return hook.Because(hook.ErrUsage, "map %s has entries 0 to %d", m.Name, m.MaxEntries-1)
		case errors.Is(err, unix.E2BIG), errors.Is(err, unix.ENOSPC):
			return hook.Because(unix.ENOSPC, "map %s is full: it has %d entries", m.Name, m.MaxEntries)
		}
		return m.errno("change", err)
	})
}

func (m *Map) exists(key []byte) error {
	return hook.Because(fs.ErrExist, "map %s has an entry %s already", m.Name, typed.Words(m.Key.Value(key))).Hint("\"set\" changes it")
}

// trieOverwrites tells whether this kernel lets BPF_NOEXIST overwrite an entry of a trie, as all did before
// trie_update_elem (kernel/bpf/lpm_trie.c) was mended in 2024. A trie that cannot be made here is taken for one of those.
var trieOverwrites = sync.OnceValue(func() bool {
	trie, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.LPMTrie, KeySize: 5, ValueSize: 1, MaxEntries: 2, Flags: unix.BPF_F_NO_PREALLOC})
	if err != nil {
		return true
	}
	defer trie.Close()
	key, value := make([]byte, 5), make([]byte, 1)
	return trie.Put(key, value) != nil || trie.Update(key, value, ebpf.UpdateNoExist) == nil
})

// Delete removes an entry. The error is fs.ErrNotExist when there is none.
func (m *Map) Delete(key []byte) error {
	if m.array() {
		return hook.Because(hook.ErrUsage, "map %s is an array, and nothing can be deleted from it", m.Name).Hint("\"set\" makes an entry zero")
	}
	return m.change(func(w *ebpf.Map) error {
		err := w.Delete(key)
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return m.none(key)
		}
		return m.errno("change", err)
	})
}

// change calls fn with the map open for writing.
func (m *Map) change(fn func(*ebpf.Map) error) error {
	if m.Frozen {
		return hook.Because(hook.ErrIncompatible, "map %s is frozen: it has constants, which are set when the program is loaded", m.Name).Hint("use \"replace\" with --global")
	}
	w, err := handle(ebpf.MapID(m.ID), 0)
	if err != nil {
		return err
	}
	defer w.Close()
	return fn(w)
}

func (m *Map) errno(what string, err error) error {
	return kernel.Errno(what+" map "+m.Name, err)
}
