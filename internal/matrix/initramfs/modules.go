package initramfs

import (
	"bytes"
	"debug/elf"
	"fmt"
	"path"
	"strings"
)

// ModuleName is the kernel's name of a module, from the name of its file: nf_tables of
// kernel/net/netfilter/nf_tables.ko.xz, and crc32c_generic of crc32c-generic.ko.
func ModuleName(file string) (name string, ok bool) {
	base := path.Base(file)
	for _, suffix := range []string{".ko", ".ko.xz", ".ko.zst", ".ko.gz"} {
		if name, ok := strings.CutSuffix(base, suffix); ok {
			return strings.ReplaceAll(name, "-", "_"), true
		}
	}
	return "", false
}

// ModuleDepends are the modules that a module needs, as its file says.
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

// ModuleOrder is the order in which to load the wanted modules: what one needs comes before it. A
// wanted module that there is no file of is built into the kernel, or the kernel is older than it; one
// that another module needs must be there.
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
