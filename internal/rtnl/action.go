package rtnl

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// An Action is what tc does with a packet that a filter has matched.
type Action struct {
	Kind    string // "gact", "mirred", "bpf"
	Does    string // in words; empty for a kind whose parameters are not read here
	Program uint32 // id, of a bpf action; 0 for classic BPF
	Index   uint32 // the number of the action among those of its kind in the network namespace
}

// actionsAt is the attribute with the actions among the options of each kind of filter
// (linux/pkt_cls.h).
var actionsAt = map[string]uint16{"bpf": 1, "u32": 7, "matchall": 2, "flower": 3, "basic": 3, "fw": 4, "route": 6, "cgroup": 1, "flow": 9}

// Attributes of an action (linux/pkt_cls.h), and of the options of those read here, which
// have the same numbers (linux/tc_act/tc_gact.h, tc_mirred.h, tc_bpf.h).
const (
	actTable   = 1 // TCA_ACT_TAB, in the messages of actions (linux/rtnetlink.h)
	actKind    = 1
	actOptions = 2
	actParms   = 2
	actBPFID   = 9
)

const sizeofTcamsg = 4 // struct tcamsg (linux/rtnetlink.h)

// BPFActions returns the bpf actions of the network namespace, each once: filters can share
// an action, and one may be there without a filter.
func (c *Conn) BPFActions() ([]Action, error) {
	if err := c.widen(); err != nil {
		return nil, err
	}
	ae := netlink.NewAttributeEncoder()
	ae.Nested(actTable, func(nae *netlink.AttributeEncoder) error {
		nae.Nested(1, func(nae *netlink.AttributeEncoder) error {
			nae.String(actKind, "bpf")
			return nil
		})
		return nil
	})
	msgs, err := Request(c.nl, unix.RTM_GETACTION, netlink.Dump, make([]byte, sizeofTcamsg), ae)
	if err != nil {
		return nil, fmt.Errorf("list actions: %w", kernel.Explain(err))
	}
	var all []Action
	for _, m := range msgs {
		of, err := parseActionMessage(m.Data)
		if err != nil {
			return nil, err
		}
		all = append(all, of...)
	}
	return all, nil
}

func parseActionMessage(b []byte) ([]Action, error) {
	if len(b) < sizeofTcamsg {
		return nil, errors.New("rtnetlink: short message")
	}
	ad, err := netlink.NewAttributeDecoder(b[sizeofTcamsg:])
	if err != nil {
		return nil, fmt.Errorf("rtnetlink: %w", err)
	}
	var list actions
	for ad.Next() {
		if ad.Type() == actTable {
			ad.Nested(list.parse)
		}
	}
	if err := ad.Err(); err != nil {
		return nil, fmt.Errorf("rtnetlink: %w", err)
	}
	return list, nil
}

type actions []Action

// parse reads a list of actions, in the order in which they run.
func (list *actions) parse(ad *netlink.AttributeDecoder) error {
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
			*list = append(*list, a)
			return nil
		})
	}
	return nil
}

func (a *Action) parseOptions(ad *netlink.AttributeDecoder) error {
	for ad.Next() {
		switch ad.Type() {
		case actParms:
			parms := ad.Bytes()
			a.Does = does(a.Kind, parms)
			if len(parms) >= 4 { // the beginning of tc_gen
				a.Index = binary.NativeEndian.Uint32(parms)
			}
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
