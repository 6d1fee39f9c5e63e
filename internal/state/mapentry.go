package state

import (
	"time"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// entryType returns for which map an XDP program was loaded: AttachXDPDevMap,
// AttachXDPCPUMap, or AttachNone for neither. A program for a map may read what a
// packet from a device does not have (egress_ifindex), and must not run there. The
// kernel does not report this, so entryType tries to put the program into such maps.
func entryType(prog *ebpf.Program) ebpf.AttachType {
	const (
		loopback = 1 // a device that is in every network namespace
		queue    = 8
	)
	switch {
	case isEntry(prog, ebpf.DevMap, loopback):
		return ebpf.AttachXDPDevMap
	case isEntry(prog, ebpf.CPUMap, queue):
		return ebpf.AttachXDPCPUMap
	}
	return ebpf.AttachNone
}

// isEntry tells whether a map accepts an entry of a number and the program.
func isEntry(prog *ebpf.Program, kind ebpf.MapType, number uint32) bool {
	m, err := ebpf.NewMap(&ebpf.MapSpec{Name: "ld_entry", Type: kind, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	if err != nil {
		return false
	}
	defer m.Close()
	if m.Put(uint32(0), [2]uint32{number, uint32(prog.FD())}) != nil {
		return false
	}
	if kind == ebpf.CPUMap && !kernel.Since(6, 5) {
		// The entry has a kernel thread. If the thread is stopped before it ran, the
		// program is never freed (fixed in 6.5: "cpumap: Make sure kthread is running
		// before map update returns"). On 5.10 this happened to one of 25 programs.
		time.Sleep(20 * time.Millisecond)
	}
	return true
}
