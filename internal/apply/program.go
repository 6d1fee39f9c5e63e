package apply

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/declare"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/programs"
)

// An object is an object file that was read once, so that what is loaded is what was hashed.
type object struct {
	spec *ebpf.CollectionSpec
	hash string
	err  error
}

// objects are the object files of a run, by path, and the builtin programs, by "builtin:NAME".
type objects map[string]*object

func (o objects) read(key string, read func() (*ebpf.CollectionSpec, string, error)) *object {
	if o[key] == nil {
		spec, hash, err := read()
		o[key] = &object{spec, hash, err}
	}
	return o[key]
}

// file reads an object file.
func (o objects) file(path string) *object {
	return o.read(path, func() (*ebpf.CollectionSpec, string, error) {
		b, err := load.ReadFile(path)
		if err != nil {
			return nil, "", err
		}
		spec, err := load.Parse(b)
		if err != nil {
			return nil, "", fmt.Errorf("%s: %w", path, err)
		}
		sum := sha256.Sum256(b)
		return spec, hex.EncodeToString(sum[:]), nil
	})
}

// builtin returns a program that comes with this module. Its code is its hash.
func (o objects) builtin(name string) *object {
	return o.read("builtin:"+name, func() (*ebpf.CollectionSpec, string, error) {
		spec, err := programs.Spec(name)
		if err != nil {
			return nil, "", err
		}
		sum := sha256.New()
		for _, n := range slices.Sorted(maps.Keys(spec.Programs)) {
			fmt.Fprintf(sum, "program %s\n%v\n", n, spec.Programs[n].Instructions)
		}
		for _, n := range slices.Sorted(maps.Keys(spec.Maps)) {
			m := spec.Maps[n]
			fmt.Fprintf(sum, "map %s %v %d %d %d %v\n", n, m.Type, m.KeySize, m.ValueSize, m.MaxEntries, m.Contents)
		}
		return spec, hex.EncodeToString(sum.Sum(nil)), nil
	})
}

// program returns the object of an attachment, and the function in it; nothing for a pin.
func (o objects) program(a *declare.Attachment, document string) (*object, string, error) {
	if name := a.Program.Builtin; name != "" {
		obj := o.builtin(name)
		function := programs.Function(name, hook.Hook(a.Hook))
		if obj.err == nil && function == "" {
			return nil, "", hook.Because(hook.ErrIncompatible, "builtin %s is not for %s", name, a.Hook)
		}
		return obj, function, obj.err
	}
	path := a.Program.File
	if !filepath.IsAbs(path) {
		path = filepath.Join(filepath.Dir(document), path)
	}
	obj := o.file(path)
	return obj, a.Program.Entry, obj.err
}

// mark says which program shall run: the hash of the object file, of the entry, and of the
// globals; of a program at a pin its id. It is what Observed.Marks has for a program that runs.
func (o objects) mark(a *declare.Attachment, document string) (string, error) {
	if a.Program.Pin != "" {
		prog, err := load.Pin(a.Program.Pin).Load(load.Want{Hook: hook.Hook(a.Hook)})
		if err != nil {
			return "", err
		}
		defer prog.Close()
		return string(hook.ProgramRef(kernel.ProgramID(prog.Program))), nil
	}
	obj, function, err := o.program(a, document)
	if err != nil {
		return "", err
	}
	var text strings.Builder
	fmt.Fprintf(&text, "%s\n%q\n", obj.hash, function)
	for _, name := range slices.Sorted(maps.Keys(a.Program.Globals)) {
		fmt.Fprintf(&text, "%q=%q\n", name, a.Program.Globals[name])
	}
	sum := sha256.Sum256([]byte(text.String()))
	return "sha256." + hex.EncodeToString(sum[:16]), nil
}

// source is the program to load, with its mark.
func (o objects) source(a *declare.Attachment, document, mark, bpffs string) (dispatcher.Source, error) {
	if a.Program.Pin != "" {
		return dispatcher.ProgramPin(a.Program.Pin), nil
	}
	obj, function, err := o.program(a, document)
	if err != nil {
		return dispatcher.Source{}, err
	}
	globals := map[string]string{}
	for name, value := range a.Program.Globals {
		globals[name] = string(value)
	}
	return dispatcher.Spec(obj.spec, dispatcher.LoadOptions{
		Program: function, Globals: globals, BPFFS: bpffs, NewMaps: a.Maps.Reuse == "none", Mark: mark,
	}), nil
}
