package load

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// Successor loads a program that replaces old, with old's maps, see Inherit. Without
// old it is src.Load.
func Successor(src Source, old *Loaded, want Want) (*Loaded, error) {
	if old == nil {
		return src.Load(want)
	}
	src, release, err := Inherit(src, old)
	if err != nil {
		return nil, err
	}
	defer release()
	return src.Load(want)
}

// Inherit returns src with the maps of old: the new program takes over the old
// program's counters, lists and flows. Maps are the same when they have the same name.
// Constants and variables (.rodata, .data, .bss) and programs for tail calls are not
// inherited, because they belong to the code.
//
// A program that is already loaded, or a source with Options.NewMaps, inherits nothing.
// The caller calls release after the load.
func Inherit(src Source, old *Loaded) (_ Source, release func(), err error) {
	switch s := src.(type) {
	case File:
		s.old, release, err = inherit(old, s.Options)
		return s, release, err
	case Spec:
		s.old, release, err = inherit(old, s.Options)
		return s, release, err
	}
	return src, func() {}, nil
}

// An inheritance is what a program takes over from the program that it replaces.
type inheritance struct {
	maps      map[string]*ebpf.Map // by name
	ambiguous map[string]bool      // kernel names that several maps of the old program have
}

// inherit returns the maps of old that a new program takes over. The caller calls
// release after the load.
func inherit(old *Loaded, o Options) (from inheritance, release func(), err error) {
	from = inheritance{map[string]*ebpf.Map{}, map[string]bool{}}
	release = func() {
		for _, m := range from.maps {
			m.Close()
		}
	}
	defer func() {
		if err != nil {
			release()
		}
	}()
	if o.NewMaps {
		return from, release, nil
	}
	maps, err := old.openMaps()
	if err != nil {
		return from, release, kernel.Errno("maps of the program to be replaced", err)
	}
	for i, m := range maps {
		info, err := m.Info()
		if err != nil {
			for _, m := range maps[i:] {
				m.Close()
			}
			return from, release, kernel.Errno("maps of the program to be replaced", err)
		}
		if info.Name == "" || strings.Contains(info.Name, ".") || m.Type() == ebpf.ProgramArray || from.ambiguous[info.Name] {
			m.Close()
			continue
		}
		if first := from.maps[info.Name]; first != nil {
			from.ambiguous[info.Name] = true
			delete(from.maps, info.Name)
			first.Close()
			m.Close()
			continue
		}
		from.maps[info.Name] = m
	}
	return from, release, nil
}

// openMaps opens the maps of the program; the caller closes them. To open them by their ids
// takes CAP_SYS_ADMIN, which the maps that were made for the program do without.
func (l *Loaded) openMaps() (maps []*ebpf.Map, err error) {
	defer func() {
		if err != nil {
			for _, m := range maps {
				m.Close()
			}
		}
	}()
	ids, err := kernel.ProgramMaps(l.Program)
	if err != nil {
		return nil, err
	}
	for _, id := range ids {
		m, err := ebpf.NewMapFromID(id)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue
		case errors.Is(err, unix.EPERM) && l.Maps != nil:
			return cloneMaps(l.Maps)
		case err != nil:
			return maps, err
		}
		maps = append(maps, m)
	}
	return maps, nil
}

func cloneMaps(of map[string]*ebpf.Map) (maps []*ebpf.Map, err error) {
	for _, m := range of {
		twin, err := m.Clone()
		if err != nil {
			return maps, err
		}
		maps = append(maps, twin)
	}
	return maps, nil
}

// shared returns the maps to use instead of the file's own: the requested maps and the
// inherited ones.
func (s Spec) shared(spec *ebpf.CollectionSpec) (map[string]*ebpf.Map, error) {
	shared := map[string]*ebpf.Map{}
	seen := map[string]bool{}
	for name, ms := range spec.Maps {
		if m := s.Options.Maps[name]; m != nil {
			ms.MaxEntries = m.MaxEntries()
			shared[name] = m
			continue
		}
		cut := name[:min(len(name), unix.BPF_OBJ_NAME_LEN-1)]
		if ms.Pinning == ebpf.PinByName || ms.Type == ebpf.ProgramArray {
			continue
		}
		m := s.old.maps[cut]
		if seen[cut] || s.old.ambiguous[cut] {
			return nil, hook.Because(hook.ErrUsage, "there are several maps whose name begins with %q, where the kernel cuts names: choose with Maps or NewMaps (--map, --new-maps)", cut)
		}
		if m == nil {
			continue
		}
		seen[cut] = true
		// The loader of the old program may have sized the map (bpf_map__set_max_entries):
		// the program is verified against the map that there is.
		ms.MaxEntries = m.MaxEntries()
		if err := compatible(ms, m); err != nil {
			return nil, hook.Because(hook.ErrIncompatible, "map %q differs from that of the program to be replaced (%w): start with new maps (NewMaps, --new-maps), or name one (Maps, --map)", name, err)
		}
		shared[name] = m
	}
	return shared, nil
}

// compatible returns an error when a map cannot replace the map in the file.
func compatible(spec *ebpf.MapSpec, m *ebpf.Map) error {
	err := spec.Compatible(m)
	if err != nil {
		return fmt.Errorf("%s", strings.TrimSuffix(err.Error(), ": "+ebpf.ErrMapIncompatible.Error()))
	}
	return nil
}
