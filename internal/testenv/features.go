package testenv

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// A Feature is something that only some of the supported kernels have. A feature that "dispatcher
// features" lists has the same name there.
type Feature string

// The features that tests depend on.
const (
	FeatureCallbacks     Feature = "callbacks"      // program functions that a helper calls
	FeatureLinkTarget    Feature = "link-target"    // links of freplace say what they extend
	FeatureNetNSCookie   Feature = "netns-cookie"   // namespaces have numbers that are never reused
	FeatureFrags         Feature = "frags"          // XDP programs that can handle packets in fragments
	FeaturePerfLink      Feature = "perf-link"      // programs of perf events with links
	FeatureLSMCgroup     Feature = "lsm-cgroup"     // LSM programs on a cgroup
	FeatureNetfilterLink Feature = "netfilter-link" // BPF programs as netfilter hooks
	FeatureXDPKfuncs     Feature = "xdp-kfuncs"     // kernel functions that XDP programs may call
	FeatureExceptions    Feature = "exceptions"     // programs that end by bpf_throw
	FeatureMayGoto       Feature = "may-goto"       // loops that the kernel ends
	FeatureTCX           Feature = "tcx-link"       // links on tcx/*
	FeatureCgroupOrder   Feature = "cgroup-order"   // a program can be attached before or after another on a cgroup
	FeatureSlotsAlone    Feature = "slots-alone"    // what is in a prog array cannot be extended, and the other way round
	FeatureSlotTypes     Feature = "slot-types"     // a prog array takes programs of one expected attach type only
)

// features tells since when the kernel has each feature, and how to try it: distributions bring features to
// older kernels. Without a function the version decides.
var features = map[Feature]struct {
	major, minor int
	try          func() bool
}{
	FeatureCallbacks:     {5, 13, nil},
	FeatureLinkTarget:    {5, 13, nil},
	FeatureNetNSCookie:   {5, 14, tryCookie},
	FeatureFrags:         {5, 18, tryFrags},
	FeaturePerfLink:      {5, 15, nil},
	FeatureLSMCgroup:     {6, 0, nil},
	FeatureNetfilterLink: {6, 4, nil},
	FeatureXDPKfuncs:     {6, 4, nil},
	FeatureExceptions:    {6, 7, nil},
	FeatureMayGoto:       {6, 9, nil},
	FeatureTCX:           {6, 6, tryTCX},
	FeatureCgroupOrder:   {6, 17, tryOrder},
	FeatureSlotsAlone:    {6, 12, nil},
	FeatureSlotTypes:     {6, 18, trySlotTypes},
}

var (
	tried     = map[Feature]bool{}
	triedLock sync.Mutex
)

// Has tells whether this kernel has a feature. It fails the test when a kernel lacks a feature that its
// version should have, so that no test is skipped there.
func Has(t testing.TB, feature Feature) bool {
	t.Helper()
	Require(t)
	triedLock.Lock()
	defer triedLock.Unlock()
	has, known := tried[feature]
	if !known {
		f, listed := features[feature]
		if !listed {
			t.Fatalf("there is no feature %q", feature)
		}
		late := kernel.Since(f.major, f.minor)
		if has = late; f.try != nil {
			has = f.try()
		}
		if late && !has {
			t.Fatalf("this kernel does not have %s, though Linux %d.%d had it", feature, f.major, f.minor)
		}
		tried[feature] = has
	}
	return has
}

// Need skips the test on kernels without the feature. Another test checks what these kernels answer.
func Need(t testing.TB, feature Feature) {
	t.Helper()
	if !Has(t, feature) {
		t.Skip(Requirement(feature))
	}
}

// Requirement says in words which kernel a feature needs.
func Requirement(feature Feature) string {
	f := features[feature]
	return fmt.Sprintf("%s needs Linux %d.%d", feature, f.major, f.minor)
}

// NeedHook is [Need] for a hook.
func NeedHook(t testing.TB, h hook.Hook) {
	t.Helper()
	if !HasHook(t, h) {
		t.Skipf("%s needs Linux %s", h, kernel.KindOf(h).Needs)
	}
}

// NeedFreplace skips the test when the kernel refuses programs that replace functions of others. Kernels of
// any version may be built or hardened that way. It tries with its own programs, so that a fault of the tested
// code cannot look like a refusal.
func NeedFreplace(t testing.TB) {
	t.Helper()
	Require(t)
	spec := newSpec("ldt_target", nil)
	spec.Instructions = Typed("ldt_target", asm.Instructions{asm.Mov.Imm(asm.R0, XDPPass), asm.Return()})
	target, err := ebpf.NewProgram(spec)
	if err != nil {
		t.Fatalf("load a program: %v", err)
	}
	defer target.Close()
	prog, err := Extension(target, "ldt_target", XDPDrop)
	if errors.Is(err, unix.EPERM) || errors.Is(err, ebpf.ErrNotSupported) {
		t.Skip("this kernel refuses freplace: runs in the kernel matrix")
	}
	if err != nil {
		t.Fatalf("load a program that replaces a function: %v", err)
	}
	prog.Close()
}

// Extend loads a program that gives every packet the same verdict, and puts it in the place of a function of
// the target.
func Extend(target *ebpf.Program, function string, verdict int32) (link.Link, error) {
	prog, err := Extension(target, function, verdict)
	if err != nil {
		return nil, err
	}
	defer prog.Close()
	return link.AttachFreplace(nil, "", prog)
}

// Extension loads the program of [Extend].
func Extension(target *ebpf.Program, function string, verdict int32) (*ebpf.Program, error) {
	handle, err := target.Handle()
	if err != nil {
		return nil, err
	}
	defer handle.Close()
	types, err := handle.Spec(nil)
	if err != nil {
		return nil, err
	}
	var replaced *btf.Func
	if err := types.TypeByName(function, &replaced); err != nil {
		return nil, err
	}
	insns := asm.Instructions{asm.Mov.Imm(asm.R0, verdict), asm.Return()}
	insns[0] = btf.WithFuncMetadata(insns[0], &btf.Func{Name: "ldt_freplace", Type: replaced.Type, Linkage: btf.GlobalFunc})
	return ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "ldt_freplace", Type: ebpf.Extension, AttachTarget: target, AttachTo: function, License: license, Instructions: insns,
	})
}

// HasHook is [Has] for a hook.
func HasHook(t testing.TB, h hook.Hook) bool {
	t.Helper()
	Require(t)
	if h.Family() == "tcx" {
		return Has(t, FeatureTCX)
	}
	spec := VerdictSpec("ldt_probe", CgroupAllow, On(h))
	prog, err := ebpf.NewProgram(spec)
	if err == nil {
		prog.Close()
		return true
	}
	var major, minor int
	fmt.Sscanf(kernel.KindOf(h).Needs, "%d.%d", &major, &minor)
	if !errors.Is(err, unix.EINVAL) || kernel.Since(major, minor) {
		t.Fatalf("load a program for %s: %v", h, err)
	}
	return false
}

func tryCookie() bool {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	_, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	return err == nil
}

func tryFrags() bool {
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.XDP, Flags: unix.BPF_F_XDP_HAS_FRAGS, License: license,
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, XDPPass), asm.Return()},
	})
	if err != nil {
		return false
	}
	prog.Close()
	return true
}

// tryTCX queries the loopback device's hook, and changes nothing.
func tryTCX() bool {
	const loopback = 1
	_, err := kernel.QueryPrograms(loopback, ebpf.AttachTCXIngress, 0)
	return err == nil
}

// tryOrder asks whether the kernel has a revision number for a cgroup's programs. Without one a program cannot
// be attached before or after another.
func tryOrder() bool {
	path, err := cgroupRoot()
	if err != nil {
		return false
	}
	root, err := os.Open(path)
	if err != nil {
		return false
	}
	defer root.Close()
	q, err := kernel.QueryPrograms(int(root.Fd()), ebpf.AttachCGroupInet4Connect, 0)
	return err == nil && q.Revision != 0
}

// trySlotTypes asks whether two programs that differ only in their expected attach type fit
// in one prog array.
func trySlotTypes() bool {
	slots, err := ebpf.NewMap(&ebpf.MapSpec{Name: "ldt_slots", Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		return false
	}
	defer slots.Close()
	for _, attach := range []ebpf.AttachType{ebpf.AttachNone, ebpf.AttachXDP} {
		prog, err := ebpf.NewProgram(VerdictSpec("ldt_probe", XDPPass, ExpectedAttachType(attach)))
		if err != nil {
			return false
		}
		defer prog.Close()
		if err := slots.Put(uint32(0), prog); err != nil {
			return true
		}
	}
	return false
}
