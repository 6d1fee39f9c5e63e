package xdploader

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/libxdp"
)

// An object is a program of an object file to attach. It is a libxdp.Source.
type object struct {
	spec     *ebpf.CollectionSpec // nil for an object that was compiled for the other byte order
	function string
	settings hook.Settings // from the object file, or from the options
	pins     string        // folder for the pins of maps; may be empty
	refused  error         // the kernel's refusal to load it for a chain
}

// openObject reads an object file and chooses the program by the options.
func (t *tool) openObject(path string, v *values) (*object, error) {
	o, err := t.readObject(path, v)
	if err != nil {
		t.warn("Couldn't open file '%s': %s", path, words(err))
		t.detail(err)
		return nil, err
	}
	if v.prio != 0 {
		o.settings.Priority = int(v.prio)
	}
	if v.actions != 0 {
		o.settings.ContinueOn = v.actions
	}
	o.pins = v.given["pin-path"]
	return o, nil
}

func (t *tool) readObject(path string, v *values) (*object, error) {
	if st, err := os.Stat(path); err == nil && st.IsDir() {
		return nil, &failure{errLibelf, nil}
	}
	b, err := load.ReadFile(path)
	if errors.Is(err, hook.ErrUsage) {
		return nil, &failure{errFormat, err}
	}
	if err != nil {
		return nil, err
	}
	all, order, err := programs(b)
	if err != nil {
		return nil, err
	}
	i, where := 0, ""
	switch {
	case v.has("section"):
		i = slices.IndexFunc(all, func(p program) bool { return p.section == v.given["section"] })
		where = " section " + v.given["section"]
	case v.has("prog-name"):
		i = slices.IndexFunc(all, func(p program) bool { return p.name == v.given["prog-name"] })
	}
	if i < 0 || i >= len(all) {
		t.libWarn("Couldn't find xdp program in bpf object%s", where)
		return nil, failed(unix.ENOENT, nil)
	}
	o := &object{
		function: all[i].name,
		settings: hook.Settings{Priority: libxdp.DefaultPriority, ContinueOn: hook.SetOf(hook.Pass)},
	}
	if order != kernel.ByteOrder {
		return o, nil // loading it will be refused
	}
	spec, err := load.Parse(b)
	if err != nil {
		return nil, failed(unix.EINVAL, err)
	}
	o.spec = spec
	p := spec.Programs[o.function]
	if p == nil {
		return nil, failed(unix.EOPNOTSUPP, errors.New("the function is static"))
	}
	if p.Type != ebpf.XDP {
		// Whatever its section is, the program becomes an XDP program.
		p.Type, p.AttachType, p.AttachTo = ebpf.XDP, ebpf.AttachNone, ""
	}
	asks, err := libxdp.RunConfig(spec.Types, o.function)
	if err != nil {
		t.libWarn("%v", err)
		return nil, failed(unix.EOPNOTSUPP, err)
	}
	o.settings = asks.Or(o.settings)
	nameMaps(spec, path)
	return o, nil
}

// A program is a function of an object file that can be loaded.
type program struct{ name, section string }

// programs lists the programs of an object file in libbpf's order: by section,
// and within a section by symbol. Without a choice the first one is loaded.
func programs(b []byte) (list []program, order binary.ByteOrder, err error) {
	// debug/elf is not safe against hostile input.
	defer func() {
		if recover() != nil {
			err = &failure{errFormat, nil}
		}
	}()
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil || f.Machine != elf.EM_BPF || f.Type != elf.ET_REL {
		return nil, nil, &failure{errFormat, err}
	}
	symbols, err := f.Symbols()
	if err != nil {
		return nil, nil, &failure{errFormat, err}
	}
	for i, s := range f.Sections {
		// Functions in .text are called by other functions.
		if s.Type != elf.SHT_PROGBITS || s.Flags&elf.SHF_EXECINSTR == 0 || s.Name == ".text" {
			continue
		}
		for _, sym := range symbols {
			if int(sym.Section) == i && elf.ST_TYPE(sym.Info) == elf.STT_FUNC {
				list = append(list, program{sym.Name, s.Name})
			}
		}
	}
	return list, f.ByteOrder, nil
}

// nameMaps gives the maps of global variables the names that libbpf gives them
// in the kernel, such as "filter.rodata". Scripts find them by these names
// (internal_map_name, libbpf.c).
func nameMaps(spec *ebpf.CollectionSpec, path string) {
	const maxName, minSuffix = unix.BPF_OBJ_NAME_LEN - 1, len(".rodata")
	file, _, _ := strings.Cut(filepath.Base(path)[:min(len(filepath.Base(path)), maxName)], ".")
	for name, m := range spec.Maps {
		if !strings.HasPrefix(name, ".") {
			continue
		}
		suffix := name[:min(len(name), maxName)]
		prefix := file[:min(len(file), maxName-max(minSuffix, len(suffix)))]
		if strings.Contains(name[1:], ".") {
			prefix = ""
		}
		m.Name = strings.Map(func(r rune) rune {
			if r == '.' || r == '_' || '0' <= r && r <= '9' || 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' {
				return r
			}
			return '_'
		}, prefix+suffix)
	}
}

// load loads the program. spec is a copy of the object's spec that fit has
// changed for its use.
func (o *object) load(fit func(*ebpf.ProgramSpec)) (*ebpf.Program, error) {
	if o.spec == nil {
		return nil, &failure{errEndian, nil}
	}
	spec := o.spec.Copy()
	maps.DeleteFunc(spec.Programs, func(name string, _ *ebpf.ProgramSpec) bool { return name != o.function })
	fit(spec.Programs[o.function])
	fresh, err := o.pinMaps(spec)
	if err != nil {
		return nil, err
	}
	// Like libbpf, create all maps, even those of other programs only.
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: o.pins}})
	if err != nil {
		for _, path := range fresh {
			_ = os.Remove(path)
		}
		return nil, err
	}
	defer coll.Close()
	return coll.DetachProgram(o.function), nil
}

// pinMaps keeps the pinning of maps that the file asks to pin
// (LIBBPF_PIN_BY_NAME) if there is a folder for pins, and clears all other
// pinning. It returns the paths of the new pins.
func (o *object) pinMaps(spec *ebpf.CollectionSpec) (fresh []string, err error) {
	for name, m := range spec.Maps {
		if o.pins == "" || m.Pinning != ebpf.PinByName {
			m.Pinning = ebpf.PinNone
			continue
		}
		path := filepath.Join(o.pins, name)
		if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
			fresh = append(fresh, path)
		}
	}
	if len(fresh) == 0 {
		return nil, nil
	}
	if err := os.Mkdir(o.pins, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	if !kernel.IsBPFFS(o.pins) {
		return nil, failed(unix.EINVAL, errors.New(o.pins+" is not in a bpffs"))
	}
	return fresh, nil
}
