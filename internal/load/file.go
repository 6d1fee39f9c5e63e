package load

import (
	"bytes"
	"cmp"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/libxdp"
)

// maxFile is the size of the largest object file that is read, in bytes.
const maxFile = 64 << 20

// Options are dispatcher.LoadOptions, which says what the fields mean. BPFFS is
// empty until PinningIn sets it.
type Options struct {
	Program string
	Globals map[string]string
	Maps    map[string]*ebpf.Map
	MapPins string
	BPFFS   string
	NewMaps bool
	Mark    string
}

// PinningIn returns the source with that bpffs as the default of Options.BPFFS.
func PinningIn(src Source, bpffs string) Source {
	switch s := src.(type) {
	case File:
		s.Options.BPFFS = cmp.Or(s.Options.BPFFS, bpffs)
		return s
	case Spec:
		s.Options.BPFFS = cmp.Or(s.Options.BPFFS, bpffs)
		return s
	}
	return src
}

// A File is the source of a program in an object file.
type File struct {
	Path string
	Options
	old inheritance
}

// Load reads the file and loads the program. The caller closes the result.
func (f File) Load(want Want) (*Loaded, error) {
	s, err := f.read()
	if err != nil {
		return nil, err
	}
	l, err := s.Load(want)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Path, err)
	}
	return l, nil
}

func (f File) read() (Spec, error) {
	b, err := ReadFile(f.Path)
	if err != nil {
		return Spec{}, err
	}
	spec, err := Parse(b)
	if err != nil {
		return Spec{}, fmt.Errorf("%s: %w", f.Path, err)
	}
	return Spec{spec, f.Options, f.old}, nil
}

// ReadFile reads a regular file that is not larger than an object file can be.
func ReadFile(path string) ([]byte, error) {
	// Without O_NONBLOCK, opening a pipe would wait for a writer.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case !st.Mode().IsRegular():
		return nil, hook.Because(hook.ErrUsage, "%s: not a regular file", path)
	case st.Size() > maxFile:
		return nil, hook.Because(hook.ErrUsage, "%s: %d bytes; object files are at most %d", path, st.Size(), maxFile)
	}
	return io.ReadAll(io.LimitReader(f, maxFile))
}

// Parse reads an object file. For bytes that are not an object file it returns an error
// that says what they are instead.
func Parse(b []byte) (spec *ebpf.CollectionSpec, err error) {
	switch {
	case len(b) == 0:
		return nil, hook.Because(hook.ErrUsage, "the file is empty")
	case !bytes.HasPrefix(b, []byte(elf.ELFMAG)):
		return nil, hook.Because(hook.ErrUsage, "not an ELF file; compile the program with clang -O2 -g -target bpf -c")
	}
	// debug/elf and the readers on top of it are not made for hostile input.
	defer func() {
		if r := recover(); r != nil {
			spec, err = nil, hook.Because(hook.ErrUsage, "damaged ELF file: %v", r)
		}
	}()
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return nil, hook.Because(hook.ErrUsage, "damaged ELF file: %w", err)
	}
	if f.Machine != elf.EM_BPF {
		return nil, hook.Because(hook.ErrUsage, "an ELF file for %v, not for BPF; compile the program with clang -O2 -g -target bpf -c", f.Machine)
	}
	if f.ByteOrder != kernel.ByteOrder {
		return nil, hook.Because(hook.ErrUsage, "compiled for the other byte order (%v)", f.ByteOrder)
	}
	// Sections may overlap, and .bss takes no room in the file: a small file
	// can ask for all the memory there is.
	var size uint64
	for _, section := range f.Sections {
		if size += min(section.Size, maxFile+1); size > maxFile {
			return nil, hook.Because(hook.ErrUsage, "damaged ELF file: its sections have more than %d bytes", maxFile)
		}
	}
	if f.Section(".maps") != nil && f.Section(".BTF") == nil {
		return nil, hook.Because(hook.ErrUsage, "the file has no type information (BTF), which describes the maps in SEC(\".maps\"); compile the program with clang -O2 -g -target bpf -c")
	}
	spec, err = ebpf.LoadCollectionSpecFromReader(bytes.NewReader(b))
	if err != nil {
		return nil, hook.Because(hook.ErrUsage, "not a usable BPF object: %w", err)
	}
	return spec, nil
}

// A Spec is the source of a program in a collection that the caller has read.
type Spec struct {
	Collection *ebpf.CollectionSpec
	Options    Options
	old        inheritance
}

// Load loads the program. It does not change the collection. The caller closes the result.
func (s Spec) Load(want Want) (*Loaded, error) {
	if s.Collection == nil {
		return nil, hook.Because(hook.ErrUsage, "the collection spec is nil")
	}
	spec := s.Collection.Copy()
	name, err := choose(spec, s.Options.Program, want.Hook)
	if err != nil {
		return nil, err
	}
	declareFrags(spec)
	frags := spec.Programs[name].Flags&unix.BPF_F_XDP_HAS_FRAGS != 0
	shape, defaults, err := prepare(spec, name, want)
	if err != nil {
		return nil, err
	}
	if err := setGlobals(spec, s.Options.Globals); err != nil {
		return nil, err
	}
	if spec.Variables[fragsConstant] != nil && shape.Frags && want.Extension == nil {
		if err := setGlobals(spec, map[string]string{fragsConstant: "1"}); err != nil {
			return nil, err
		}
	}
	if err := s.setLinkHeader(spec, want); err != nil {
		return nil, fmt.Errorf("program %q: %w", name, err)
	}
	for name := range s.Options.Maps {
		if spec.Maps[name] == nil {
			return nil, hook.Because(hook.ErrUsage, "there is no map %q in the file (it has: %s)", name, list(slices.Sorted(maps.Keys(spec.Maps))))
		}
	}
	kernel.KeepOnly(spec, name)
	for n, m := range spec.Maps {
		if unread(m) {
			return nil, hook.Because(hook.ErrIncompatible, "map %q is defined in the way of iproute2 (struct bpf_elf_map), whose id and pinning mean nothing here; define it in SEC(\".maps\")", n)
		}
	}
	for _, p := range spec.Programs {
		// Programs that the program tail-calls must have the same shape.
		if p.Type != ebpf.XDP || want.Hook != hook.XDP {
			continue
		}
		if _, err := fit(p, &shape); err != nil {
			return nil, err
		}
	}
	if x := want.Extension; x != nil {
		p := spec.Programs[name]
		if len(p.Instructions) == 0 || btf.FuncMetadata(&p.Instructions[0]) == nil {
			return nil, hook.Because(hook.ErrIncompatible, "program %q has no type information (BTF), which a chain of libxdp needs: compile it with clang -g", name)
		}
		p.Type, p.AttachType, p.AttachTarget, p.AttachTo = ebpf.Extension, ebpf.AttachNone, x.Target, x.Function
		p.Flags &^= unix.BPF_F_XDP_HAS_FRAGS // an extension has its target's flag
	}
	fresh, err := s.Options.pinByName(spec)
	if err != nil {
		return nil, err
	}
	shared, err := s.shared(spec)
	if err != nil {
		return nil, err
	}

	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{
		MapReplacements: shared,
		Maps:            ebpf.MapOptions{PinPath: s.Options.pinPath()},
	})
	if err != nil {
		// The maps are already made and pinned when the kernel refuses the program.
		for path := range fresh {
			_ = os.Remove(path)
		}
		if want.Extension != nil && errors.Is(err, unix.EPERM) {
			return nil, kernel.Freplace("load program "+name, unix.EPERM)
		}
		return nil, Refused(name, err, missingTypes(spec, name)...)
	}
	l := &Loaded{Program: coll.Programs[name], Shape: shape, Frags: frags, Name: name, Defaults: defaults, Maps: map[string]*ebpf.Map{}}
	for n, m := range coll.Maps {
		l.owned = append(l.owned, m)
		switch {
		case m.IsPinned():
			if fresh[filepath.Join(s.Options.pinPath(), n)] {
				l.pinned = append(l.pinned, m)
			}
		case s.Options.Maps[n] == nil && !strings.HasPrefix(n, ".rodata") && n != ".kconfig":
			l.Maps[n] = m
		}
	}
	l.owned = append(l.owned, l.Program)
	for n, p := range coll.Programs {
		if n != name {
			p.Close() // the map for its tail calls keeps the program
		}
	}
	if s.Options.Mark != "" {
		if err := state.KeepMark(l.Program, s.Options.Mark); err != nil {
			l.Discard()
			return nil, err
		}
	}
	if want.Hook == hook.XDP && want.Extension == nil {
		// The code is needed only to seal the program later: it runs without.
		_ = state.KeepCode(l.Program, codeOf(spec.Programs[name], coll.Maps))
	}
	return l, nil
}

// unread tells whether the definition of a map has fields that struct bpf_map_def lacks.
func unread(m *ebpf.MapSpec) bool {
	if m.Extra == nil {
		return false
	}
	rest := make([]byte, m.Extra.Len())
	_, _ = m.Extra.ReadAt(rest, m.Extra.Size()-int64(len(rest)))
	return bytes.ContainsFunc(rest, func(r rune) bool { return r != 0 })
}

// choose finds the program for the hook by the name of its function or section. It makes a
// program whose section does not say what it is one for the hook.
func choose(spec *ebpf.CollectionSpec, name string, h hook.Hook) (string, error) {
	var fitting, bySection, unspecified []string
	kind := kernel.KindOf(h)
	for n, p := range spec.Programs {
		if kind.Takes(p) && !forEntry(p) {
			fitting = append(fitting, n)
		}
		if p.SectionName == name {
			bySection = append(bySection, n)
		}
		if p.Type == ebpf.UnspecifiedProgram {
			unspecified = append(unspecified, n)
		}
	}
	slices.Sort(fitting)
	slices.Sort(bySection)
	if name == "" && len(fitting) == 0 && len(unspecified) == 1 {
		name = unspecified[0] // in a section that says nothing: the hook says what it is
	}
	p := spec.Programs[name]
	if p == nil && len(bySection) == 1 {
		name = bySection[0]
		p = spec.Programs[name]
	}
	section := string(h)
	if h == hook.TCIngress || h == hook.TCEgress {
		section = "tc"
	}
	switch {
	case p != nil && kind.Takes(p):
		return name, nil
	case p != nil && p.Type == ebpf.UnspecifiedProgram:
		byHook(spec, kind)
		return name, nil
	case p != nil && p.Type == kind.Program:
		return "", hook.Because(hook.ErrIncompatible, "program %q is for another hook (section %q), not for %s", name, p.SectionName, h)
	case p != nil:
		return "", hook.Because(hook.ErrIncompatible, "program %q is a %v program; %s takes %v programs", name, p.Type, h, kind.Program)
	case name != "" && len(bySection) > 1:
		return "", hook.Because(hook.ErrUsage, "section %q has several programs: choose one of %s", name, list(bySection))
	case name != "":
		return "", hook.Because(fs.ErrNotExist, "there is no program %q in the file (its programs for %s: %s)", name, h, list(fitting))
	case len(fitting) == 0:
		return "", hook.Because(hook.ErrIncompatible, "no program for %s in the file; one has SEC(%q) before its function", h, section)
	case len(fitting) > 1:
		return "", hook.Because(hook.ErrUsage, "the file has several programs for %s: choose one of %s", h, list(fitting))
	}
	return fitting[0], nil
}

// byHook makes the programs in sections with names of their own, as "prog" of iproute2, what
// the hook takes. Those that they tail-call are of the same kind.
func byHook(spec *ebpf.CollectionSpec, kind kernel.Kind) {
	for _, p := range spec.Programs {
		if p.Type == ebpf.UnspecifiedProgram {
			p.Type, p.AttachType = kind.Program, kind.Attach
		}
	}
}

// prepare adapts the program to the hook and the chain, and reads the settings that the
// program asks for.
func prepare(spec *ebpf.CollectionSpec, name string, want Want) (shape dispatch.Shape, defaults hook.Settings, err error) {
	p := spec.Programs[name]
	if want.Hook != hook.XDP {
		if p.Ifindex != 0 {
			return shape, defaults, hook.Because(hook.ErrIncompatible, "program %q is to be bound to a device; a member cannot be", name)
		}
		p.AttachType = kernel.KindOf(want.Hook).Load(p)
		return shape, defaults, nil
	}
	if want.Shape == nil && !want.Frags {
		p.Flags &^= unix.BPF_F_XDP_HAS_FRAGS
	}
	if shape, err = fit(p, want.Shape); err != nil {
		return shape, defaults, err
	}
	if defaults, err = libxdp.RunConfig(spec.Types, name); err != nil {
		err = fmt.Errorf("program %q: %w", name, err)
	}
	return shape, defaults, err
}

// forEntry tells whether a program is for the entries of a devmap or cpumap.
func forEntry(p *ebpf.ProgramSpec) bool {
	return p.AttachType == ebpf.AttachXDPDevMap || p.AttachType == ebpf.AttachXDPCPUMap
}

// fit gives the program the shape of the chain.
func fit(p *ebpf.ProgramSpec, want *dispatch.Shape) (dispatch.Shape, error) {
	have := dispatch.Shape{AttachType: ebpf.AttachXDP, Frags: p.Flags&unix.BPF_F_XDP_HAS_FRAGS != 0}
	if forEntry(p) {
		return have, hook.Because(hook.ErrIncompatible, "program %q is for a map entry (section %q); use SEC(\"xdp\")", p.Name, p.SectionName)
	}
	if p.Ifindex != 0 {
		return have, hook.Because(hook.ErrIncompatible, "program %q is to be bound to a device; a member cannot be", p.Name)
	}
	if want == nil {
		want = &have
	}
	// A program for multi-buffer packets can run without them, but not vice versa.
	if want.Frags && !have.Frags {
		return have, Mismatch(p.Name, have, *want)
	}
	p.AttachType = want.AttachType
	p.Flags &^= unix.BPF_F_XDP_HAS_FRAGS
	if want.Frags {
		p.Flags |= unix.BPF_F_XDP_HAS_FRAGS
	}
	return *want, nil
}

func (o Options) pinPath() string {
	return cmp.Or(o.MapPins, o.BPFFS, kernel.DefaultBPFFS)
}

// pinByName sets the pin paths of the maps that are shared through pins. It returns the
// paths that do not exist yet.
func (o Options) pinByName(spec *ebpf.CollectionSpec) (map[string]bool, error) {
	fresh := map[string]bool{}
	for name, m := range spec.Maps {
		if o.Maps[name] != nil || strings.HasPrefix(name, ".") {
			m.Pinning = ebpf.PinNone
			continue
		}
		if o.MapPins != "" {
			m.Pinning = ebpf.PinByName
		}
		if m.Pinning != ebpf.PinByName {
			continue
		}
		path := filepath.Join(o.pinPath(), name)
		if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
			fresh[path] = true
		}
	}
	if len(fresh) == 0 {
		return fresh, nil
	}
	dir := o.pinPath()
	parent := dir // the nearest folder above that exists
	for _, err := os.Lstat(parent); errors.Is(err, fs.ErrNotExist) && parent != filepath.Dir(parent); _, err = os.Lstat(parent) {
		parent = filepath.Dir(parent)
	}
	if err := kernel.FindBPFFS(parent); err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		return nil, hook.Because(hook.ErrUsage, "maps cannot be pinned in %s: it is not in a bpffs", dir).
			Hint("%s", kernel.MountHint(kernel.DefaultBPFFS))
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, kernel.Errno("folder for map pins", err)
	}
	return fresh, nil
}

func list(names []string) string {
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}
