package measure

import (
	"fmt"
	"io"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// runStats are the kernel's run statistics (BPF_ENABLE_STATS, Linux 5.8). The
// kernel counts the runs of all programs while any process has them enabled. The
// descriptor, and with it this process's request, ends with the process.
type runStats struct{ enabled io.Closer }

func (r *runStats) enable() error {
	if r.enabled != nil {
		return nil
	}
	closer, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	if err != nil {
		return fmt.Errorf("run statistics: %w", kernel.Errno("enable", err))
	}
	r.enabled = closer
	return nil
}

func (r *runStats) close() error {
	if r.enabled == nil {
		return nil
	}
	return r.enabled.Close()
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
