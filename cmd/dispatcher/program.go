package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/programs"
)

const programHelp = `PROGRAM is one of
  FILE[:NAME]   an object file, compiled with clang -O2 -g -target bpf -c; NAME,
                a function or a section, chooses one of several programs
  id:N          a loaded program, by its id ("bpftool prog" lists them)
  pin:PATH      a pinned program, by the path of its pin in a bpffs
  builtin:NAME  a program that comes with this tool:
`

// builtinHelp lists the built-in programs and their purposes.
func builtinHelp() string {
	var lines []string
	for _, name := range programs.Names() {
		var families []string
		for _, h := range programs.Hooks(name) {
			family, _, _ := strings.Cut(string(h), "/")
			if family == "cgroup" { // cgroup has 28 hooks, and the program fits only some
				family = string(h)
			}
			if !slices.Contains(families, family) {
				families = append(families, family)
			}
		}
		lines = append(lines, fmt.Sprintf("                %-10s %s", name, strings.Join(families, ", ")))
	}
	return strings.Join(lines, "\n")
}

// Kinds of PROGRAM.
const (
	fromFile    = "file"
	fromID      = "id"
	fromPin     = "pin"
	fromBuiltin = "builtin"
)

// A programWord is the parsed word PROGRAM.
type programWord struct {
	kind string
	path string // of the file or the pin
	name string // of the program in the file, or of the built-in program
	id   uint32
}

// parseProgram parses the word PROGRAM. A file name may contain a colon, hence
// isFile. A file name that starts like another kind is written "./id:7".
func parseProgram(word string, isFile func(string) bool) (programWord, error) {
	kind, rest, ok := strings.Cut(word, ":")
	if !ok {
		return programWord{kind: fromFile, path: word}, nil
	}
	switch kind {
	case fromID:
		id, err := parseID(rest)
		return programWord{kind: fromID, id: id}, err
	case fromPin:
		if rest == "" {
			return programWord{}, usage("as in pin:/sys/fs/bpf/filter", "%q: the path is missing", word)
		}
		return programWord{kind: fromPin, path: rest}, nil
	case fromBuiltin:
		return programWord{kind: fromBuiltin, name: rest}, nil
	}
	if isFile(word) {
		return programWord{kind: fromFile, path: word}, nil
	}
	colon := strings.LastIndexByte(word, ':')
	p := programWord{kind: fromFile, path: word[:colon], name: word[colon+1:]}
	if p.path == "" || p.name == "" {
		missing := "program's name"
		if p.path == "" {
			missing = "file"
		}
		return p, usage("FILE:NAME is a program in an object file", "%q: the %s is missing", word, missing)
	}
	return p, nil
}

func parseID(text string) (uint32, error) {
	id, err := strconv.ParseUint(text, 10, 32)
	if err != nil || id == 0 {
		return 0, usage("ids are whole numbers from 1, as in id:41", "id:%s: not an id", text)
	}
	return uint32(id), nil
}

// programFlags are the flags that say how a program is loaded.
type programFlags struct {
	maps, globals []string
	mapPins       string
	newMaps       bool // replace only
}

func (p *programFlags) add(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringArrayVar(&p.maps, "map", nil, "replace a map of the file by another one: `NAME=MAP`, where MAP is the path of a pin or id:N (repeatable)")
	flags.StringArrayVar(&p.globals, "global", nil, "set a constant or variable before the program is loaded: `NAME=VALUE`, written as in C, or an address (repeatable)")
	completeFlag(cmd, "global", completeGlobal)
	flags.StringVar(&p.mapPins, "map-pins", "", "share each map with the map that is pinned by its name in `DIR`, in a bpffs; without one, pin the new map there")
}

// given tells whether one of the flags was used.
func (p *programFlags) given() bool {
	return len(p.maps)+len(p.globals) > 0 || p.mapPins != "" || p.newMaps
}

// pinsIn tells whether --map-pins is a folder in that bpffs.
func (p *programFlags) pinsIn(bpffs string) bool {
	rel, err := filepath.Rel(bpffs, p.mapPins)
	return err == nil && filepath.IsLocal(rel)
}

// A programSource is a program for the library to load.
type programSource struct {
	dispatcher.Source
	name    string // of a built-in program, the member's default name; empty for the program's own name
	release func() // to be called after the load
}

// source makes a programSource for a hook from the word PROGRAM and the flags.
func (p *programFlags) source(a *app, h hook.Hook, word string) (programSource, error) {
	from := programSource{release: func() {}}
	w, err := parseProgram(word, isFile)
	if err != nil {
		return from, err
	}
	switch w.kind {
	case fromID, fromPin:
		if p.given() {
			return from, usage("they are for programs from a file and for built-in ones", "--map, --global, --map-pins and --new-maps: %q is loaded already", word)
		}
		if w.kind == fromID {
			from.Source = dispatcher.ProgramID(w.id)
		} else {
			from.Source = dispatcher.ProgramPin(w.path)
		}
		return from, nil
	}

	o := dispatcher.LoadOptions{Program: w.name, MapPins: p.mapPins, BPFFS: a.bpffs, NewMaps: p.newMaps}
	var spec *ebpf.CollectionSpec
	if w.kind == fromBuiltin {
		if spec, o.Program, err = builtin(w.name, h); err != nil {
			return from, err
		}
		from.name = w.name
	}
	if o.Globals, err = pairs("global", p.globals); err != nil {
		return from, err
	}
	mapWords, err := pairs("map", p.maps)
	if err != nil {
		return from, err
	}
	if o.Maps, from.release, err = openMaps(mapWords); err != nil {
		return from, err
	}
	if spec != nil {
		from.Source = dispatcher.Spec(spec, o)
	} else {
		from.Source = dispatcher.File(w.path, o)
	}
	return from, nil
}

// builtin returns a built-in program and its function for a hook.
func builtin(name string, h hook.Hook) (*ebpf.CollectionSpec, string, error) {
	spec, err := programs.Spec(name)
	if err != nil {
		return nil, "", err
	}
	function := programs.Function(name, h)
	if function == "" {
		return nil, "", hook.Because(hook.ErrIncompatible, "builtin:%s is not for %s; it is for %s", name, h, strings.Join(wordsOf(programs.Hooks(name)), ", "))
	}
	return spec, function, nil
}

// pairs parses the values NAME=VALUE of a flag.
func pairs(flag string, values []string) (map[string]string, error) {
	read := make(map[string]string, len(values))
	for _, v := range values {
		name, value, ok := strings.Cut(v, "=")
		if !ok || name == "" || value == "" {
			return nil, usage("", "--%s %q: must be NAME=%s", flag, v, map[string]string{"map": "PATH or NAME=id:N", "global": "VALUE"}[flag])
		}
		if _, twice := read[name]; twice {
			return nil, usage("", "--%s %q: %s is given twice", flag, v, name)
		}
		read[name] = value
	}
	return read, nil
}

// openMaps opens the maps of --map, by name. After an error none is open.
func openMaps(words map[string]string) (maps map[string]*ebpf.Map, release func(), err error) {
	maps = make(map[string]*ebpf.Map, len(words))
	release = func() {
		for _, m := range maps {
			m.Close()
		}
	}
	for name, word := range words {
		m, err := openMap(word)
		if err != nil {
			release()
			return nil, func() {}, fmt.Errorf("--map %s=%s: %w", name, word, err)
		}
		maps[name] = m
	}
	return maps, release, nil
}

func openMap(word string) (*ebpf.Map, error) {
	text, ok := strings.CutPrefix(word, "id:")
	if !ok {
		m, err := ebpf.LoadPinnedMap(word, nil)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("pinned map: %w", fs.ErrNotExist)
		}
		return m, kernel.PathErrno("open the pin", word, err)
	}
	id, err := parseID(text)
	if err != nil {
		return nil, err
	}
	m, err := ebpf.NewMapFromID(ebpf.MapID(id))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, hook.Because(fs.ErrNotExist, "there is no such map").Hint("\"bpftool map\" lists the loaded ones")
	}
	return m, kernel.Errno("map", err)
}

func isFile(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
