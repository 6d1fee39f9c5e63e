package watch

import (
	"fmt"
	"sync/atomic"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// A ring is the buffer into which the kernel writes the records of one CPU.
type ring struct {
	fd  int
	mem []byte
}

// bpfEvent is the bit bpf_event in struct perf_event_attr.
const bpfEvent = unix.CBitFieldMaskBit30

// newProgramEvents returns a ring for each CPU, which tells when programs are loaded and
// freed (PERF_RECORD_BPF_EVENT, Linux 5.1). Most tools load a program to attach it, and
// most programs are freed when the owner of their link or slot is gone. It costs time
// only when a program is loaded or freed.
func newProgramEvents() (rings []*ring, err error) {
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			for _, r := range rings {
				r.close()
			}
			rings = nil
		}
	}()
	for cpu := range cpus {
		attr := unix.PerfEventAttr{
			Type: unix.PERF_TYPE_SOFTWARE, Size: unix.PERF_ATTR_SIZE_VER6, Config: unix.PERF_COUNT_SW_DUMMY,
			Bits: unix.PerfBitWatermark | bpfEvent, Wakeup: 1,
		}
		fd, err := unix.PerfEventOpen(&attr, -1, cpu, -1, unix.PERF_FLAG_FD_CLOEXEC)
		if err == unix.ENODEV {
			continue // offline
		}
		if err != nil {
			return rings, fmt.Errorf("perf_event_open: %w", kernel.Explain(err))
		}
		r := &ring{fd: fd}
		rings = append(rings, r)
		if r.mem, err = unix.Mmap(fd, 0, 2*unix.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
			return rings, fmt.Errorf("perf ring: %w", kernel.Explain(err))
		}
	}
	return rings, nil
}

// read skips the records: it is enough that one came.
func (r *ring) read() (sign bool, lost string) {
	page := (*unix.PerfEventMmapPage)(unsafe.Pointer(&r.mem[0]))
	head := atomic.LoadUint64(&page.Data_head)
	sign = head != atomic.LoadUint64(&page.Data_tail)
	atomic.StoreUint64(&page.Data_tail, head)
	return sign, ""
}

func (r *ring) close() {
	if r.mem != nil {
		_ = unix.Munmap(r.mem)
	}
	unix.Close(r.fd)
}
