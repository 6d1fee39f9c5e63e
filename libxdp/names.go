package libxdp

import (
	"fmt"
	"regexp"
	"strconv"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// mainFunction is the name of every libxdp dispatcher.
const mainFunction = "xdp_dispatcher"

// stubName returns the function of the dispatcher that the component in slot n
// of total replaces. A single component replaces the whole dispatcher.
func stubName(n, total int) string {
	if total == 1 {
		return mainFunction
	}
	return stubFunction(n)
}

func stubFunction(n int) string { return fmt.Sprintf("prog%d", n) }

// folderName returns the folder name for a dispatcher's pins.
func folderName(ifindex int, prog uint32) string {
	return fmt.Sprintf("dispatch-%d-%d", ifindex, prog)
}

var folderPattern = regexp.MustCompile(`^dispatch-([1-9][0-9]*)-([1-9][0-9]*)$`)

// parseFolder is the inverse of folderName. Other names are not folders of
// pins.
func parseFolder(name string) (ifindex int, prog uint32, ok bool) {
	m := folderPattern.FindStringSubmatch(name)
	if m == nil {
		return 0, 0, false
	}
	i, err1 := strconv.ParseInt(m[1], 10, 32)
	p, err2 := strconv.ParseUint(m[2], 10, 32)
	if err1 != nil || err2 != nil {
		return 0, 0, false
	}
	return int(i), uint32(p), true
}

// linkPin and progPin return the pin names of the component in slot n. A single
// component is in slot 0.
func linkPin(n int) string { return stubFunction(n) + "-link" }
func progPin(n int) string { return stubFunction(n) + "-prog" }

// functionName returns the whole name of a program. cilium/ebpf reads it from
// the BTF, because the kernel cuts names after 15 bytes.
func functionName(prog *ebpf.Program) (string, error) {
	info, err := prog.Info()
	if err != nil {
		return "", kernel.Errno("program", err)
	}
	return info.Name, nil
}
