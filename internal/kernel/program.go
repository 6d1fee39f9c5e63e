package kernel

import (
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
)

// Describe returns what the kernel says about a program; the zero value if it
// says nothing.
func Describe(prog *ebpf.Program) hook.Program {
	info, err := prog.Info()
	if err != nil {
		return hook.Program{}
	}
	return DescribeInfo(info)
}

// DescribeInfo is [Describe] for a caller that needs more of the kernel's answer.
func DescribeInfo(info *ebpf.ProgramInfo) hook.Program {
	id, _ := info.ID()
	p := hook.Program{ID: uint32(id), Name: info.Name, Tag: info.Tag}
	p.LoadedBy, _ = info.CreatedByUID()
	if since, ok := info.LoadTime(); ok {
		p.LoadedAt = bootTime(since)
	}
	return p
}

// ProgramID returns the id of a program; 0 if the kernel does not tell it.
func ProgramID(prog *ebpf.Program) uint32 { return Describe(prog).ID }

// MapID returns the id of a map.
func MapID(m *ebpf.Map) (uint32, error) {
	info, err := m.Info()
	if err != nil {
		return 0, Errno("map", err)
	}
	id, _ := info.ID()
	return uint32(id), nil
}

// bootTime converts a time since boot (CLOCK_BOOTTIME). The result is rounded to
// whole seconds: more digits would differ from call to call.
func bootTime(since time.Duration) time.Time {
	var now unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &now) != nil {
		return time.Time{}
	}
	return time.Now().Add(since - time.Duration(now.Nano())).Round(time.Second)
}
