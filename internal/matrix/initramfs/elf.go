package initramfs

import (
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// libraryFolders are Debian's folders for libraries, with and without a merged
// /usr.
var libraryFolders = []string{
	"usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib", "lib", "usr/lib64", "lib64",
	"usr/lib/x86_64-linux-gnu/systemd",
}

// Libraries returns the shared libraries and the program interpreter that a program needs, as paths
// below root with the names that the program uses. A statically linked program needs none.
func Libraries(root, program string) (libraries []string, interpreter string, err error) {
	found := map[string]string{}
	var visit func(file string) error
	visit = func(file string) error {
		f, err := elf.Open(file)
		if err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		defer f.Close()
		for _, p := range f.Progs {
			if p.Type == elf.PT_INTERP {
				name := make([]byte, p.Filesz-1)
				if _, err := p.ReadAt(name, 0); err != nil {
					return fmt.Errorf("%s: %w", file, err)
				}
				interpreter = string(name)
			}
		}
		needs, err := f.ImportedLibraries()
		if err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		for _, name := range needs {
			if found[name] != "" {
				continue
			}
			path, err := findLibrary(root, name)
			if err != nil {
				return fmt.Errorf("%s: %w", file, err)
			}
			found[name] = path
			if err := visit(path); err != nil {
				return err
			}
		}
		return nil
	}
	if err := visit(program); err != nil {
		return nil, "", err
	}
	for _, path := range found {
		libraries = append(libraries, path)
	}
	slices.Sort(libraries)
	return libraries, interpreter, nil
}

func findLibrary(root, name string) (string, error) {
	for _, folder := range libraryFolders {
		path := filepath.Join(root, folder, name)
		if _, err := os.Stat(path); err == nil {
			return path, nil
		} else if !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
	}
	return "", fmt.Errorf("library %s: %w", name, fs.ErrNotExist)
}
