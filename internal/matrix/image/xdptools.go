package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/libdispatcher/dispatcher/internal/matrix/debian"
	"github.com/libdispatcher/dispatcher/internal/matrix/initramfs"
)

// toolSuites are releases of Debian with different versions of libxdp in their
// xdp-tools.
var toolSuites = []string{"bookworm", "trixie", "sid"}

// tools are the programs of xdp-tools.
var tools = []string{"xdp-loader", "xdpdump", "xdp-filter", "xdp-bench", "xdp-monitor", "xdp-trafficgen", "xdp-forward"}

// XDPTools makes archives with Debian's xdp-tools of the wanted versions (1.5.4) or releases (trixie), or
// of all. Each version is in its own folder /opt/xdp-tools-VERSION with its libraries, and its programs
// can be called by name and version: xdp-loader-1.5.4.
func (m *Maker) XDPTools(ctx context.Context, wanted ...string) (archives []string, err error) {
	var have []string
	found := map[string]bool{}
	for _, suite := range toolSuites {
		dir, err := m.Cache.Get(ctx, "xdp-tools/"+suite, fmt.Sprint("2", tools), func(dir string) error {
			return m.suite(ctx, suite, func(s *debian.Suite) error { return m.makeTools(ctx, s, dir) })
		})
		if err != nil {
			return nil, fmt.Errorf("xdp-tools: %w", err)
		}
		version, err := os.ReadFile(filepath.Join(dir, "version"))
		if err != nil {
			return nil, err
		}
		have = append(have, string(version))
		use := false
		for _, w := range wanted {
			if w == "all" || w == suite || w == string(version) {
				use, found[w] = true, true
			}
		}
		if use {
			archives = append(archives, filepath.Join(dir, "tools.cpio"))
		}
	}
	for _, w := range wanted {
		if !found[w] {
			return nil, fmt.Errorf("there is no xdp-tools %s: there are %s, which are %s's, and all",
				w, strings.Join(have, ", "), strings.Join(toolSuites, ", "))
		}
	}
	return archives, nil
}

func (m *Maker) makeTools(ctx context.Context, s *debian.Suite, dir string) error {
	full, err := s.Version(ctx, "xdp-tools")
	if err != nil {
		return err
	}
	version := upstreamVersion(full)
	root := filepath.Join(dir, "root")
	defer os.RemoveAll(root)
	if err := m.unpack(ctx, s, root, "xdp-tools"); err != nil {
		return err
	}
	err = writeArchive(filepath.Join(dir, "tools.cpio"), func(w *initramfs.Writer) error {
		return putTools(w, root, version)
	})
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "version"), []byte(version), 0o644)
}

func putTools(w *initramfs.Writer, root, version string) error {
	prefix := "/opt/xdp-tools-" + version
	objects, err := putObjects(w, root, prefix)
	if err != nil {
		return err
	}
	written := map[string]bool{}
	for _, name := range tools {
		program, err := findProgram(root, name)
		if errors.Is(err, fs.ErrNotExist) {
			continue // older versions have fewer
		}
		if err != nil {
			return err
		}
		libraries, interpreter, err := initramfs.Libraries(root, program)
		if err != nil {
			return err
		}
		ld, err := findInterpreter(root, interpreter)
		if err != nil {
			return err
		}
		for _, file := range append(libraries, ld) {
			to := prefix + "/lib/" + path.Base(file)
			if file == ld {
				to = prefix + "/lib/ld.so"
			}
			if !written[to] {
				written[to] = true
				if err := w.Copy(to, file); err != nil {
					return err
				}
			}
		}
		if err := w.Copy(prefix+"/libexec/"+name, program); err != nil {
			return err
		}
		script := fmt.Sprintf(toolScript, prefix, name, objects)
		if err := w.File(prefix+"/bin/"+name, 0o755, int64(len(script)), strings.NewReader(script)); err != nil {
			return err
		}
		if err := w.Link("/usr/local/bin/"+name+"-"+version, prefix+"/bin/"+name); err != nil {
			return err
		}
	}
	if len(written) == 0 {
		return errors.New("the package xdp-tools has no programs")
	}
	return nil
}

// toolScript calls a tool with its own libraries and objects. A variable tells
// the tool where libxdp's objects are. Tools before 1.6 find their own objects
// only in the package's folder, so the version that is called puts its objects
// there.
const toolScript = `#!/bin/sh
: ${LIBXDP_OBJECT_PATH:=%[1]s/lib/bpf}
export LIBXDP_OBJECT_PATH
mkdir -p $(dirname %[3]s) && ln -sfn %[1]s/lib/bpf %[3]s
exec %[1]s/lib/ld.so --library-path %[1]s/lib %[1]s/libexec/%[2]s "$@"
`

// putObjects copies the BPF programs of libxdp, such as its dispatcher, and of
// the tools. It returns the package's folder for them.
func putObjects(w *initramfs.Writer, root, prefix string) (folder string, err error) {
	err = filepath.WalkDir(root, func(file string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Ext(file) != ".o" || path.Base(path.Dir(file)) != "bpf" {
			return err
		}
		folder = strings.TrimPrefix(path.Dir(file), root)
		return w.Copy(prefix+"/lib/bpf/"+path.Base(file), file)
	})
	if err == nil && folder == "" {
		err = errors.New("the packages of xdp-tools have no BPF programs")
	}
	return folder, err
}

// upstreamVersion returns the upstream part of a package's version: 1.5.4 for
// 1:1.5.4-1+b2.
func upstreamVersion(version string) string {
	if _, rest, ok := strings.Cut(version, ":"); ok {
		version = rest
	}
	if i := strings.LastIndex(version, "-"); i >= 0 {
		version = version[:i]
	}
	version, _, _ = strings.Cut(version, "+")
	return version
}
