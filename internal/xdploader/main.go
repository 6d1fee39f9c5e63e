package xdploader

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/procfs"
)

// Version is the version of xdp-loader that this package behaves like.
const Version = "1.6.3"

// A command is selected by the first argument.
type command struct {
	name    string
	summary string // in the list of all commands
	doc     string // in the command's own help
	options []option
	run     func(*tool, context.Context, *values) error
}

// commands are in the order in which abbreviations are looked up.
var commands = []command{
	{"load", "load an XDP program on an interface", "Load an XDP program on an interface", loadOptions, (*tool).load},
	{"unload", "unload an XDP program from an interface", "Unload an XDP program from an interface", unloadOptions, (*tool).unload},
	{"clean", "clean up detached program links in XDP bpffs directory", "Clean up detached program links in XDP bpffs directory", cleanOptions, (*tool).clean},
	{"status", "show current XDP program status", "Show XDP program status", statusOptions, (*tool).status},
	{"features", "show XDP features supported by the NIC", "Show NIC XDP features", featuresOptions, (*tool).features},
	{"help", "show this help message", "", nil, nil},
}

// A tool is one run of xdp-loader.
type tool struct {
	logger
	name   string // the name that the tool was called by
	stdout io.Writer
	getenv func(string) string
	advice string // what to do instead; see noteOwner
}

// Main runs xdp-loader in the network namespace of the calling thread and
// returns the exit code. args[0] is the tool's name for its usage lines; getenv
// is os.Getenv.
func Main(ctx context.Context, args []string, stdout, stderr io.Writer, getenv func(string) string) int {
	t := &tool{logger: logger{w: stderr, level: levelInfo}, name: filepath.Base(args[0]), stdout: stdout, getenv: getenv}
	if len(args) == 1 {
		return t.help()
	}
	return t.dispatch(ctx, args[1:])
}

// Exit codes. A failed command exits with the negative error number, of which
// the system keeps the low byte.
const (
	exitOK      = 0
	exitFailure = 1
	exitHelp    = -1 & 0xff
)

func (t *tool) dispatch(ctx context.Context, args []string) int {
	c, matches := lookup(args[0])
	switch {
	case matches == 0:
		t.warn("Command '%s' is unknown, try '%s help'.", args[0], t.name)
		return exitFailure
	case c == nil:
		t.warn("Command '%s' is ambiguous, try '%s help'.", args[0], t.name)
		return exitFailure
	case c.run == nil:
		return t.help()
	}
	v, ok := t.parse(c, args)
	if !ok || !t.prepare() {
		return exitFailure
	}
	err := c.run(t, ctx, v)
	if err != nil && t.advice != "" {
		t.note("%s", t.advice)
	}
	return exitCode(err)
}

// lookup finds a command by its name or the beginning of its name. It returns
// nil when several names begin so.
func lookup(name string) (*command, int) {
	var found *command
	matches := 0
	for i := range commands {
		c := &commands[i]
		if c.name == name {
			return c, 1
		}
		if strings.HasPrefix(c.name, name) {
			found = c
			matches++
		}
	}
	if matches > 1 {
		found = nil
	}
	return found, matches
}

func (t *tool) help() int {
	fmt.Fprintf(t.w, "Usage: %s COMMAND [options]\n\nCOMMAND can be one of:\n", t.name)
	for _, name := range []string{"load", "unload", "status", "clean", "features", "help"} {
		c, _ := lookup(name)
		fmt.Fprintf(t.w, "       %-11s - %s\n", c.name, c.summary)
	}
	fmt.Fprintf(t.w, "\nUse '%s COMMAND --help' to see options for each command\n", t.name)
	return exitHelp
}

// prepare makes the checks that every command makes.
func (t *tool) prepare() bool {
	if !anyBPFFS() {
		t.debug("Could not find BPF working dir - bpffs not mounted?")
	}
	if os.Geteuid() != 0 {
		t.warn("This program must be run as root.")
		return false
	}
	t.atLeastMemlock(1 << 20)
	return true
}

// anyBPFFS tells whether a bpffs is mounted anywhere.
func anyBPFFS() bool {
	if kernel.IsBPFFS(kernel.DefaultBPFFS) || kernel.IsBPFFS("/bpf") {
		return true
	}
	mounts, _ := procfs.Mounts("/proc/self/mountinfo")
	return slices.ContainsFunc(mounts, func(m procfs.Mount) bool { return m.Type == "bpf" })
}

// atLeastMemlock raises RLIMIT_MEMLOCK, which bounds the BPF memory of kernels
// before 5.11, to a minimum. It ignores a failure.
func (t *tool) atLeastMemlock(minimum uint64) {
	limit, ok := t.memlock()
	switch {
	case !ok:
	case limit.Cur >= minimum:
		t.debug("Current rlimit %d already >= minimum %d", limit.Cur, minimum)
	default:
		t.debug("Setting rlimit to minimum %d", minimum)
		t.setMemlock(unix.Rlimit{Cur: minimum, Max: max(minimum, limit.Max)})
	}
}

// liftMemlock removes the limit. It tells whether a retry makes sense.
func (t *tool) liftMemlock() bool {
	t.debug("Permission denied when loading eBPF object; raising rlimit and retrying")
	if _, ok := t.memlock(); !ok {
		return false
	}
	return t.setMemlock(unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY})
}

// memlock returns the limit, or false when there is none.
func (t *tool) memlock() (limit unix.Rlimit, ok bool) {
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit); err != nil {
		t.warn("Couldn't get current rlimit")
		return limit, false
	}
	if limit.Cur == unix.RLIM_INFINITY || limit.Cur == 0 {
		t.debug("Current rlimit is infinity or 0. Not raising")
		return limit, false
	}
	return limit, true
}

func (t *tool) setMemlock(limit unix.Rlimit) bool {
	if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &limit); err != nil {
		t.warn("Couldn't raise rlimit: %s", words(err))
		return false
	}
	return true
}
