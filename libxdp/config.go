package libxdp

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/libdispatcher/dispatcher/hook"
)

const (
	// MaxMembers is the number of programs that a libxdp dispatcher can run.
	MaxMembers = 10
	// MaxVersion is the highest version of the configuration that this package
	// reads and writes.
	MaxVersion = 3
	// DefaultPriority is the priority of a program that asks for none.
	DefaultPriority = 50
)

var (
	// ErrNotDispatcher: the program is not a libxdp dispatcher.
	ErrNotDispatcher = errors.New("not a dispatcher of libxdp's")
	// ErrVersion: this package does not know the version of the dispatcher.
	ErrVersion = errors.New("unknown version of libxdp's dispatcher")
)

// A Config is the configuration that libxdp keeps in a dispatcher's map.
type Config struct {
	// Version is the version of the layout: 1 up to libxdp 1.2, 2 up to 1.5, 3
	// since 1.6. libxdp changes only chains of its own version.
	Version uint8
	// Frags tells whether the dispatcher accepts multi-buffer packets; since
	// version 2.
	Frags bool
	// DevBound tells whether the dispatcher is bound to its device, so that
	// programs can read the metadata of its hardware; since version 3.
	DevBound bool
	Programs []ProgramConfig // in run order
}

// A ProgramConfig is the configuration of one program.
type ProgramConfig struct {
	// Priority orders the programs, lower first. It may be 0 here.
	Priority uint32
	// Actions has bit n set when the next program runs after verdict n.
	Actions uint32
	// Flags are the flags that the program would be loaded with without a
	// dispatcher: BPF_F_XDP_HAS_FRAGS, BPF_F_XDP_DEV_BOUND_ONLY; since version
	// 2.
	Flags uint32
}

const (
	// magic is the first byte since version 2. In version 1 that byte is the
	// number of programs, which is never as high.
	magic = 236
	// notAttached is the verdict of a stub that nothing replaces. The chain
	// then continues: libxdp sets this bit in the actions of each program.
	notAttached = 31

	hasFrags      = 1 << 5 // BPF_F_XDP_HAS_FRAGS, linux/bpf.h
	devBoundOnly  = 1 << 6 // BPF_F_XDP_DEV_BOUND_ONLY
	verdictsInUse = 1<<hook.Verdicts - 1
)

// sizes are the sizes of a configuration in bytes, by version.
var sizes = [MaxVersion + 1]int{1: 84, 2: 124, 3: 128}

// The layout: a head of 4 bytes; arrays of 32-bit numbers for actions,
// priorities and (since 2) flags; and (since 3) a tail of 4 bytes.
const (
	atVersion  = 1
	atCount    = 2 // 0 in version 1
	atFrags    = 3
	atActions  = 4
	atPriority = atActions + 4*MaxMembers
	atFlags    = atPriority + 4*MaxMembers
	atDevBound = atFlags + 4*MaxMembers
)

// ContinueOn returns Actions as a set of verdicts.
func (p ProgramConfig) ContinueOn() hook.VerdictSet {
	return cmp.Or(hook.VerdictSet(p.Actions&verdictsInUse), hook.Never)
}

// ParseConfig reads a configuration. version is the version from the
// dispatcher's BTF, or 0 if it is not known. Only a configuration of version 1
// needs it, because its bytes do not contain the version. The error is
// ErrNotDispatcher when data cannot be a configuration, and ErrVersion, with the
// version, when that is unknown here.
func ParseConfig(data []byte, version uint8) (Config, error) {
	if len(data) < sizes[1] {
		return Config{}, hook.Because(ErrNotDispatcher, "the configuration has %d bytes, it takes %d at least", len(data), sizes[1])
	}
	count := 0
	if data[0] == magic {
		version = data[atVersion]
		count = int(data[atCount])
		if version > MaxVersion {
			return Config{Version: version}, tooNew(version)
		}
		if version < 2 {
			return Config{}, hook.Because(ErrNotDispatcher, "the configuration says it is of version %d, which does not begin like that", version)
		}
	} else {
		if version != 1 {
			return Config{}, hook.Because(ErrNotDispatcher, "the configuration begins with %d, not with %d", data[0], magic)
		}
		count = int(data[0])
	}
	// libxdp itself accepts only the exact size of its own version.
	if size := sizes[version]; len(data) < size || version == 3 && len(data) > size {
		return Config{}, hook.Because(ErrNotDispatcher, "the configuration has %d bytes, %d in version %d", len(data), size, version)
	}
	if count > MaxMembers {
		return Config{}, hook.Because(ErrNotDispatcher, "the configuration is of %d programs, at most %d fit", count, MaxMembers)
	}

	c := Config{Version: version, Programs: make([]ProgramConfig, count)}
	for i := range c.Programs {
		p := &c.Programs[i]
		p.Actions = binary.NativeEndian.Uint32(data[atActions+4*i:]) &^ (1 << notAttached)
		p.Priority = binary.NativeEndian.Uint32(data[atPriority+4*i:])
		if version >= 2 {
			p.Flags = binary.NativeEndian.Uint32(data[atFlags+4*i:])
		}
	}
	c.Frags = version >= 2 && data[atFrags] != 0
	c.DevBound = version >= 3 && data[atDevBound] != 0
	return c, nil
}

func tooNew(version uint8) error {
	return hook.Because(ErrVersion, "version %d of libxdp's dispatcher is later than %d, the last one known here; use a newer version of this program, or libxdp's own xdp-loader", version, MaxVersion)
}

// Check returns an error if libxdp could not have written such a configuration.
func (c Config) Check() error {
	switch {
	case c.Version < 1 || c.Version > MaxVersion:
		return hook.Because(ErrVersion, "version %d of libxdp's dispatcher: there are 1 to %d", c.Version, MaxVersion)
	case len(c.Programs) == 0:
		return errors.New("a dispatcher of libxdp's runs at least one program")
	case len(c.Programs) > MaxMembers:
		return hook.Because(hook.ErrChainFull, "%d programs: a dispatcher of libxdp's runs at most %d", len(c.Programs), MaxMembers)
	case c.Frags && c.Version < 2:
		return fmt.Errorf("frags: version %d of libxdp's dispatcher does not know multi-buffer packets", c.Version)
	case c.DevBound && c.Version < 3:
		return fmt.Errorf("version %d of libxdp's dispatcher cannot be bound to a device", c.Version)
	}
	return nil
}

// MarshalBinary is the inverse of [ParseConfig]. Version 1 has no room for the
// flags of programs, so they are left out.
func (c Config) MarshalBinary() ([]byte, error) {
	if err := c.Check(); err != nil {
		return nil, err
	}
	data := make([]byte, sizes[c.Version])
	count := byte(len(c.Programs))
	if c.Version == 1 {
		data[0] = count
	} else {
		data[0], data[atVersion], data[atCount], data[atFrags] = magic, c.Version, count, toByte(c.Frags)
	}
	for i, p := range c.Programs {
		binary.NativeEndian.PutUint32(data[atActions+4*i:], p.Actions|1<<notAttached)
		binary.NativeEndian.PutUint32(data[atPriority+4*i:], p.Priority)
		if c.Version >= 2 {
			binary.NativeEndian.PutUint32(data[atFlags+4*i:], p.Flags)
		}
	}
	if c.Version >= 3 {
		data[atDevBound] = toByte(c.DevBound)
	}
	return data, nil
}

func toByte(b bool) byte {
	if b {
		return 1
	}
	return 0
}
