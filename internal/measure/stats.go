package measure

import (
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// countRuns enables the kernel's run statistics (BPF_ENABLE_STATS, Linux 5.8). The
// kernel counts the runs of all programs while any process has them enabled. The
// descriptor, and with it this process's request, ends with the process.
func (m *meter) countRuns() (err error) {
	if m.stats == nil {
		m.stats, err = ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	}
	return kernel.Errno("run statistics: enable", err)
}

// runsOf reads the statistics of a program. It returns false when the program
// is gone.
func runsOf(id uint32) (hook.Counts, bool) {
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
	if err != nil {
		return hook.Counts{}, false
	}
	defer prog.Close()
	stats, err := prog.Stats()
	if err != nil {
		return hook.Counts{}, false
	}
	return hook.Counts{Known: true, Runs: stats.RunCount, Time: time.Duration(stats.Runtime)}, true
}
