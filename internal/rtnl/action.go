package rtnl

import (
	"encoding/binary"
	"fmt"

	"github.com/mdlayher/netlink"
)

// An Action is what tc does with a packet that a filter has matched.
type Action struct {
	Kind    string // "gact", "mirred", "bpf"
	Does    string // in words; empty for a kind whose parameters are not read here
	Program uint32 // id, of a bpf action; 0 for classic BPF
}

// actionsAt is the attribute with the actions among the options of each kind of filter
// (linux/pkt_cls.h).
var actionsAt = map[string]uint16{"bpf": 1, "u32": 7, "matchall": 2, "flower": 3, "basic": 3, "fw": 4, "route": 6, "cgroup": 1, "flow": 9}

// Attributes of an action (linux/pkt_cls.h), and of the options of those read here, which
// have the same numbers (linux/tc_act/tc_gact.h, tc_mirred.h, tc_bpf.h).
const (
	actKind    = 1
	actOptions = 2
	actParms   = 2
	actBPFID   = 9
)

// parseActions reads a list of actions, in the order in which they run.
func (f *Filter) parseActions(ad *netlink.AttributeDecoder) error {
	for ad.Next() { // the type is the number in the list
		ad.Nested(func(ad *netlink.AttributeDecoder) error {
			var a Action
			for ad.Next() {
				switch ad.Type() {
				case actKind:
					a.Kind = ad.String()
				case actOptions:
					switch a.Kind { // other kinds number their options differently
					case "gact", "mirred", "bpf":
						ad.Nested(a.parseOptions)
					}
				}
			}
			f.Actions = append(f.Actions, a)
			return nil
		})
	}
	return nil
}

func (a *Action) parseOptions(ad *netlink.AttributeDecoder) error {
	for ad.Next() {
		switch ad.Type() {
		case actParms:
			a.Does = does(a.Kind, ad.Bytes())
		case actBPFID:
			a.Program = ad.Uint32()
		}
	}
	return nil
}

// controls are TC_ACT_* (linux/pkt_cls.h).
var controls = []string{"pass", "reclassify", "drop", "pipe", "stolen", "queued", "repeat", "redirect", "trap"}

// does says what an action does by its parameters, which begin with tc_gen (linux/pkt_cls.h).
func does(kind string, parms []byte) string {
	const control, eaction, ifindex = 8, 20, 24 // in struct tc_mirred
	if kind == "mirred" && len(parms) >= ifindex+4 {
		where := []string{"egress redirect", "egress mirror", "ingress redirect", "ingress mirror"}
		if i := binary.NativeEndian.Uint32(parms[eaction:]) - 1; i < uint32(len(where)) {
			return fmt.Sprintf("%s to ifindex %d", where[i], binary.NativeEndian.Uint32(parms[ifindex:]))
		}
	}
	switch {
	case kind == "bpf" || len(parms) < control+4:
		return "" // the program decides
	}
	switch n := binary.NativeEndian.Uint32(parms[control:]); {
	case n < uint32(len(controls)):
		return controls[n]
	case n == 1<<32-1:
		return "continue" // TC_ACT_UNSPEC
	case n>>28 == 2:
		return fmt.Sprintf("goto chain %d", n&(1<<28-1))
	}
	return ""
}
