package libxdp

import (
	"encoding/binary"
	"encoding/hex"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
)

// Three programs, as libxdp writes them on a little-endian machine.
var layouts = map[uint8]string{
	1: "03000000 04000080 06000080 00000080" + rest + "0a000000 32000000 c8000000" + rest,
	2: "ec020301 04000080 06000080 00000080" + rest + "0a000000 32000000 c8000000" + rest + "20000000 20000000 20000000" + rest,
	3: "ec030301 04000080 06000080 00000080" + rest + "0a000000 32000000 c8000000" + rest + "60000000 60000000 60000000" + rest + "01000000",
}

var rest = strings.Repeat("00000000", MaxMembers-3)

func layout(t testing.TB, version uint8) []byte {
	t.Helper()
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Skip("the layouts in this test are those of little-endian machines")
	}
	data, err := hex.DecodeString(strings.ReplaceAll(layouts[version], " ", ""))
	qt.Assert(t, qt.IsNil(err))
	return data
}

func three(version uint8) Config {
	c := Config{Version: version, Frags: version >= 2, DevBound: version >= 3, Programs: []ProgramConfig{
		{Priority: 10, Actions: 1 << hook.Pass},
		{Priority: 50, Actions: 1<<hook.Pass | 1<<hook.Drop},
		{Priority: 200},
	}}
	for i := range c.Programs {
		c.Programs[i].Flags = map[uint8]uint32{2: hasFrags, 3: hasFrags | devBoundOnly}[version]
	}
	return c
}

// Configurations of libxdp can be read, and this package writes the same bytes as
// libxdp.
func TestConfigLayout(t *testing.T) {
	for version, size := range map[uint8]int{1: 84, 2: 124, 3: 128} {
		data := layout(t, version)
		qt.Assert(t, qt.HasLen(data, size))
		got, err := ParseConfig(data, version)
		qt.Assert(t, qt.IsNil(err))
		qt.Check(t, qt.DeepEquals(got, three(version)))
		written, err := three(version).MarshalBinary()
		qt.Assert(t, qt.IsNil(err))
		qt.Check(t, qt.DeepEquals(written, data))
		// Except in the latest version, libxdp reads the known part of a longer
		// configuration.
		_, err = ParseConfig(append(data, 0), version)
		qt.Check(t, qt.Equals(err == nil, version < 3), qt.Commentf("version %d", version))
	}
}

// The version in the bytes, if they have one, overrides the BTF's.
func TestConfigVersion(t *testing.T) {
	for _, btfSays := range []uint8{0, 1, 2, 3, 4, 255} {
		got, err := ParseConfig(layout(t, 2), btfSays)
		qt.Assert(t, qt.IsNil(err))
		qt.Check(t, qt.Equals(got.Version, 2))
		_, err = ParseConfig(layout(t, 1), btfSays)
		qt.Check(t, qt.Equals(err == nil, btfSays == 1))
	}
}

func TestConfigOfOtherBytes(t *testing.T) {
	change := func(version uint8, at int, b byte) []byte {
		data := layout(t, version)
		data[at] = b
		return data
	}
	for name, test := range map[string]struct {
		data    []byte
		version uint8
		is      error
		err     string
	}{
		"empty":              {nil, 1, ErrNotDispatcher, `the configuration has 0 bytes, it takes 84 at least`},
		"magic alone":        {[]byte{magic}, 0, ErrNotDispatcher, `the configuration has 1 bytes, it takes 84 at least`},
		"no flags":           {layout(t, 2)[:84], 0, ErrNotDispatcher, `the configuration has 84 bytes, 124 in version 2`},
		"one byte short (1)": {layout(t, 1)[:83], 1, ErrNotDispatcher, `the configuration has 83 bytes, it takes 84 at least`},
		"one byte short (3)": {layout(t, 3)[:127], 0, ErrNotDispatcher, `the configuration has 127 bytes, 128 in version 3`},
		"no magic":           {layout(t, 1), 0, ErrNotDispatcher, `the configuration begins with 3, not with 236`},
		"magic of version 1": {change(3, 1, 1), 0, ErrNotDispatcher, `.* version 1, which does not begin like that`},
		"magic of version 0": {change(3, 1, 0), 0, ErrNotDispatcher, `.* version 0, which does not begin like that`},
		"later version":      {change(3, 1, 4), 0, ErrVersion, `version 4 of libxdp's dispatcher is later than 3, .*`},
		"much later":         {change(3, 1, 255), 0, ErrVersion, `version 255 .*`},
		"11 programs":        {change(3, 2, 11), 0, ErrNotDispatcher, `the configuration is of 11 programs, at most 10 fit`},
		"11 programs (1)":    {change(1, 0, 11), 1, ErrNotDispatcher, `the configuration is of 11 programs, at most 10 fit`},
	} {
		c, err := ParseConfig(test.data, test.version)
		qt.Check(t, qt.ErrorIs(err, test.is), qt.Commentf("%s", name))
		qt.Check(t, qt.ErrorMatches(err, test.err), qt.Commentf("%s", name))
		if c.Version > MaxVersion {
			qt.Check(t, qt.ErrorIs(err, ErrVersion))
			c.Version = 0
		}
		qt.Check(t, qt.DeepEquals(c, Config{}))
	}
	none, err := ParseConfig(change(3, 2, 0), 0)
	qt.Check(t, qt.IsNil(err))
	qt.Check(t, qt.HasLen(none.Programs, 0))
}

func TestConfigThatIsNone(t *testing.T) {
	one := []ProgramConfig{{}}
	for name, test := range map[string]struct {
		c   Config
		is  error
		err string
	}{
		"version 0":        {Config{Programs: one}, ErrVersion, `version 0 of libxdp's dispatcher: there are 1 to 3`},
		"version 4":        {Config{Version: 4, Programs: one}, ErrVersion, `version 4 .*`},
		"no program":       {Config{Version: 3}, nil, `.* at least one program`},
		"11 programs":      {Config{Version: 3, Programs: make([]ProgramConfig, 11)}, hook.ErrChainFull, `11 programs: .* at most 10`},
		"frags in 1":       {Config{Version: 1, Frags: true, Programs: one}, nil, `frags: version 1 .*`},
		"device-bound in2": {Config{Version: 2, DevBound: true, Programs: one}, nil, `version 2 .* cannot be bound to a device`},
	} {
		_, err := test.c.MarshalBinary()
		qt.Check(t, qt.ErrorMatches(err, test.err), qt.Commentf("%s", name))
		if test.is != nil {
			qt.Check(t, qt.ErrorIs(err, test.is), qt.Commentf("%s", name))
		}
	}
}

func TestContinueOn(t *testing.T) {
	for actions, want := range map[uint32]hook.VerdictSet{
		0:                             hook.Never,
		1 << notAttached:              hook.Never,
		1 << 7:                        hook.Never, // libxdp's library allows it, but it is no verdict
		1 << hook.Pass:                hook.SetOf(hook.Pass),
		1<<hook.Pass | 1<<notAttached: hook.SetOf(hook.Pass),
		1<<hook.Aborted | 1<<hook.Redirect | 1<<9: hook.SetOf(hook.Aborted, hook.Redirect),
		1<<hook.Verdicts - 1:                      hook.SetOf(hook.Aborted, hook.Drop, hook.Pass, hook.TX, hook.Redirect),
	} {
		got := ProgramConfig{Actions: actions}.ContinueOn()
		qt.Check(t, qt.Equals(got, want), qt.Commentf("%#x", actions))
		qt.Check(t, qt.IsTrue(got.Valid()))
	}
}

// Any process may have made the map that the bytes come from.
func FuzzParseConfig(f *testing.F) {
	for version := range layouts {
		f.Add(layout(f, version), version)
		f.Add(layout(f, version)[:60], version)
	}
	f.Add([]byte{magic, 9}, uint8(0))
	f.Fuzz(func(t *testing.T, data []byte, version uint8) {
		c, err := ParseConfig(data, version)
		if err != nil {
			if len(c.Programs) != 0 {
				t.Errorf("%+v and %v", c, err)
			}
			return
		}
		if len(c.Programs) == 0 {
			return // such configurations are read, but never written
		}
		written, err := c.MarshalBinary()
		if err != nil {
			t.Fatalf("%+v cannot be written: %v", c, err)
		}
		again, err := ParseConfig(written, c.Version)
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.DeepEquals(again, c))
	})
}
