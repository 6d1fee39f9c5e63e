package libxdp

import (
	"bytes"
	"fmt"
	"runtime"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/internal/code"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// newDispatcher loads a dispatcher with that configuration. libxdp of the same
// version recognizes it as its own. Its stubs wait for components, see
// linkComponent. ifindex is the device, in the thread's network namespace, to
// which the dispatcher is bound if the configuration says so.
func newDispatcher(c Config, ifindex int) (*ebpf.Program, error) {
	config, err := configMap(c)
	if err != nil {
		return nil, err
	}
	defer config.Close()
	prog, err := loadDispatcher(c, ifindex, stubBody)
	if err != nil {
		return nil, err
	}
	// A bound map is in the list of the program's maps, where libxdp looks for
	// it, and costs no instruction (BPF_PROG_BIND_MAP, Linux 5.10).
	if err := prog.BindMap(config); err != nil {
		prog.Close()
		return nil, kernel.Errno("bind configuration to libxdp's dispatcher", err)
	}
	return prog, nil
}

// configMap makes the map by which libxdp recognizes a dispatcher.
func configMap(c Config) (*ebpf.Map, error) {
	value, err := c.MarshalBinary()
	if err != nil {
		return nil, err
	}
	m, err := ebpf.NewMap(&ebpf.MapSpec{
		Name: "xdp_disp.rodata", Type: ebpf.Array, Flags: unix.BPF_F_RDONLY_PROG,
		KeySize: 4, ValueSize: uint32(len(value)), MaxEntries: 1,
		Key: code.Int, Value: configType(c.Version), // for bpftool map dump
		Contents: []ebpf.MapKV{{Key: uint32(0), Value: value}},
	})
	if err != nil {
		return nil, kernel.Errno("write configuration of libxdp's dispatcher", err)
	}
	if err := m.Freeze(); err != nil {
		m.Close()
		return nil, kernel.Errno("freeze configuration of libxdp's dispatcher", err)
	}
	return m, nil
}

// configType describes the configuration as libxdp does.
func configType(version uint8) *btf.Struct {
	u8 := &btf.Int{Name: "__u8", Size: 1}
	u32 := &btf.Int{Name: "__u32", Size: 4}
	numbers := &btf.Array{Index: u32, Type: u32, Nelems: MaxMembers}
	s := &btf.Struct{Name: "xdp_dispatcher_config", Size: uint32(sizes[version])}
	member := func(name string, t btf.Type, at int) {
		s.Members = append(s.Members, btf.Member{Name: name, Type: t, Offset: btf.Bits(at * 8)})
	}
	if version == 1 {
		member("num_progs_enabled", u8, 0)
	} else {
		member("magic", u8, 0)
		member("dispatcher_version", u8, atVersion)
		member("num_progs_enabled", u8, atCount)
		member("is_xdp_frags", u8, atFrags)
	}
	member("chain_call_actions", numbers, atActions)
	member("run_prios", numbers, atPriority)
	if version >= 2 {
		member("program_flags", numbers, atFlags)
	}
	if version >= 3 {
		member("is_xdp_devbound", u8, atDevBound)
	}
	return s
}

// versionType returns the variable by which libxdp recognizes a dispatcher of
// version 1.
func versionType(version uint8) *btf.Datasec {
	number := &btf.Array{Index: code.Int, Type: code.Int, Nelems: uint32(version)}
	const size = 8 // of a pointer in BPF
	return &btf.Datasec{Name: versionSection, Size: size, Vars: []btf.VarSecinfo{{
		Type: &btf.Var{Name: versionVariable, Type: &btf.Pointer{Target: number}, Linkage: btf.GlobalVar}, Size: size,
	}}}
}

// progLoad is the needed part of union bpf_attr.
type progLoad struct {
	progType, insnCount  uint32
	insns, license       uint64
	logLevel, logSize    uint32
	log                  uint64
	kernVersion, flags   uint32
	name                 [unix.BPF_OBJ_NAME_LEN]byte
	ifindex, attachType  uint32
	btf, funcInfoSize    uint32
	funcInfo             uint64
	funcInfoCount, lines uint32
	_                    uint64
}

// loadDispatcher loads the program. It makes the system call itself, because
// cilium/ebpf does not load types to which the code does not refer, and the
// version's type is one of those.
func loadDispatcher(c Config, ifindex int, stub func(int) asm.Instructions) (*ebpf.Program, error) {
	insns := generate(c.Programs, stub)
	var types btf.Builder
	info, _, err := btf.MarshalExtInfos(insns, &types)
	if err != nil {
		return nil, fmt.Errorf("types of libxdp's dispatcher: %w", err)
	}
	if _, err := types.Add(versionType(c.Version)); err != nil {
		return nil, fmt.Errorf("types of libxdp's dispatcher: %w", err)
	}
	handle, err := btf.NewHandle(&types)
	if err != nil {
		return nil, kernel.Errno("load types of libxdp's dispatcher", err)
	}
	defer handle.Close()
	var code bytes.Buffer
	if err := insns.Marshal(&code, kernel.ByteOrder); err != nil {
		return nil, fmt.Errorf("code of libxdp's dispatcher: %w", err)
	}

	attr := progLoad{
		progType: uint32(ebpf.XDP), attachType: uint32(ebpf.AttachXDP),
		insnCount: uint32(code.Len() / asm.InstructionSize), insns: address(code.Bytes()), license: address(license),
		btf: uint32(handle.FD()), funcInfoSize: btf.FuncInfoSize,
		funcInfo: address(info), funcInfoCount: uint32(len(info)) / btf.FuncInfoSize,
	}
	copy(attr.name[:], mainFunction)
	if c.Frags {
		attr.flags |= hasFrags
	}
	if c.DevBound {
		attr.flags |= devBoundOnly
		attr.ifindex = uint32(ifindex)
	}
	fd, err := progLoadCall(&attr)
	if err != nil {
		log := bytes.Repeat([]byte{0}, 64<<10)
		attr.logLevel, attr.logSize, attr.log = 1, uint32(len(log)), address(log)
		if fd, err = progLoadCall(&attr); err != nil {
			err = refused(err, log)
		}
		runtime.KeepAlive(log)
	}
	runtime.KeepAlive(code.Bytes())
	runtime.KeepAlive(info)
	if err != nil {
		return nil, kernel.Errno("load libxdp's dispatcher", err)
	}
	prog, err := ebpf.NewProgramFromFD(fd)
	if err != nil {
		return nil, kernel.Errno("load libxdp's dispatcher", err)
	}
	if err := prog.SetHandle(handle); err != nil {
		prog.Close()
		return nil, kernel.Errno("load libxdp's dispatcher", err)
	}
	return prog, nil
}

func progLoadCall(attr *progLoad) (int, error) {
	for {
		fd, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_LOAD, uintptr(unsafe.Pointer(attr)), unsafe.Sizeof(*attr))
		switch errno {
		case 0:
			return int(fd), nil
		case unix.EAGAIN, unix.EINTR: // a signal, for instance from Go's scheduler
			continue
		}
		return -1, errno
	}
}

var license = []byte("GPL\x00")

// address returns the address of bytes on the heap, which do not move.
func address(b []byte) uint64 { return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) }

// refused adds the end of the verifier's log.
func refused(err error, log []byte) error {
	text := bytes.TrimSpace(log[:max(bytes.IndexByte(log, 0), 0)])
	var last []byte
	for line := range bytes.Lines(text) {
		if !bytes.HasPrefix(line, []byte("processed ")) {
			last = bytes.TrimSpace(line)
		}
	}
	if len(last) == 0 {
		return err
	}
	return fmt.Errorf("%w (%s)", err, last)
}
