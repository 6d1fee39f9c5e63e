package initramfs

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"os"
	"testing"

	"github.com/go-quicktest/qt"
	"github.com/google/go-cmp/cmp"
)

var allFields = cmp.AllowUnexported(entry{})

func TestModuleName(t *testing.T) {
	for file, want := range map[string]string{
		"kernel/drivers/net/veth.ko":               "veth",
		"kernel/net/sched/sch_ingress.ko.xz":       "sch_ingress",
		"kernel/crypto/crc32c-generic.ko.zst":      "crc32c_generic",
		"lib/modules/6.1.0-50-amd64/modules.order": "",
		"kernel/x.korean":                          "",
	} {
		name, ok := ModuleName(file)
		qt.Check(t, qt.Equals(name, want), qt.Commentf("%s", file))
		qt.Check(t, qt.Equals(ok, want != ""), qt.Commentf("%s", file))
	}
}

// module makes an ELF file that has only a section of that name.
func module(t *testing.T, section, content string) []byte {
	t.Helper()
	names := "\x00.shstrtab\x00" + section + "\x00"
	const header, sectionHeader = 64, 64
	var b bytes.Buffer
	put := func(v any) { qt.Assert(t, qt.IsNil(binary.Write(&b, binary.LittleEndian, v))) }
	dataAt := uint64(header)
	namesAt := dataAt + uint64(len(content))
	put(elf.Header64{
		Ident: [16]byte{0x7f, 'E', 'L', 'F', 2, 1, 1}, Type: uint16(elf.ET_REL), Machine: uint16(elf.EM_X86_64), Version: 1,
		Shoff: namesAt + uint64(len(names)), Ehsize: header, Shentsize: sectionHeader, Shnum: 3, Shstrndx: 1,
	})
	b.WriteString(content + names)
	put(elf.Section64{})
	put(elf.Section64{Name: 1, Type: uint32(elf.SHT_STRTAB), Off: namesAt, Size: uint64(len(names))})
	put(elf.Section64{Name: 11, Type: uint32(elf.SHT_PROGBITS), Off: dataAt, Size: uint64(len(content))})
	return b.Bytes()
}

func TestModuleDepends(t *testing.T) {
	for info, want := range map[string][]string{
		"license=GPL\x00depends=\x00": nil,
		"license=GPL\x00":             nil,
		"depends=nf_defrag_ipv6,crc32c-generic\x00name=conntrack": {"nf_defrag_ipv6", "crc32c_generic"},
		"alias=depends=x\x00depends=libcrc32c\x00":                {"libcrc32c"},
	} {
		got, err := ModuleDepends(module(t, ".modinfo", info))
		qt.Assert(t, qt.IsNil(err))
		qt.Check(t, qt.DeepEquals(got, want), qt.Commentf("%q", info))
	}
	_, err := ModuleDepends(module(t, ".text", "depends=x"))
	qt.Check(t, qt.ErrorMatches(err, "no .modinfo: .*"))
	_, err = ModuleDepends([]byte("text"))
	qt.Check(t, qt.IsNotNil(err))
}

func TestModuleOrder(t *testing.T) {
	needs := map[string][]string{
		"veth":         nil,
		"nf_tables":    {"nfnetlink", "libcrc32c"},
		"nfnetlink":    nil,
		"libcrc32c":    nil,
		"hook":         {"nf_tables", "nfnetlink"},
		"broken":       {"away"},
		"one_of_two":   {"other_of_two"},
		"other_of_two": {"one_of_two"},
	}
	depends := func(name string) ([]string, bool, error) {
		if name == "unreadable" {
			return nil, false, os.ErrPermission
		}
		list, ok := needs[name]
		return list, ok, nil
	}
	order, err := ModuleOrder([]string{"hook", "built_in", "veth", "nfnetlink"}, depends)
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.DeepEquals(order, []string{"nfnetlink", "libcrc32c", "nf_tables", "hook", "veth"}))

	_, err = ModuleOrder([]string{"broken"}, depends)
	qt.Check(t, qt.ErrorMatches(err, "module broken needs away, which is not there"))
	_, err = ModuleOrder([]string{"unreadable"}, depends)
	qt.Check(t, qt.IsTrue(errors.Is(err, os.ErrPermission)))
	// Real modules never depend on each other, but such a pair must not cause
	// an endless loop.
	order, err = ModuleOrder([]string{"one_of_two"}, depends)
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.HasLen(order, 2))
}

// This test binary is linked statically, like the machines' test binaries.
func TestLibraries(t *testing.T) {
	self, err := os.Executable()
	qt.Assert(t, qt.IsNil(err))
	f, err := elf.Open(self)
	qt.Assert(t, qt.IsNil(err))
	defer f.Close()
	imported, err := f.ImportedLibraries()
	qt.Assert(t, qt.IsNil(err))
	libraries, interpreter, err := Libraries("/", self)
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.IsTrue(len(libraries) >= len(imported)))
	qt.Check(t, qt.Equals(interpreter != "", len(imported) > 0))
	if len(imported) > 0 { // with the race detector
		_, _, err = Libraries(t.TempDir(), self)
		qt.Check(t, qt.ErrorIs(err, os.ErrNotExist))
	}
	_, _, err = Libraries("/", "modules_test.go")
	qt.Check(t, qt.IsNotNil(err))
}
