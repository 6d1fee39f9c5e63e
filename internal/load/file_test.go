package load

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/libxdp"
)

const testdata = "../../test/testdata"

// objects returns the bytes of every test object and of the shipped programs, both byte orders.
func objects(t testing.TB) map[string][]byte {
	t.Helper()
	found := map[string][]byte{}
	for _, dir := range []string{testdata, "../../programs/internal/object"} {
		paths, err := filepath.Glob(dir + "/*.o")
		qt.Assert(t, qt.IsNil(err))
		for _, path := range paths {
			b, err := os.ReadFile(path)
			qt.Assert(t, qt.IsNil(err))
			found[filepath.Base(path)] = b
		}
	}
	qt.Assert(t, qt.IsTrue(len(found) > 15))
	return found
}

func parse(t testing.TB, object string) *ebpf.CollectionSpec {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(testdata, object))
	qt.Assert(t, qt.IsNil(err))
	spec, err := Parse(b)
	qt.Assert(t, qt.IsNil(err))
	return spec
}

// A user gives the source, the tar, or another machine's object: the error says which.
func TestParseOfOtherFiles(t *testing.T) {
	self, err := os.ReadFile("/proc/self/exe")
	qt.Assert(t, qt.IsNil(err))
	all := objects(t)
	other := all["count_bpfeb.o"]
	if kernel.ByteOrder.String() == "BigEndian" {
		other = all["count_bpfel.o"]
	}
	for name, test := range map[string]struct {
		b   []byte
		err string
	}{
		"empty":            {nil, `the file is empty`},
		"text":             {[]byte("SEC(\"xdp\") int f() { return 2; }\n"), `not an ELF file; compile the program with clang -O2 -g -target bpf -c`},
		"three bytes":      {[]byte("\x7fEL"), `not an ELF file; .*`},
		"magic alone":      {[]byte("\x7fELF"), `damaged ELF file: .*`},
		"executable":       {self, `an ELF file for EM_.*, not for BPF; compile .*`},
		"other byte order": {other, `compiled for the other byte order \((Big|Little)Endian\)`},
	} {
		spec, err := Parse(test.b)
		qt.Check(t, qt.ErrorMatches(err, test.err), qt.Commentf("%s", name))
		qt.Check(t, qt.ErrorIs(err, hook.ErrUsage))
		qt.Check(t, qt.IsNil(spec))
	}
}

// A file that is cut off at any byte must give an error that says so, and never a panic.
func TestParseOfTruncatedFiles(t *testing.T) {
	for name, b := range objects(t) {
		for n := range len(b) {
			// Try every length near the ends, and some lengths in between.
			if n > 200 && n < len(b)-200 && n%37 != 0 {
				continue
			}
			if _, err := Parse(b[:n]); err != nil {
				qt.Assert(t, qt.ErrorIs(err, hook.ErrUsage), qt.Commentf("%s, %d bytes", name, n))
				qt.Assert(t, qt.IsFalse(strings.Contains(err.Error(), "\n")), qt.Commentf("%q", err.Error()))
			}
		}
	}
}

// One wrong bit anywhere, as from a broken disk or in a hostile file, must not cause a panic.
func TestParseOfDamagedFiles(t *testing.T) {
	for name, b := range objects(t) {
		for i := 0; i < len(b); i += 11 {
			damaged := bytes.Clone(b)
			damaged[i] ^= 1 << (i % 8)
			if _, err := Parse(damaged); err != nil {
				qt.Assert(t, qt.ErrorIs(err, hook.ErrUsage), qt.Commentf("%s, byte %d", name, i))
			}
		}
	}
}

// patience is more time than any object of a sane size needs, even on a slow machine.
const patience = 5 * time.Second

func FuzzParse(f *testing.F) {
	for _, b := range objects(f) {
		f.Add(b)
		f.Add(b[:len(b)/2])
	}
	f.Add([]byte(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		start := time.Now()
		spec, err := Parse(b)
		if took := time.Since(start); took > patience {
			t.Errorf("took %s for %d bytes", took, len(b))
		}
		if (spec == nil) == (err == nil) {
			t.Errorf("spec %v, error %v", spec, err)
		}
		if err != nil {
			return
		}
		// The next steps use only the spec, and must not panic either.
		for name := range spec.Programs {
			_, _ = libxdp.RunConfig(spec.Types, name)
		}
		if name, err := choose(spec, "", hook.XDP); err == nil {
			kernel.KeepOnly(spec, name)
		}
	})
}

// A file that cannot be an object file must be refused unread: a read from a pipe could wait for ever, and from a device never end.
func TestReadFile(t *testing.T) {
	dir := t.TempDir()
	pipe := filepath.Join(dir, "pipe")
	qt.Assert(t, qt.IsNil(unix.Mkfifo(pipe, 0o600)))
	huge := filepath.Join(dir, "huge")
	qt.Assert(t, qt.IsNil(os.WriteFile(huge, nil, 0o600)))
	qt.Assert(t, qt.IsNil(os.Truncate(huge, maxFile+1)))
	for path, why := range map[string]string{
		dir:         `.*: not a regular file`,
		pipe:        `.*: not a regular file`,
		"/dev/zero": `.*: not a regular file`,
		huge:        `.*: 67108865 bytes; object files are at most 67108864`,
	} {
		_, err := ReadFile(path)
		qt.Check(t, qt.ErrorMatches(err, why))
		qt.Check(t, qt.ErrorIs(err, hook.ErrUsage))
	}
	for _, path := range []string{"", filepath.Join(dir, "missing"), "nul\x00"} {
		_, err := ReadFile(path)
		qt.Check(t, qt.IsNotNil(err))
	}
	_, err := ReadFile(filepath.Join(dir, "missing"))
	qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
}

// A user can name a program by function or section; a wrong name gives an error with the right names.
func TestChoose(t *testing.T) {
	for _, test := range []struct {
		object, name string
		want         string
		cause        error
		err          string
	}{
		{"filter.o", "", "ldt_filter", nil, ""},
		{"filter.o", "ldt_filter", "ldt_filter", nil, ""},
		{"filter.o", "xdp", "ldt_filter", nil, ""},
		{"several.o", "ldt_second", "ldt_second", nil, ""},
		{"several.o", "xdp.frags", "ldt_frags", nil, ""},
		{"several.o", "", "", hook.ErrUsage,
			`the file has several programs for xdp: choose one of ldt_first, ldt_frags, ldt_second`},
		{"several.o", "xdp", "", hook.ErrUsage, `section "xdp" has several programs: choose one of ldt_first, ldt_second`},
		{"several.o", "ldt_third", "", fs.ErrNotExist,
			`.*"ldt_third".*: ldt_first, ldt_frags, ldt_second.*`},
		{"several.o", "ldt_tc", "", hook.ErrIncompatible, `program "ldt_tc" is a SchedCLS program; xdp takes XDP programs`},
		{"several.o", "tc", "", hook.ErrIncompatible, `program "ldt_tc" is a SchedCLS program; xdp takes XDP programs`},
		{"noxdp.o", "", "", hook.ErrIncompatible, `no program for xdp in the file; one has SEC\("xdp"\) before its function`},
		{"noxdp.o", "x", "", fs.ErrNotExist, `.*"x".*: none.*`},
	} {
		got, err := choose(parse(t, test.object), test.name, hook.XDP)
		qt.Check(t, qt.Equals(got, test.want))
		if test.cause == nil {
			qt.Check(t, qt.IsNil(err))
			continue
		}
		qt.Check(t, qt.ErrorIs(err, test.cause))
		qt.Check(t, qt.ErrorMatches(err, test.err))
	}
}

// A section with a name of its own says nothing: the hook says what the program is.
func TestChooseByHook(t *testing.T) {
	for _, h := range []hook.Hook{hook.XDP, hook.TCXIngress, hook.CgroupConnect4} {
		for _, name := range []string{"", "prog", "ldt_filter"} {
			spec := parse(t, "filter.o")
			p := spec.Programs["ldt_filter"]
			p.Type, p.AttachType, p.SectionName = ebpf.UnspecifiedProgram, ebpf.AttachNone, "prog"
			got, err := choose(spec, name, h)
			qt.Check(t, qt.IsNil(err))
			qt.Check(t, qt.Equals(got, "ldt_filter"))
			qt.Check(t, qt.Equals(p.Type, kernel.KindOf(h).Program))
			qt.Check(t, qt.Equals(p.AttachType, kernel.KindOf(h).Attach))
		}
	}
	spec := parse(t, "several.o") // what has a name goes before what has none
	spec.Programs["ldt_tc"].Type = ebpf.UnspecifiedProgram
	_, err := choose(spec, "", hook.XDP)
	qt.Check(t, qt.ErrorMatches(err, "the file has several programs for xdp: .*"))
}

// A program gets the chain's shape if it can have that shape.
func TestFit(t *testing.T) {
	const frags = unix.BPF_F_XDP_HAS_FRAGS
	plain, none := dispatch.Plain, dispatch.Shape{AttachType: ebpf.AttachNone}
	for _, test := range []struct {
		program string
		want    *dispatch.Shape
		attach  ebpf.AttachType
		flags   uint32
		err     string
	}{
		{"ldt_first", nil, ebpf.AttachXDP, 0, ""},
		{"ldt_first", &none, ebpf.AttachNone, 0, ""},
		{"ldt_frags", nil, ebpf.AttachXDP, frags, ""},
		{"ldt_frags", &plain, ebpf.AttachXDP, 0, ""},
		{"ldt_frags", &dispatch.Shape{Frags: true}, ebpf.AttachNone, frags, ""},
		{"ldt_first", &dispatch.Shape{AttachType: ebpf.AttachXDP, Frags: true}, 0, 0,
			`program "ldt_first" has attach type BPF_XDP, without frags, the chain attach type BPF_XDP, with frags, and would see only .*SEC\("xdp.frags"\).*`},
		{"ldt_devmap", nil, 0, 0, `program "ldt_devmap" is for a map entry \(section "xdp/devmap"\); use SEC\("xdp"\)`},
		{"ldt_cpumap", &plain, 0, 0, `program "ldt_cpumap" is for a map entry .*`},
	} {
		p := parse(t, "several.o").Programs[test.program]
		shape, err := fit(p, test.want)
		if test.err != "" {
			qt.Check(t, qt.ErrorIs(err, hook.ErrIncompatible))
			qt.Check(t, qt.ErrorMatches(err, test.err))
			continue
		}
		qt.Check(t, qt.IsNil(err))
		qt.Check(t, qt.Equals(p.AttachType, test.attach))
		qt.Check(t, qt.Equals(p.Flags&frags, test.flags))
		qt.Check(t, qt.Equals(shape, dispatch.Shape{AttachType: test.attach, Frags: test.flags != 0}))
	}
	bound := parse(t, "filter.o").Programs["ldt_filter"]
	bound.Ifindex = 1
	_, err := fit(bound, nil)
	qt.Check(t, qt.ErrorMatches(err, `program "ldt_filter" is to be bound to a device; a member cannot be`))
}

// The cause of a refusal is one line, even when the verifier wrote much more.
func TestRefusalText(t *testing.T) {
	cause := errors.New("permission denied")
	for _, test := range []struct {
		log  []string
		want string
	}{
		{[]string{""}, `the verifier refused program "p": permission denied`},
		{[]string{"", "processed 3 insns (limit 1000000)"}, `the verifier refused program "p": permission denied`},
		{
			[]string{"0: R1=ctx()", "R1 invalid mem access 'scalar'", "verification time 12 usec", "stack depth 0", "processed 3 insns", ""},
			`the verifier refused program "p": R1 invalid mem access 'scalar' (permission denied)`,
		},
		{
			[]string{"0: R1=ctx()", "metadata kfuncs require device-bound program", "processed 3 insns", ""},
			`the verifier refused program "p": metadata kfuncs require device-bound program (permission denied); a member of a chain cannot be bound to a device, so it cannot read the device's metadata of packets (XDP hints)`,
		},
	} {
		err := Refused("p", &ebpf.VerifierError{Cause: cause, Log: test.log})
		qt.Check(t, qt.Equals(err.Error(), test.want))
		qt.Check(t, qt.ErrorIs(err, cause))
	}
}

// What a program relocates to and this kernel does not have is named by type and field.
func TestMissingTypes(t *testing.T) {
	if _, err := btf.LoadKernelSpec(); err != nil {
		t.Skip("the kernel has no BTF: ", err)
	}
	for object, want := range map[string][]string{"core.o": {"sk_buff.ldt[1].none", "ldt_none.field"}, "throw.o": nil} {
		spec := parse(t, object)
		var got []string
		for name := range spec.Programs {
			got = append(got, missingTypes(spec, name)...)
		}
		qt.Check(t, qt.DeepEquals(got, want))
	}
	log := []string{"0: (85) call unknown#195896080", "invalid func unknown#195896080", "processed 1 insns"}
	err := Refused("p", &ebpf.VerifierError{Cause: errors.New("bad CO-RE relocation"), Log: log}, "sk_buff.a", "b")
	qt.Check(t, qt.Equals(err.Error(), `the verifier refused program "p": it needs what the types of this kernel do not have: sk_buff.a, b (CO-RE)`))
}

// Map definitions that would lose something are refused with the cause.
func TestOldMaps(t *testing.T) {
	qt.Check(t, qt.IsTrue(unread(parse(t, "elfmap.o").Maps["ldt_acl"])))
	for _, m := range parse(t, "shared.o").Maps {
		qt.Check(t, qt.IsFalse(unread(m)))
	}
	_, err := Spec{Collection: parse(t, "elfmap.o")}.Load(Want{Hook: hook.XDP})
	qt.Check(t, qt.ErrorMatches(err, `map "ldt_acl" is defined in the way of iproute2 .*; define it in SEC\(".maps"\)`))
	qt.Check(t, qt.ErrorIs(err, hook.ErrIncompatible))
	b, err := os.ReadFile("../../test/testdata/shared_nobtf.o")
	qt.Assert(t, qt.IsNil(err))
	_, err = Parse(b)
	qt.Check(t, qt.ErrorMatches(err, `the file has no type information \(BTF\).* clang -O2 -g .*`))
	qt.Check(t, qt.ErrorIs(err, hook.ErrUsage))
}
