package target

import (
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
)

// Begins returns what packets on the target's device begin with.
func (o *Opened) Begins() (begins hook.Begins, err error) {
	if o.Hook.OnCgroup() {
		return "", nil
	}
	err = rtnl.In(o.NS, func(conn *rtnl.Conn) error {
		d, err := conn.Device(o.Name)
		if err == nil {
			begins = d.Begins()
		}
		return err
	})
	return begins, err
}
