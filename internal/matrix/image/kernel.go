// Package image makes the files that a virtual machine boots from, out of Debian's packages: a
// kernel with its modules, the programs that tests use, and several releases of xdp-tools side by
// side.
package image

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/libdispatcher/dispatcher/internal/matrix/cache"
	"github.com/libdispatcher/dispatcher/internal/matrix/debian"
	"github.com/libdispatcher/dispatcher/internal/matrix/guest"
	"github.com/libdispatcher/dispatcher/internal/matrix/initramfs"
)

// A Series is a Debian kernel that the matrix tests.
type Series struct {
	Name  string // such as 6.12
	Suite string // the release of Debian that has it
}

// Kernels are the kernels of the matrix, the oldest first.
var Kernels = []Series{
	{"5.10", "bullseye"},
	{"6.1", "bookworm"},
	{"6.12", "trixie"},
	{"7.2", "sid"},
}

// FindSeries finds one of the kernels by its name.
func FindSeries(name string) (Series, error) {
	var names []string
	for _, s := range Kernels {
		if s.Name == name {
			return s, nil
		}
		names = append(names, s.Name)
	}
	return Series{}, fmt.Errorf("there is no kernel %q: there are %s", name, strings.Join(names, ", "))
}

// modules are the modules that tests and the demo use, unless the kernel has them built in. The
// machine has no modprobe, so it loads all of them as it boots.
var modules = []string{
	"crc32c_generic", "veth", "dummy", "netkit", "ifb", "tun", "bridge", "bonding", "8021q", "macvlan", "ipvlan", "vrf", "ip_gre", "ipip", "wireguard", "pppoe",
	"sch_ingress", "sch_fq_codel", "sch_htb", "sch_prio", "cls_bpf", "cls_u32", "cls_matchall", "cls_flower", "act_bpf", "act_gact", "act_mirred",
	"nf_defrag_ipv4", "nf_defrag_ipv6", "nf_tables", "nfnetlink_hook",
}

// moduleFolders are the folders of all modules that these may need.
var moduleFolders = []string{"kernel/net/", "kernel/lib/", "kernel/crypto/", "kernel/arch/x86/crypto/", "kernel/drivers/net/"}

// A Maker makes images, in a cache.
type Maker struct {
	Cache *cache.Cache
	Say   func(format string, args ...any) // reports progress

	mirror *debian.Mirror
}

// suite locks the suite's folder while use runs.
func (m *Maker) suite(ctx context.Context, name string, use func(*debian.Suite) error) error {
	if m.mirror == nil {
		mirror, err := debian.FindMirror(ctx)
		if err != nil {
			return err
		}
		m.mirror = &mirror
	}
	unlock, err := m.Cache.Lock(ctx, "apt/"+name)
	if err != nil {
		return err
	}
	defer unlock()
	s := debian.NewSuite(name, *m.mirror, filepath.Join(m.Cache.Dir, "apt", name), m.Say)
	if err := s.Refresh(ctx, false); err != nil {
		return err
	}
	return use(s)
}

// A Kernel is ready to boot.
type Kernel struct {
	Image   string // the kernel
	Modules string // an archive with its modules
	Release string
}

// Kernel gets the newest kernel of the series.
func (m *Maker) Kernel(ctx context.Context, series Series) (Kernel, error) {
	recipe := "1 " + strings.Join(modules, " ")
	dir, err := m.Cache.Get(ctx, "kernels/"+series.Name, recipe, func(dir string) error {
		return m.suite(ctx, series.Suite, func(s *debian.Suite) error { return m.makeKernel(ctx, s, series, dir) })
	})
	if err != nil {
		return Kernel{}, fmt.Errorf("kernel %s: %w", series.Name, err)
	}
	release, err := os.ReadFile(filepath.Join(dir, "release"))
	return Kernel{
		Image:   filepath.Join(dir, "vmlinuz"),
		Modules: filepath.Join(dir, "modules.cpio"),
		Release: string(release),
	}, err
}

func (m *Maker) makeKernel(ctx context.Context, s *debian.Suite, series Series, dir string) error {
	packages, release, err := s.KernelPackages(ctx, series.Name)
	if err != nil {
		return err
	}
	debs, err := s.Fetch(ctx, packages...)
	if err != nil {
		return err
	}
	m.Say("unpacking kernel %s", release)
	found := map[string]string{} // the modules' files by module name
	loose := filepath.Join(dir, "modules")
	defer os.RemoveAll(loose)
	for _, deb := range debs {
		err := debian.ReadPackage(ctx, deb, func(h *tar.Header, r io.Reader) error {
			if h.Name == "boot/vmlinuz-"+release || strings.HasSuffix(h.Name, "lib/modules/"+release+"/vmlinuz") {
				return save(filepath.Join(dir, "vmlinuz"), r, 0o644)
			}
			_, inside, ok := strings.Cut(h.Name, "lib/modules/"+release+"/")
			name, isModule := initramfs.ModuleName(h.Name)
			if !ok || !isModule || h.Typeflag != tar.TypeReg || !within(inside, moduleFolders) {
				return nil
			}
			found[name] = filepath.Join(loose, filepath.Base(inside))
			return save(found[name], r, 0o644)
		})
		if err != nil {
			return err
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "vmlinuz")); err != nil {
		return fmt.Errorf("%v hold no kernel: %w", packages, err)
	}
	if err := packModules(ctx, filepath.Join(dir, "modules.cpio"), found); err != nil {
		return err
	}
	for _, deb := range debs {
		os.Remove(deb) // it has a hundred megabytes and is not needed again
	}
	return os.WriteFile(filepath.Join(dir, "release"), []byte(release), 0o644)
}

// packModules writes an archive with the wanted modules and the modules that
// those need.
func packModules(ctx context.Context, archive string, files map[string]string) error {
	contents := map[string][]byte{}
	order, err := initramfs.ModuleOrder(modules, func(name string) ([]string, bool, error) {
		file, ok := files[name]
		if !ok {
			return nil, false, nil
		}
		content, err := decompress(ctx, file)
		if err != nil {
			return nil, false, err
		}
		contents[name] = content
		needs, err := initramfs.ModuleDepends(content)
		return needs, true, err
	})
	if err != nil {
		return err
	}
	return writeArchive(archive, func(w *initramfs.Writer) error {
		var list bytes.Buffer
		for _, name := range order {
			path := "/lib/modules/" + name + ".ko"
			fmt.Fprintln(&list, path)
			if err := w.File(path, 0o644, int64(len(contents[name])), bytes.NewReader(contents[name])); err != nil {
				return err
			}
		}
		return w.File(guest.ModulesFile, 0o644, int64(list.Len()), &list)
	})
}

// decompress reads a module with the tool for its file name.
func decompress(ctx context.Context, file string) ([]byte, error) {
	tools := map[string]string{".xz": "xz", ".zst": "zstd", ".gz": "gzip"}
	tool, ok := tools[filepath.Ext(file)]
	if !ok {
		return os.ReadFile(file)
	}
	out, err := exec.CommandContext(ctx, tool, "-dc", file).Output()
	if err != nil {
		return nil, fmt.Errorf("%s -dc %s: %w", tool, filepath.Base(file), err)
	}
	return out, nil
}

func within(path string, folders []string) bool {
	for _, f := range folders {
		if strings.HasPrefix(path, f) {
			return true
		}
	}
	return false
}

func save(path string, r io.Reader, perm os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, perm)
	if err != nil {
		return err
	}
	if _, err := io.Copy(f, r); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}

// writeArchive writes an archive and lets fill add the content.
func writeArchive(path string, fill func(*initramfs.Writer) error) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	w := initramfs.NewWriter(f)
	if err := fill(w); err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	return f.Close()
}
