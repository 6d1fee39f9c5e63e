package libxdp

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

const (
	// versionSection and versionVariable locate the version in a dispatcher's
	// BTF: the variable's type is a pointer to an array, and the array's length
	// is the version.
	versionSection  = "xdp_metadata"
	versionVariable = "dispatcher_version"
)

// ConfigOf reads the configuration of a loaded dispatcher. Like libxdp it
// recognizes a dispatcher by its name, its BTF, and the shape of its only map,
// not by its instructions.
//
// The error is ErrNotDispatcher when prog is something else, and ErrVersion,
// with the version, when it is a dispatcher of a later version.
func ConfigOf(prog *ebpf.Program) (Config, error) {
	info, err := prog.Info()
	if err != nil {
		return Config{}, kernel.Errno("program", err)
	}
	if prog.Type() != ebpf.XDP || info.Name != mainFunction {
		return Config{}, ErrNotDispatcher
	}
	if _, ok := info.BTFID(); !ok {
		return Config{}, hook.Because(ErrNotDispatcher, "the program is called %s, but has no BTF", mainFunction)
	}
	ids, ok := info.MapIDs()
	if !ok {
		return Config{}, fmt.Errorf("this kernel does not tell which maps a program has: %w", ebpf.ErrNotSupported)
	}
	if len(ids) != 1 {
		return Config{}, hook.Because(ErrNotDispatcher, "the program is called %s, but has %d maps in the place of 1", mainFunction, len(ids))
	}
	data, err := configBytes(ids[0])
	if err != nil {
		return Config{}, err
	}
	version := uint8(0)
	if len(data) > 0 && data[0] != magic {
		if version, err = versionOf(prog); err != nil {
			return Config{Version: version}, err
		}
	}
	return ParseConfig(data, version)
}

func configBytes(id ebpf.MapID) ([]byte, error) {
	m, err := ebpf.NewMapFromID(id)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, hook.Because(ErrNotDispatcher, "the configuration is gone: %w", err)
	}
	if err != nil {
		return nil, kernel.Errno("configuration of libxdp's dispatcher", err)
	}
	defer m.Close()
	if m.Type() != ebpf.Array || m.KeySize() != 4 || m.MaxEntries() != 1 || m.Flags()&unix.BPF_F_RDONLY_PROG == 0 {
		return nil, hook.Because(ErrNotDispatcher, "the program is called %s, but its map is not libxdp's configuration", mainFunction)
	}
	data, err := m.LookupBytes(uint32(0))
	return data, kernel.Errno("configuration of libxdp's dispatcher", err)
}

// versionOf reads the version from a dispatcher's BTF; 0 when there is none.
func versionOf(prog *ebpf.Program) (uint8, error) {
	handle, err := prog.Handle()
	if err != nil {
		return 0, kernel.Errno("BTF of libxdp's dispatcher", err)
	}
	defer handle.Close()
	types, err := handle.Spec(nil)
	if err != nil {
		return 0, fmt.Errorf("BTF of libxdp's dispatcher: %w", err)
	}
	t, err := typeOf(types, versionSection, versionVariable)
	if err != nil {
		return 0, nil
	}
	version, err := arrayLength(t)
	switch {
	case err != nil:
		return 0, nil
	case version > MaxVersion:
		version = min(version, 255)
		return uint8(version), tooNew(uint8(version))
	}
	return uint8(version), nil
}
