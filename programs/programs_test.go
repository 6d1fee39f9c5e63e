package programs_test

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/rlimit"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/programs"
)

// Verdicts of XDP.
const (
	drop = 1
	pass = 2
)

// TestMain also checks that no test leaves a program or a map behind.
func TestMain(m *testing.M) {
	if os.Getenv("LDT_HELPER") != "" {
		testenv.Main(m) // this process does nothing else
	}
	code := m.Run()
	if left := bpfDescriptors(); len(left) > 0 {
		fmt.Fprintln(os.Stderr, "the tests left open:", left)
		code = 1
	}
	os.Exit(code)
}

func bpfDescriptors() []string {
	var found []string
	fds, _ := filepath.Glob("/proc/self/fd/*")
	for _, fd := range fds {
		if file, _ := os.Readlink(fd); strings.Contains(file, "bpf") {
			found = append(found, file)
		}
	}
	return found
}

// constants are numbers and, as strings, addresses.
type constants map[string]any

// set sets a constant of any size.
func set(v *ebpf.VariableSpec, value any) error {
	if addr, ok := value.(string); ok {
		return v.Set(netip.MustParseAddr(addr).AsSlice())
	}
	number := reflect.ValueOf(value).Convert(reflect.TypeFor[uint64]()).Uint()
	switch v.Size() {
	case 1:
		return v.Set(uint8(number))
	case 2:
		return v.Set(uint16(number))
	case 4:
		return v.Set(uint32(number))
	}
	return v.Set(number)
}

// load loads a program for XDP, for the length of the test.
func load(t *testing.T, name string, constants constants) *ebpf.Collection {
	t.Helper()
	return loadFor(t, hook.XDP, name, constants)
}

// loadFor loads a program for a hook, for the length of the test.
func loadFor(t *testing.T, h hook.Hook, name string, constants constants) *ebpf.Collection {
	t.Helper()
	spec, err := programs.Spec(name)
	qt.Assert(t, qt.IsNil(err))
	for name, value := range constants {
		qt.Assert(t, qt.IsNil(set(spec.Variables[name], value)))
	}
	function := programs.Function(name, h)
	qt.Assert(t, qt.IsNotNil(spec.Programs[function]))
	maps.DeleteFunc(spec.Programs, func(other string, _ *ebpf.ProgramSpec) bool { return other != function })

	// Only kernels before 5.11 have this limit. If this fails, loading reports it.
	_ = rlimit.RemoveMemlock()
	coll, err := ebpf.NewCollection(spec)
	if errors.Is(err, fs.ErrPermission) {
		t.Fatalf("this test loads a program into the kernel and runs it there: run it as root (%v)", err)
	}
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(coll.Close)
	return coll
}

// run runs a program on one packet.
func run(t *testing.T, coll *ebpf.Collection, name string, packet []byte) uint32 {
	t.Helper()
	verdict, err := coll.Programs[name].Run(&ebpf.RunOptions{Data: packet})
	qt.Assert(t, qt.IsNil(err))
	return verdict
}

// perCPU adds up the fields of a per-CPU value.
func perCPU[V any](t *testing.T, m *ebpf.Map, key any, add func(sum *V, v V)) V {
	t.Helper()
	var (
		values []V
		sum    V
	)
	qt.Assert(t, qt.IsNil(m.Lookup(key, &values)))
	for _, v := range values {
		add(&sum, v)
	}
	return sum
}

func TestNames(t *testing.T) {
	qt.Assert(t, qt.DeepEquals(programs.Names(), []string{"count", "droplist", "ratelimit", "redirect", "sample"}))

	for _, name := range programs.Names() {
		t.Run(name, func(t *testing.T) {
			qt.Check(t, qt.Not(qt.Equals(programs.Describe(name), "")))

			spec, err := programs.Spec(name)
			qt.Assert(t, qt.IsNil(err))
			for function, p := range spec.Programs {
				qt.Check(t, qt.Equals(p.License, "Dual BSD/GPL"))
				qt.Check(t, qt.IsTrue(len(function) < unix.BPF_OBJ_NAME_LEN), qt.Commentf("the kernel cuts %s", function))
			}

			other, err := programs.Spec(name)
			qt.Assert(t, qt.IsNil(err))
			qt.Check(t, qt.IsTrue(spec != other))
		})
	}
}

func TestHooks(t *testing.T) {
	cgroupSKB := []hook.Hook{hook.CgroupSKBIngress, hook.CgroupSKBEgress}
	tc := []hook.Hook{hook.TCXIngress, hook.TCXEgress, hook.TCIngress, hook.TCEgress}
	for name, want := range map[string]map[string][]hook.Hook{
		"count":     {"count": {hook.XDP}, "count_tc": tc, "count_cgroup": cgroupSKB},
		"droplist":  {"droplist": {hook.XDP}, "droplist_tc": tc},
		"ratelimit": {"ratelimit": {hook.XDP}},
		"redirect":  {"redirect4": {hook.CgroupConnect4}, "redirect6": {hook.CgroupConnect6}},
		"sample":    {"sample": {hook.XDP}},
	} {
		got := map[string][]hook.Hook{}
		for _, h := range programs.Hooks(name) {
			function := programs.Function(name, h)
			got[function] = append(got[function], h)
		}
		qt.Check(t, qt.DeepEquals(got, want), qt.Commentf("%s", name))
	}
}

// The hook chooses the program: exactly one must fit.
func TestFunctions(t *testing.T) {
	for _, name := range programs.Names() {
		spec, err := programs.Spec(name)
		qt.Assert(t, qt.IsNil(err))
		unused := maps.Clone(spec.Programs)
		for _, h := range hook.Hooks() {
			var want, got []string
			if function := programs.Function(name, h); function != "" {
				want = []string{function}
				delete(unused, function)
			}
			for function, p := range spec.Programs {
				if kernel.KindOf(h).Takes(p) {
					got = append(got, function)
				}
			}
			qt.Check(t, qt.DeepEquals(got, want), qt.Commentf("%s on %s", name, h))
		}
		qt.Check(t, qt.HasLen(unused, 0))
	}
}

func TestUnknownName(t *testing.T) {
	_, err := programs.Spec("dorplist")
	qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
	qt.Check(t, qt.ErrorMatches(err, `no built-in program "dorplist" \(there are count, droplist, ratelimit, redirect, sample\): .*`))
	qt.Check(t, qt.Equals(programs.Describe("dorplist"), ""))
	qt.Check(t, qt.HasLen(programs.Hooks("dorplist"), 0))
	qt.Check(t, qt.Equals(programs.Function("dorplist", hook.XDP), ""))
}

// The objects for both byte orders must have the same programs, maps and constants.
func TestByteOrders(t *testing.T) {
	for _, name := range programs.Names() {
		var shapes [2][]string
		for i, order := range []string{"bpfel", "bpfeb"} {
			spec, err := ebpf.LoadCollectionSpec(filepath.Join("internal", "object", name+"_"+order+".o"))
			qt.Assert(t, qt.IsNil(err))
			for _, p := range spec.Programs {
				shapes[i] = append(shapes[i], fmt.Sprint("program ", p.Name, p.Type, p.AttachType, p.SectionName))
			}
			for _, m := range spec.Maps {
				shapes[i] = append(shapes[i], fmt.Sprint("map ", m.Name, m.Type, m.KeySize, m.ValueSize, m.MaxEntries, m.Flags))
			}
			for constant, v := range spec.Variables {
				shapes[i] = append(shapes[i], fmt.Sprint("constant ", constant, v.Size()))
			}
			slices.Sort(shapes[i])
		}
		qt.Check(t, qt.DeepEquals(shapes[0], shapes[1]), qt.Commentf("%s", name))
	}
}

// The Go types must have the layout of the C types, which the maps' BTF tells.
func TestLayouts(t *testing.T) {
	for _, test := range []struct {
		program, mapName string
		key, value       any
	}{
		{"droplist", "droplist_v4", programs.PrefixV4{}, nil},
		{"droplist", "droplist_v6", programs.PrefixV6{}, nil},
		{"ratelimit", "buckets", nil, programs.Bucket{}},
		{"ratelimit", "totals", nil, programs.LimitTotals{}},
		{"count", "protocols", programs.Protocol{}, programs.Traffic{}},
		{"count", "total", nil, programs.Traffic{}},
		{"redirect", "redirect_v4", programs.DestinationV4{}, programs.TargetV4{}},
		{"redirect", "redirect_v6", programs.DestinationV6{}, programs.TargetV6{}},
		{"sample", "stats", nil, programs.SampleStats{}},
	} {
		spec, err := programs.Spec(test.program)
		qt.Assert(t, qt.IsNil(err))
		m := spec.Maps[test.mapName]
		if test.key != nil {
			checkLayout(t, reflect.TypeOf(test.key), m.Key)
		}
		if test.value != nil {
			checkLayout(t, reflect.TypeOf(test.value), m.Value)
		}
	}
}

func checkLayout(t *testing.T, g reflect.Type, c btf.Type) {
	t.Helper()
	s, ok := btf.UnderlyingType(c).(*btf.Struct)
	qt.Assert(t, qt.IsTrue(ok))
	qt.Check(t, qt.Equals(uint32(g.Size()), s.Size), qt.Commentf("%v", g))
	qt.Assert(t, qt.Equals(g.NumField(), len(s.Members)), qt.Commentf("%v", g))
	for i, member := range s.Members {
		field := g.Field(i)
		qt.Check(t, qt.Equals(uint32(field.Offset), member.Offset.Bytes()), qt.Commentf("%v.%s", g, field.Name))
		qt.Check(t, qt.Equals(strings.ToLower(field.Name), cleanName(member.Name)))
	}
}

// cleanName turns a C name into the Go name in lower case.
func cleanName(c string) string {
	if c == "pad" {
		return "_"
	}
	return strings.ReplaceAll(c, "_", "")
}

// As members of a chain, the programs are tail-called by a program of attach type XDP.
func TestTailCalled(t *testing.T) {
	for _, name := range programs.Names() {
		if programs.Function(name, hook.XDP) == "" {
			continue
		}
		coll := load(t, name, nil)

		slot, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 1})
		qt.Assert(t, qt.IsNil(err))
		defer slot.Close()
		caller, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Type:       ebpf.XDP,
			AttachType: ebpf.AttachXDP,
			Instructions: asm.Instructions{
				asm.LoadMapPtr(asm.R2, slot.FD()),
				asm.Mov.Imm(asm.R3, 0),
				asm.FnTailCall.Call(),
				asm.Mov.Imm(asm.R0, drop),
				asm.Return(),
			},
		})
		qt.Assert(t, qt.IsNil(err))
		defer caller.Close()
		qt.Assert(t, qt.IsNil(slot.Put(uint32(0), coll.Programs[name])))

		verdict, err := caller.Run(&ebpf.RunOptions{Data: packet(eth(typeIPv4), ipv4("192.0.2.1", protoUDP))})
		qt.Assert(t, qt.IsNil(err))
		qt.Check(t, qt.Equals(verdict, pass), qt.Commentf("%s", name))
	}
}

func TestDropKey(t *testing.T) {
	for _, test := range []struct {
		prefix, mapName string
		key             any
	}{
		{"192.0.2.0/24", "droplist_v4", programs.PrefixV4{24, [4]byte{192, 0, 2}}},
		{"192.0.2.9/24", "droplist_v4", programs.PrefixV4{24, [4]byte{192, 0, 2}}},
		{"0.0.0.0/0", "droplist_v4", programs.PrefixV4{}},
		{"::/0", "droplist_v6", programs.PrefixV6{}},
		{"2001:db8::1/128", "droplist_v6", programs.PrefixV6{128, [16]byte{0x20, 0x01, 0x0d, 0xb8, 15: 1}}},
	} {
		prefix := netip.MustParsePrefix(test.prefix)
		mapName, key := programs.DropKey(prefix)
		qt.Check(t, qt.Equals(mapName, test.mapName))
		qt.Check(t, qt.Equals(key, test.key))
		back := key.(interface{ Prefix() netip.Prefix }).Prefix()
		qt.Check(t, qt.Equals(back, prefix.Masked()))
	}
}
