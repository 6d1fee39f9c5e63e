package scan

import (
	"errors"
	"runtime"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// loadLSM loads a program of type lsm_cgroup that allows everything.
// cilium/ebpf cannot load such programs: it does not look up the function's BTF id.
func loadLSM(function string) (*ebpf.Program, error) {
	spec, err := btf.LoadKernelSpec()
	if err != nil {
		return nil, err
	}
	var fn *btf.Func
	if err := spec.TypeByName(function, &fn); err != nil {
		return nil, err
	}
	id, err := spec.TypeID(fn)
	if err != nil {
		return nil, err
	}
	insns := [...]uint64{0x1_0000_00b7, 0x95} // r0 = 1; exit
	licence := [...]byte{'G', 'P', 'L', 0}
	attr := struct {
		progType, insnCount uint32
		insns, licence      uint64
		_                   [24]byte // log, version, flags
		name                [16]byte
		_, attach           uint32
		_                   [36]byte // BTF
		btfID               uint32
	}{
		progType: uint32(ebpf.LSM), insnCount: uint32(len(insns)), attach: uint32(ebpf.AttachLSMCgroup), btfID: uint32(id),
		insns: uint64(uintptr(unsafe.Pointer(&insns))), licence: uint64(uintptr(unsafe.Pointer(&licence))),
	}
	copy(attr.name[:], "ldt_lsm")
	fd, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_LOAD, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	runtime.KeepAlive(&insns)
	runtime.KeepAlive(&licence)
	if errno != 0 {
		return nil, errno
	}
	return ebpf.NewProgramFromFD(int(fd))
}

func TestLSMCgroup(t *testing.T) {
	testenv.CheckLeaks(t)
	cg := testenv.NewCgroup(t)
	child := cg.Child(t, "child")
	shown := func() (mine []hook.Chain) {
		for _, c := range all(t, Options{}, hook.LSMCgroup) {
			if c.CgroupID == cg.ID || c.CgroupID == child.ID {
				mine = append(mine, c)
			}
		}
		return mine
	}
	prog, err := loadLSM("bpf_lsm_socket_create")
	// Some kernels refuse all LSM programs, and old kernels refuse lsm_cgroup.
	if errors.Is(err, unix.EPERM) || errors.Is(err, btf.ErrNotFound) || !testenv.Has(t, testenv.FeatureLSMCgroup) {
		qt.Assert(t, qt.IsNotNil(err))
		t.Logf("this kernel takes no LSM programs: %v", err)
		qt.Assert(t, qt.HasLen(shown(), 0))
		return
	}
	qt.Assert(t, qt.IsNil(err))
	defer prog.Close()
	attach := func(cg *testenv.Cgroup) uint32 {
		dir := open(t, cg.Path)
		l, err := link.AttachRawLink(link.RawLinkOptions{Target: dir, Program: prog, Attach: ebpf.AttachLSMCgroup})
		return own(t, l, err)
	}
	second, first := attach(child), attach(cg)
	chains := shown()
	qt.Assert(t, qt.HasLen(chains, 2))
	for i, want := range []struct {
		cg *testenv.Cgroup
		id uint32
	}{{cg, first}, {child, second}} {
		qt.Check(t, qt.Equals(chains[i].Target, want.cg.Path))
		qt.Assert(t, qt.HasLen(chains[i].Members, 1))
		wantMember(t, chains[i].Members[0], prog, hook.KindForeign, want.id)
	}
}
