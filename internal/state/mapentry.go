package state

import (
	"time"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// entryType tells for which map an XDP program was loaded: AttachXDPDevMap,
// AttachXDPCPUMap, or AttachNone for neither. Such a program reads what a packet
// that comes from a device does not have (egress_ifindex), and must not meet
// one. The kernel does not tell; whether an entry of such a map takes it does.
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

// isEntry tries an entry that has a number and the program.
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
		// The entry has a thread. Stopped before it ran, it never lets go of
		// the program (6.5: "cpumap: Make sure kthread is running before map
		// update returns"); on 5.10 one of 25 programs stayed so.
		time.Sleep(20 * time.Millisecond)
	}
	return true
}
