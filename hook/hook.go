package hook

import (
	"fmt"
	"slices"
	"strings"
)

// A Hook is a place in the kernel where BPF programs run, named as in ELF
// section names.
type Hook string

// XDP runs in the driver's receive path (native mode) or just after it
// (generic mode), before the network stack sees the packet.
const XDP Hook = "xdp"

// Hooks lists every hook that this version knows.
func Hooks() []Hook { return []Hook{XDP} }

// Parse returns the hook of that name.
func Parse(s string) (Hook, error) {
	if h := Hook(s); slices.Contains(Hooks(), h) {
		return h, nil
	}
	known := make([]string, 0, len(Hooks()))
	for _, h := range Hooks() {
		known = append(known, string(h))
	}
	return "", fmt.Errorf("unknown hook %q (known: %s)", s, strings.Join(known, ", "))
}

// A Mode says in which mode an XDP program is attached to a device.
type Mode uint8

const (
	// ModeAuto lets the kernel choose: native where the driver has XDP,
	// generic elsewhere. On joining a chain it means the chain's mode.
	ModeAuto Mode = iota
	// ModeNative runs in the driver (XDP_FLAGS_DRV_MODE).
	ModeNative
	// ModeGeneric runs on socket buffers (XDP_FLAGS_SKB_MODE).
	ModeGeneric
	// ModeOffload runs on the card (XDP_FLAGS_HW_MODE). It is only ever
	// read: a dispatcher cannot be offloaded.
	ModeOffload
)

var modeNames = []string{"auto", "native", "generic", "offload"}

func (m Mode) String() string {
	if int(m) < len(modeNames) {
		return modeNames[m]
	}
	return fmt.Sprintf("Mode(%d)", uint8(m))
}

// ParseMode returns the mode of that name. Offload cannot be asked for.
func ParseMode(s string) (Mode, error) {
	switch s {
	case "auto", "":
		return ModeAuto, nil
	case "native", "drv":
		return ModeNative, nil
	case "generic", "skb":
		return ModeGeneric, nil
	}
	return 0, fmt.Errorf("unknown mode %q (known: auto, native, generic)", s)
}
