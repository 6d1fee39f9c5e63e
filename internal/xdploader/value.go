package xdploader

import (
	"math"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
)

// modeNames are the names of the modes in the options, and modes what they mean.
var (
	modeNames = []string{"native", "skb", "hw", "unspecified"}
	modes     = []hook.Mode{hook.ModeNative, hook.ModeGeneric, hook.ModeOffload, hook.ModeAuto}
)

// modeOf returns the name of a mode in the table of "status".
func modeOf(m hook.Mode) string { return modeNames[slices.Index(modes, m)] }

// actionNames are the verdicts' names by number.
var actionNames = [hook.Verdicts]string{"XDP_ABORTED", "XDP_DROP", "XDP_PASS", "XDP_TX", "XDP_REDIRECT"}

// parseActions reads names that are separated by commas. An empty string and a
// comma at the end are valid. The set is 0 without names.
func parseActions(s string) (set hook.VerdictSet, err error) {
	for s != "" {
		name, rest, _ := strings.Cut(s, ",")
		i := slices.Index(actionNames[:], name)
		if i < 0 {
			return 0, unix.EINVAL
		}
		set |= hook.SetOf(hook.Verdict(i))
		s = rest
	}
	return set, nil
}

// actions returns the names of a set.
func actions(set hook.VerdictSet) string {
	var names []string
	for _, v := range set.List() {
		names = append(names, actionNames[v])
	}
	return strings.Join(names, ",")
}

// parseU32 reads a decimal number like strtoul(3), which accepts leading
// blanks, a sign, any text behind the number, or no digits at all.
func parseU32(s string) (uint32, error) {
	s = strings.TrimLeft(s, " \t\n\v\f\r")
	negative := strings.HasPrefix(s, "-")
	if negative || strings.HasPrefix(s, "+") {
		s = s[1:]
	}
	digits := s[:len(s)-len(strings.TrimLeft(s, "0123456789"))]
	n, err := strconv.ParseUint("0"+digits, 10, 64)
	if err != nil {
		return 0, unix.EINVAL
	}
	if negative {
		n = -n
	}
	if n > math.MaxUint32 {
		return 0, unix.EINVAL
	}
	return uint32(n), nil
}

// versionLine has the tool's version where xdp-loader has it, and the BPF
// library used here where xdp-loader has libbpf.
func versionLine() string {
	const library = "github.com/cilium/ebpf"
	version := "unknown"
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, m := range info.Deps {
			if m.Path == library {
				version = strings.TrimPrefix(m.Version, "v")
			}
		}
	}
	return "xdp-loader version " + Version + " using cilium/ebpf version " + version + " (libdispatcher)"
}
