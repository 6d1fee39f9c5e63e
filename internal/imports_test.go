// Package internal_test checks which package imports which.
package internal_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"
)

const module = "github.com/libdispatcher/dispatcher"

// layers are the packages from bottom to top: each may import those that come
// before it in this list, and no others of the module. docs/architecture.md says
// what they are for, in the same order.
var layers = []string{
	"hook",
	"internal/procfs",
	"internal/kernel",
	"internal/rtnl",
	"internal/holders",
	"internal/code",
	"internal/typed",
	"libxdp",
	"internal/dispatch",
	"internal/state",
	"internal/load",
	"internal/target",
	"internal/chains",
	"internal/links",
	"internal/filters",
	"internal/interop",
	"internal/attach",
	"internal/explain",
	"internal/features",
	"internal/scan",
	"internal/watch",
	"internal/measure",
	"internal/doctor",
	"", // the library
	"declare",
	"internal/document",
	"programs/internal/object",
	"programs",
	"internal/plan",
	"internal/apply",
	"internal/demo",
	"internal/xdploader",
	"internal/packet",
	"internal/mapdata",
	"cmd/dispatcher",
}

// aside are packages that none may import but those beside them.
var aside = []string{"internal/testenv", "internal/matrix", "internal/bench", "examples/", "test/"}

// tools are those that are made of the same as tests.
var tools = []string{"internal/bench", "test/internal/scene"}

// library are the packages that other modules import.
var library = []string{"", "hook", "libxdp", "declare", "programs"}

// dependencies are the modules that come with the library.
var dependencies = []string{
	"github.com/cilium/ebpf",
	"github.com/mdlayher/netlink",
	"github.com/mdlayher/socket", // of netlink
	"golang.org/x/net",           // of netlink
	"golang.org/x/sync",          // of socket
	"golang.org/x/sys",
}

// A pkg is what "go list" says of a package.
type pkg struct {
	ImportPath string
	GoFiles    []string // without tests
	Imports    []string
	Deps       []string
	Standard   bool
	Module     *struct{ Path string }
}

// ours is the import path without that of the module; false for a package that
// is not of the module.
func ours(importPath string) (string, bool) {
	if importPath == module {
		return "", true
	}
	return strings.CutPrefix(importPath, module+"/")
}

// packages are all packages of the module, and all that they need without
// their tests, by import path.
func packages(t *testing.T) map[string]*pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-deps", "-json=ImportPath,GoFiles,Imports,Deps,Standard,Module", "./...")
	cmd.Dir = ".."
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.String())
	}
	all := map[string]*pkg{}
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		p := new(pkg)
		err := d.Decode(p)
		if errors.Is(err, io.EOF) {
			return all
		}
		qt.Assert(t, qt.IsNil(err))
		all[p.ImportPath] = p
	}
}

// importPath is the inverse of ours.
func importPath(path string) string { return strings.TrimSuffix(module+"/"+path, "/") }

// asideOf returns which of aside a package belongs to, empty if none.
func asideOf(path string) string {
	for _, a := range aside {
		if strings.HasPrefix(path, a) {
			return a
		}
	}
	return ""
}

// Arrows point down: nothing imports upwards, and every package has its place.
func TestImportsPointDown(t *testing.T) {
	all := packages(t)
	for _, p := range all {
		path, ok := ours(p.ImportPath)
		if !ok || len(p.GoFiles) == 0 {
			continue
		}
		own := slices.Index(layers, path)
		if own < 0 {
			if asideOf(path) == "" {
				t.Errorf("package %q has no place in the layers", path)
			}
			own = len(layers)
		}
		for _, i := range p.Imports {
			imported, ok := ours(i)
			if imported == "internal/testenv" && slices.Contains(tools, path) {
				continue
			}
			if ok && (slices.Index(layers, imported) >= own || asideOf(imported) != "" && asideOf(imported) != asideOf(path)) {
				t.Errorf("package %q imports %q", path, imported)
			}
		}
	}
	for _, path := range layers {
		if all[importPath(path)] == nil {
			t.Errorf("layer %q: there is no such package", path)
		}
	}
}

// docs/architecture.md has a row for each package, in the order of the layers, and
// its picture has each room of the library.
func TestArchitecture(t *testing.T) {
	page, err := os.ReadFile("../docs/architecture.md")
	qt.Assert(t, qt.IsNil(err))
	picture, err := os.ReadFile("../docs/img/architecture.svg")
	qt.Assert(t, qt.IsNil(err))
	var rows []string
	for line := range strings.Lines(string(page)) {
		cell, _, _ := strings.Cut(strings.TrimPrefix(line, "| "), " |")
		for _, folder := range strings.Split(cell, ", ") {
			if folder, ok := strings.CutSuffix(folder, "/`"); ok {
				rows = append(rows, strings.TrimPrefix(folder, "`"))
			}
		}
	}
	want := slices.Clone(layers)
	for _, a := range aside {
		want = append(want, strings.TrimSuffix(a, "/"))
	}
	qt.Check(t, qt.DeepEquals(rows, want))
	for _, room := range layers[:slices.Index(layers, "")] {
		qt.Check(t, qt.StringContains(string(picture), ">"+path.Base(room)))
	}
}

// The library brings no other modules along than the few that it needs: none
// of the CLI's, and none of the tests'.
func TestLibraryDependencies(t *testing.T) {
	all := packages(t)
	for _, path := range library {
		p := all[importPath(path)]
		for _, i := range p.Deps {
			if m := all[i].Module; m != nil && m.Path != module && !slices.Contains(dependencies, m.Path) {
				t.Errorf("package %q needs %s", p.ImportPath, i)
			}
		}
	}
}

// One package reads YAML, and only the command, which reads files, needs it.
func TestOneReaderOfYAML(t *testing.T) {
	for _, p := range packages(t) {
		path, ok := ours(p.ImportPath)
		for _, i := range p.Imports {
			if ok && strings.Contains(i, "yaml") && path != "internal/document" {
				t.Errorf("package %q imports %s", path, i)
			}
			if imported, _ := ours(i); ok && imported == "internal/document" && path != "cmd/dispatcher" {
				t.Errorf("package %q imports %s", path, i)
			}
		}
	}
}

// Package hook is plain data, and packages code, dispatch, declare and plan are pure.
func TestPure(t *testing.T) {
	all := packages(t)
	for _, i := range all[module+"/hook"].Imports {
		if !all[i].Standard {
			t.Errorf("package hook imports %s", i)
		}
	}
	for _, path := range []string{"hook", "internal/code", "internal/dispatch", "declare", "internal/plan"} {
		for _, i := range all[module+"/"+path].Imports {
			if i == module+"/internal/code" || i == "net/netip" {
				continue
			}
			for _, io := range []string{"os", "io", "net", "syscall", "math/rand", "golang.org/x/sys", module + "/internal"} {
				if i == io || strings.HasPrefix(i, io+"/") {
					t.Errorf("package %q imports %s", path, i)
				}
			}
		}
	}
}

// Examples show what every user can do: they import what every user can import.
func TestPublicOnly(t *testing.T) {
	for _, p := range packages(t) {
		path, ok := ours(p.ImportPath)
		if !ok || !strings.HasPrefix(path, "examples/") {
			continue
		}
		for _, i := range p.Imports {
			if imported, ok := ours(i); ok && !slices.Contains(library, imported) {
				t.Errorf("%s imports %q", path, imported)
			}
		}
	}
}
