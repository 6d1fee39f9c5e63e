package xdploader

import (
	"context"
	"errors"
	"fmt"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/internal/rtnl"
)

// featureNames are the names of the bits that a driver reports, from the lowest
// bit on (enum netdev_xdp_act, linux/netdev.h).
var featureNames = []string{
	"NETDEV_XDP_ACT_BASIC",
	"NETDEV_XDP_ACT_REDIRECT",
	"NETDEV_XDP_ACT_NDO_XMIT",
	"NETDEV_XDP_ACT_XSK_ZEROCOPY",
	"NETDEV_XDP_ACT_HW_OFFLOAD",
	"NETDEV_XDP_ACT_RX_SG",
	"NETDEV_XDP_ACT_NDO_XMIT_SG",
}

func (t *tool) features(_ context.Context, v *values) error {
	bits, err := rtnl.XDPFeatures(v.index)
	if err != nil && !errors.Is(err, ebpf.ErrNotSupported) { // without this interface of the kernel there are no features
		t.warn("Couldn't query XDP features (%d).", -number(err))
		return err
	}
	const column = 23 // shorter names get another tab
	for i, name := range featureNames {
		tabs, answer := "\t", "no"
		if len(name) < column {
			tabs = "\t\t"
		}
		if bits&(1<<i) != 0 {
			answer = "yes"
		}
		fmt.Fprintf(t.stdout, "%s:%s%s\n", name, tabs, answer)
	}
	if unknown := bits >> len(featureNames) << len(featureNames); unknown != 0 {
		t.debug("unknown reported xdp features: %#x", unknown)
	}
	return nil
}
