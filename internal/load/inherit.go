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

// Inherit returns the source of a program that replaces old such that it goes
// on with the maps of old: counters, lists and flows stay. A map is the same
// when it has the same name. Constants and variables (.rodata, .data, .bss) are
// not inherited, nor are programs for tail calls: those belong to the code.
//
// It concerns programs that are still to be loaded, and not those whose Options
// say NewMaps. The caller calls release after the load.
func Inherit(src Source, old *ebpf.Program) (_ Source, release func(), err error) {
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

// An inheritance is what a program goes on with from the one that it replaces.
type inheritance struct {
	maps      map[string]*ebpf.Map // by name
	ambiguous map[string]bool      // names in the kernel that several of the old program's maps have
}

// inherit returns the maps of old to go on with.
func inherit(old *ebpf.Program, o Options) (from inheritance, release func(), err error) {
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
	info, err := old.Info()
	if err != nil {
		return from, release, kernel.Errno("the program to be replaced", err)
	}
	ids, _ := info.MapIDs()
	for _, id := range ids {
		m, err := ebpf.NewMapFromID(id)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return from, release, kernel.Errno("maps of the program to be replaced", err)
		}
		info, err := m.Info()
		if err != nil {
			m.Close()
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

// shared returns the maps to use in the place of the file's own: those that
// were asked for, and those that are inherited.
func (s Spec) shared(spec *ebpf.CollectionSpec) (map[string]*ebpf.Map, error) {
	shared := map[string]*ebpf.Map{}
	seen := map[string]bool{}
	for name, ms := range spec.Maps {
		if m := s.Options.Maps[name]; m != nil {
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
		if err := compatible(ms, m); err != nil {
			return nil, hook.Because(hook.ErrIncompatible, "map %q differs from that of the program to be replaced (%w): start with new maps (NewMaps, --new-maps), or name one (Maps, --map)", name, err)
		}
		shared[name] = m
	}
	return shared, nil
}

// compatible tells why a map cannot take the place of the one in the file.
func compatible(spec *ebpf.MapSpec, m *ebpf.Map) error {
	err := spec.Compatible(m)
	if err != nil {
		return fmt.Errorf("%s", strings.TrimSuffix(err.Error(), ": "+ebpf.ErrMapIncompatible.Error()))
	}
	return nil
}
