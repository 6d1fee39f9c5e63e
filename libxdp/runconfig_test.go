package libxdp

import (
	"bytes"
	"os"
	"testing"

	"github.com/cilium/ebpf/btf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
)

// The metadata of libxdp's own programs decides the order, and after which verdicts the
// next program runs.
func TestRunConfig(t *testing.T) {
	types, err := btf.LoadSpec("../test/testdata/runconfig.o")
	qt.Assert(t, qt.IsNil(err))
	pass, drop, tx := hook.SetOf(hook.Pass), hook.SetOf(hook.Drop), hook.SetOf(hook.TX)
	for _, test := range []struct {
		program string
		want    hook.Settings
		err     string
	}{
		{"ldt_none", hook.Settings{}, ""},
		{"nosuch", hook.Settings{}, ""},
		{"ldt_drop_only", hook.Settings{Priority: 10, ContinueOn: drop}, ""},
		{"ldt_prio_only", hook.Settings{Priority: 5, ContinueOn: pass}, ""},
		{"ldt_more", hook.Settings{ContinueOn: pass | drop | tx}, ""},
		{"ldt_never", hook.Settings{ContinueOn: hook.Never}, ""},
		{"ldt_zero", hook.Settings{Priority: hook.MinPriority, ContinueOn: pass}, ""}, // libxdp counts from 0
		{"ldt_too_late", hook.Settings{}, `\.xdp_run_config: priority 65536: must be .*`},
		{"ldt_two", hook.Settings{}, `\.xdp_run_config: XDP_PASS is 2, must be 0 or 1`},
		{"ldt_unknown", hook.Settings{}, `\.xdp_run_config: unknown verdict "XDP_BOUNCE" .*`},
		{"ldt_plain_int", hook.Settings{}, `\.xdp_run_config: priority: .* is not a pointer to an array`},
		{"ldt_no_struct", hook.Settings{}, `\.xdp_run_config: _ldt_no_struct is not a struct`},
	} {
		got, err := RunConfig(types, test.program)
		if test.err != "" {
			qt.Check(t, qt.ErrorMatches(err, test.err))
			qt.Check(t, qt.ErrorIs(err, hook.ErrUsage))
			continue
		}
		qt.Check(t, qt.IsNil(err))
		qt.Check(t, qt.Equals(got, test.want), qt.Commentf("%s", test.program))
	}
	got, err := RunConfig(nil, "ldt_drop_only")
	qt.Check(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(got, hook.Settings{}))
}

// A file without the section asks for no settings.
func TestRunConfigWithoutSection(t *testing.T) {
	types, err := btf.LoadSpec("../test/testdata/filter.o")
	qt.Assert(t, qt.IsNil(err))
	got, err := RunConfig(types, "ldt_filter")
	qt.Check(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(got, hook.Settings{}))
}

// BTF and object files may come from any source.
func FuzzRunConfig(f *testing.F) {
	object, err := os.ReadFile("../test/testdata/runconfig.o")
	qt.Assert(f, qt.IsNil(err))
	f.Add(object)
	types, err := btf.LoadSpecFromReader(bytes.NewReader(object))
	qt.Assert(f, qt.IsNil(err))
	var config *btf.Datasec
	qt.Assert(f, qt.IsNil(types.TypeByName(".xdp_run_config", &config)))
	// The BTF alone, of one program and of all.
	for _, vars := range [][]btf.VarSecinfo{config.Vars[:1], config.Vars} {
		var b btf.Builder
		_, err := b.Add(&btf.Datasec{Name: config.Name, Size: config.Size, Vars: vars})
		qt.Assert(f, qt.IsNil(err))
		raw, err := b.Marshal(nil, nil)
		qt.Assert(f, qt.IsNil(err))
		f.Add(raw)
	}
	names := []string{"", "ldt_drop_only", "ldt_more", "ldt_two", "ldt_no_struct"}
	f.Fuzz(func(t *testing.T, data []byte) {
		types := parseTypes(data)
		if types == nil {
			return
		}
		for _, name := range names {
			s, err := RunConfig(types, name)
			if err != nil {
				qt.Check(t, qt.ErrorIs(err, hook.ErrUsage))
				continue
			}
			qt.Check(t, qt.IsNil(s.Check()))
		}
	})
}

// parseTypes returns nil for bytes that are no BTF. Files that debug/elf
// rejects are not the subject of this test.
func parseTypes(data []byte) (types *btf.Spec) {
	defer func() { _ = recover() }()
	types, err := btf.LoadSpecFromReader(bytes.NewReader(data))
	if err != nil {
		return nil
	}
	return types
}
