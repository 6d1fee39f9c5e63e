package filters

import (
	"fmt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// view describes the side for users.
func (sd *side) view() *hook.Chain {
	c := &hook.Chain{
		Hook: sd.opened.Hook, Target: sd.dev.Name, Ifindex: sd.dev.Index, Begins: sd.dev.Begins(), NetNS: sd.opened.NS.ID(),
		Pins: []string{}, Members: []hook.Member{},
	}
	for _, e := range sd.list {
		c.Members = append(c.Members, e.view())
	}
	for _, f := range sd.others {
		if f.Kind == "u32" && f.Handle&0xfff == 0 {
			continue // one of its hash tables (TC_U32_NODE, linux/pkt_cls.h)
		}
		c.Others = append(c.Others, hook.OtherFilter{Kind: f.Kind, Filter: f.Filter, Block: f.Block, Actions: actions(f)})
	}
	return c
}

// actions describes the actions of a filter.
func actions(f rtnl.Filter) (list []hook.Action) {
	for _, a := range f.Actions {
		list = append(list, hook.Action{Kind: a.Kind, Does: a.Does, Program: target.ProgramOf(a.Program)})
	}
	return list
}

func (e entry) view() hook.Member {
	m := hook.Member{Name: e.Entry.Name, Kind: hook.KindLegacy, State: hook.StateRunning}
	m.Program, m.TailCalls = target.ProgramAt(e.Entry.Program)
	if e.ours() {
		m.Kind, m.Priority, m.Owner, m.Persistent = hook.KindMember, e.Priority, e.owner, true
	} else if m.Name = e.Filter.Name; m.Name == "" {
		m.Name = m.Program.Name
	}
	m.Filter, m.Actions = new(e.Filter.Filter), actions(e.Filter)
	m.Detail = fmt.Sprintf("pref %d handle %#x", e.Pref, e.Handle)
	if e.Chain != 0 { // it runs only for packets that another filter sends there
		m.Detail = fmt.Sprintf("chain %d %s", e.Chain, m.Detail)
	}
	if !e.DirectAction {
		m.Detail += ", no direct action"
	}
	if e.Block != 0 {
		m.Detail += fmt.Sprintf(", in shared block %d", e.Block)
	}
	if len(e.Actions) > 0 {
		m.Detail += ", " + hook.DescribeActions(m.Actions)
	}
	return m
}
