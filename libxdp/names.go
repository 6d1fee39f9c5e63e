package libxdp

import (
	"fmt"

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

// parseFolder is the inverse of folderName. Other names are not folders of
// pins.
func parseFolder(name string) (ifindex int, prog uint32, ok bool) {
	var index int32
	_, err := fmt.Sscanf(name, "dispatch-%d-%d", &index, &prog)
	if err != nil || index <= 0 || prog == 0 || name != folderName(int(index), prog) {
		return 0, 0, false
	}
	return int(index), prog, true
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
