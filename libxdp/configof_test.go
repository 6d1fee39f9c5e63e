package libxdp

import (
	"os"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/code"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// libxdp would recognize every dispatcher made here, by the same checks, and
// its configuration is read back complete.
func TestConfigOf(t *testing.T) {
	start(t)
	for version := uint8(1); version <= MaxVersion; version++ {
		for n := 1; n <= MaxMembers; n++ {
			c := Config{Version: version}
			for i := range n {
				p := ProgramConfig{Priority: uint32(7 * i), Actions: 1<<hook.Pass | uint32(i)}
				if version > 1 {
					p.Flags = hasFrags
				}
				c.Programs = append(c.Programs, p)
			}
			prog, err := newDispatcher(c, 0)
			qt.Assert(t, qt.IsNil(err))
			got, err := ConfigOf(prog)
			qt.Check(t, qt.IsNil(err))
			qt.Check(t, qt.DeepEquals(got, c))
			prog.Close()
		}
	}
}

func TestDispatcherWithFrags(t *testing.T) {
	start(t)
	testenv.Need(t, testenv.FeatureFrags)
	c := configOf(3, 4, 4)
	c.Frags = true
	prog, err := newDispatcher(c, 0)
	qt.Assert(t, qt.IsNil(err))
	defer prog.Close()
	got, err := ConfigOf(prog)
	qt.Check(t, qt.IsNil(err))
	qt.Check(t, qt.DeepEquals(got, c))
}

// A configuration can be trusted: nothing can change it afterwards.
func TestConfigIsFrozen(t *testing.T) {
	start(t)
	prog, err := newDispatcher(configOf(2, 4, 4), 0)
	qt.Assert(t, qt.IsNil(err))
	defer prog.Close()
	maps := testenv.Maps(t, prog)
	qt.Assert(t, qt.HasLen(maps, 1))
	m := maps[0]
	defer m.Close()
	qt.Check(t, qt.ErrorIs(m.Put(uint32(0), make([]byte, m.ValueSize())), unix.EPERM))
}

// lookalike loads a program that resembles a dispatcher in some respects.
func lookalike(t *testing.T, name string, types bool, maps ...*ebpf.MapSpec) *ebpf.Program {
	t.Helper()
	first := asm.Mov.Imm(asm.R0, int32(hook.Pass))
	if types {
		first = btf.WithFuncMetadata(first, code.Global(name))
	}
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: name, Type: ebpf.XDP, License: "GPL",
		Instructions: asm.Instructions{first.WithSymbol(name), asm.Return()},
	})
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { prog.Close() })
	for _, spec := range maps {
		m, err := ebpf.NewMap(spec)
		qt.Assert(t, qt.IsNil(err))
		defer m.Close()
		qt.Assert(t, qt.IsNil(prog.BindMap(m)))
	}
	return prog
}

// A program that only resembles a dispatcher must not be taken for one: it
// would be detached from its device.
func TestConfigOfOtherPrograms(t *testing.T) {
	start(t)
	value := func(version uint8) *ebpf.MapSpec {
		data, err := configOf(version, 4, 4).MarshalBinary()
		qt.Assert(t, qt.IsNil(err))
		return &ebpf.MapSpec{
			Name: "ldt_config", Type: ebpf.Array, KeySize: 4, ValueSize: uint32(len(data)), MaxEntries: 1,
			Flags: unix.BPF_F_RDONLY_PROG, Contents: []ebpf.MapKV{{Key: uint32(0), Value: data}},
		}
	}
	change := func(version uint8, fn func(m *ebpf.MapSpec, data []byte)) *ebpf.MapSpec {
		m := value(version)
		fn(m, m.Contents[0].Value.([]byte))
		return m
	}
	// With everything it is a dispatcher.
	_, err := ConfigOf(lookalike(t, mainFunction, true, value(3)))
	qt.Assert(t, qt.IsNil(err))

	for name, test := range map[string]struct {
		prog *ebpf.Program
		is   error
		err  string
	}{
		"other name":      {lookalike(t, "xdp_dispatcher2", true, value(3)), ErrNotDispatcher, `not a dispatcher of libxdp's`},
		"shorter name":    {lookalike(t, "xdp_dispatche", true, value(3)), ErrNotDispatcher, `not a dispatcher of libxdp's`},
		"no BTF":          {lookalike(t, mainFunction, false, value(3)), ErrNotDispatcher, `.* has no BTF`},
		"no map":          {lookalike(t, mainFunction, true), ErrNotDispatcher, `.* has 0 maps in the place of 1`},
		"two maps":        {lookalike(t, mainFunction, true, value(3), value(3)), ErrNotDispatcher, `.* has 2 maps in the place of 1`},
		"writable by BPF": {lookalike(t, mainFunction, true, change(3, func(m *ebpf.MapSpec, _ []byte) { m.Flags = 0 })), ErrNotDispatcher, `.* its map is not libxdp's configuration`},
		"two entries":     {lookalike(t, mainFunction, true, change(3, func(m *ebpf.MapSpec, _ []byte) { m.MaxEntries = 2 })), ErrNotDispatcher, `.* its map is not libxdp's configuration`},
		"a hash": {lookalike(t, mainFunction, true, change(3, func(m *ebpf.MapSpec, _ []byte) { m.Type = ebpf.Hash })), ErrNotDispatcher,
			`.* its map is not libxdp's configuration`},
		"too short": {lookalike(t, mainFunction, true, change(3, func(m *ebpf.MapSpec, data []byte) {
			m.ValueSize, m.Contents[0].Value = 8, data[:8]
		})), ErrNotDispatcher, `the configuration has 8 bytes, .*`},
		"later version":              {lookalike(t, mainFunction, true, change(3, func(_ *ebpf.MapSpec, data []byte) { data[1] = 4 })), ErrVersion, `version 4 .*`},
		"11 programs":                {lookalike(t, mainFunction, true, change(3, func(_ *ebpf.MapSpec, data []byte) { data[2] = 11 })), ErrNotDispatcher, `.* 11 programs, .*`},
		"version 1 that is not said": {lookalike(t, mainFunction, true, value(1)), ErrNotDispatcher, `the configuration begins with 2, not with 236`},
	} {
		_, err := ConfigOf(test.prog)
		qt.Check(t, qt.ErrorIs(err, test.is), qt.Commentf("%s", name))
		qt.Check(t, qt.ErrorMatches(err, test.err), qt.Commentf("%s", name))
	}
}

// Version 1 and later unknown versions are in a type of the program.
func TestVersionInTypes(t *testing.T) {
	start(t)
	for _, test := range []struct {
		version uint8
		is      error
	}{{1, nil}, {2, ErrNotDispatcher}, {3, ErrNotDispatcher}, {4, ErrVersion}, {200, ErrVersion}} {
		c := configOf(1, 4, 4)
		config, err := configMap(c)
		qt.Assert(t, qt.IsNil(err))
		c.Version = test.version
		prog, err := loadDispatcher(c, 0, stubBody)
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.IsNil(prog.BindMap(config)))
		_, err = ConfigOf(prog)
		if test.is == nil {
			qt.Check(t, qt.IsNil(err))
		} else {
			qt.Check(t, qt.ErrorIs(err, test.is))
		}
		prog.Close()
		config.Close()
	}
}

// The error for a dispatcher that cannot be loaded says why.
func TestRefusedDispatcher(t *testing.T) {
	start(t)
	_, err := newDispatcher(Config{Version: 3}, 0)
	qt.Check(t, qt.ErrorMatches(err, `a dispatcher of libxdp's runs at least one program`))
	_, err = newDispatcher(configOf(3, make([]uint32, 11)...), 0)
	qt.Check(t, qt.ErrorIs(err, hook.ErrChainFull))
	_, err = loadDispatcher(configOf(3, 4), 0, func(int) asm.Instructions {
		return asm.Instructions{asm.Mov.Reg(asm.R0, asm.R7), asm.Return()}
	})
	qt.Check(t, qt.ErrorIs(err, unix.EACCES))
	qt.Check(t, qt.ErrorMatches(err, `load libxdp's dispatcher: permission denied \(R7 !read_ok\).*`))
	bound := configOf(3, 4)
	bound.DevBound = true
	_, err = newDispatcher(bound, 1<<30) // there is no such device
	qt.Check(t, qt.IsNotNil(err))
}

// No descriptor stays open, even after a failure.
func TestDescriptors(t *testing.T) {
	start(t)
	count := func() int {
		files, err := os.ReadDir("/proc/self/fd")
		qt.Assert(t, qt.IsNil(err))
		return len(files)
	}
	once := func() {
		prog, err := newDispatcher(configOf(1, 4, 4), 0)
		qt.Assert(t, qt.IsNil(err))
		_, err = ConfigOf(prog)
		qt.Assert(t, qt.IsNil(err))
		_, err = functionName(prog)
		qt.Assert(t, qt.IsNil(err))
		prog.Close()
		_, err = loadDispatcher(configOf(1, 4), 0, func(int) asm.Instructions { return asm.Instructions{asm.Return()} })
		qt.Assert(t, qt.IsNotNil(err))
	}
	once()
	before := count()
	for range 20 {
		once()
	}
	qt.Check(t, qt.Equals(count(), before))
}
