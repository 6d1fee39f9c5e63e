package libxdp

import (
	"cmp"
	"errors"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// version returns the version to start a chain with.
func (o AttachOptions) version() (uint8, error) {
	if o.Version != 0 {
		return o.Version, nil
	}
	if v, err := loadedVersion(); v != 0 || err != nil {
		return v, err
	}
	return cmp.Or(installedVersion(libraryFolders), MaxVersion), nil
}

// loadedVersion returns the version of the dispatcher that was loaded last, or
// 0 when there is none.
func loadedVersion() (version uint8, err error) {
	for prog, err := range kernel.Programs() {
		if err != nil {
			return 0, err
		}
		c, err := ConfigOf(prog)
		switch {
		case err == nil:
			version = c.Version
		case !errors.Is(err, ErrNotDispatcher) && !errors.Is(err, ErrVersion):
			return 0, err
		}
	}
	return version, nil
}

// libraryFolders are the distributions' folders for libxdp.so.1.N.
var libraryFolders = []string{"/usr/lib/*", "/usr/lib", "/usr/lib64", "/lib64", "/usr/local/lib/*", "/usr/local/lib", "/usr/local/lib64"}

// installedVersion returns the version that the newest installed library
// writes, or 0 when none is installed.
func installedVersion(folders []string) (version uint8) {
	const library = "libxdp.so.1."
	for _, folder := range folders {
		paths, _ := filepath.Glob(filepath.Join(folder, library+"*"))
		for _, path := range paths {
			minor, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(path), library), ".")
			if n, err := strconv.Atoi(minor); err == nil {
				version = max(version, versionOfLibrary(n))
			}
		}
	}
	return version
}

// versionOfLibrary returns the version that libxdp 1.minor writes.
func versionOfLibrary(minor int) uint8 {
	switch {
	case minor >= 6:
		return 3
	case minor >= 3:
		return 2
	}
	return 1
}
