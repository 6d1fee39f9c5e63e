package initramfs

import (
	"bytes"
	"debug/elf"
	"fmt"
	"path"
	"strings"
)

// ModuleName returns the kernel's name of a module, from the name of its file:
// nf_tables for kernel/net/netfilter/nf_tables.ko.xz, and crc32c_generic for
// crc32c-generic.ko.
func ModuleName(file string) (name string, ok bool) {
	base := path.Base(file)
	for _, suffix := range []string{".ko", ".ko.xz", ".ko.zst", ".ko.gz"} {
		if name, ok := strings.CutSuffix(base, suffix); ok {
			return strings.ReplaceAll(name, "-", "_"), true
		}
	}
	return "", false
}

// ModuleDepends returns the modules that a module needs, as listed in its file.
func ModuleDepends(module []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(module))
	if err != nil {
		return nil, err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, fmt.Errorf("no .modinfo: not a kernel module")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	for field := range bytes.SplitSeq(info, []byte{0}) {
		list, ok := bytes.CutPrefix(field, []byte("depends="))
		if !ok || len(list) == 0 {
			continue
		}
		depends := strings.Split(string(list), ",")
		for i, d := range depends {
			depends[i] = strings.ReplaceAll(d, "-", "_")
		}
		return depends, nil
	}
	return nil, nil
}

// ModuleOrder returns the order in which to load the wanted modules: each module comes after the
// modules that it needs. A wanted module without a file is built into the kernel, or newer than the
// kernel. A module that another one needs must exist.
func ModuleOrder(wanted []string, depends func(name string) (needs []string, exists bool, err error)) ([]string, error) {
	var order []string
	seen := map[string]bool{}
	var visit func(name, by string) error
	visit = func(name, by string) error {
		if seen[name] {
			return nil
		}
		seen[name] = true
		needs, exists, err := depends(name)
		if err != nil {
			return fmt.Errorf("module %s: %w", name, err)
		}
		if !exists {
			if by == "" {
				return nil
			}
			return fmt.Errorf("module %s needs %s, which is not there", by, name)
		}
		for _, n := range needs {
			if err := visit(n, name); err != nil {
				return err
			}
		}
		order = append(order, name)
		return nil
	}
	for _, name := range wanted {
		if err := visit(name, ""); err != nil {
			return nil, err
		}
	}
	return order, nil
}
