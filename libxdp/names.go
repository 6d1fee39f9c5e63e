package libxdp

import (
	"fmt"
	"regexp"
	"strconv"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// mainFunction is the name of every dispatcher of libxdp's.
const mainFunction = "xdp_dispatcher"

// stubName is the function of the dispatcher that the component in slot n of
// total replaces. A component on its own replaces the whole dispatcher.
func stubName(n, total int) string {
	if total == 1 {
		return mainFunction
	}
	return stubFunction(n)
}

func stubFunction(n int) string { return fmt.Sprintf("prog%d", n) }

// folderName is the folder of the pins of a dispatcher.
func folderName(ifindex int, prog uint32) string {
	return fmt.Sprintf("dispatch-%d-%d", ifindex, prog)
}

var folderPattern = regexp.MustCompile(`^dispatch-([1-9][0-9]*)-([1-9][0-9]*)$`)

// parseFolder is the inverse of folderName. Names that folderName does not give
// are not folders of pins.
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

// linkPin and progPin are the pins of the component in slot n; also of one on
// its own, which is in slot 0.
func linkPin(n int) string { return stubFunction(n) + "-link" }
func progPin(n int) string { return stubFunction(n) + "-prog" }

// functionName returns the whole name of a program, which the library has from
// the BTF: the kernel itself cuts it after 15 bytes.
func functionName(prog *ebpf.Program) (string, error) {
	info, err := prog.Info()
	if err != nil {
		return "", kernel.Errno("program", err)
	}
	return info.Name, nil
}
