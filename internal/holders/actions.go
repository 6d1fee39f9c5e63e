package holders

import (
	"fmt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
)

// addActions adds the references of tc's actions, in all network namespaces that can be
// found, once. It returns false if they were there already. What cannot be read is left out.
func (v *View) addActions() bool {
	if v.actions {
		return false
	}
	v.actions = true
	all, err := kernel.NetNamespaces()
	v.ok(err)
	for _, ns := range all {
		_ = rtnl.In(ns, func(c *rtnl.Conn) error {
			actions, err := c.BPFActions()
			for _, a := range actions {
				if a.Program != 0 {
					v.Add(refTo(hook.HolderProgram, a.Program), hook.HolderObject{How: nameAction(a, ns), References: 1})
				}
			}
			return err
		})
		ns.Close()
	}
	return true
}

func nameAction(a rtnl.Action, ns *kernel.NetNS) string {
	name := fmt.Sprintf("action %s of tc, index %d", a.Kind, a.Index)
	if in := ns.ID().Name; in != "" {
		name += ", in network namespace " + in
	}
	return name
}
