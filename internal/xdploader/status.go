package xdploader

import (
	"context"
	"fmt"
	"strings"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
)

func (t *tool) status(ctx context.Context, v *values) error {
	fmt.Fprintf(t.stdout, "CURRENT XDP PROGRAM STATUS:\n\n%-16s %-5s %-17s Mode     ID   %-17s %s\n%s\n",
		"Interface", "Prio", "Program name", "Tag", "Chain actions", strings.Repeat("-", 86))
	if v.index != 0 {
		if err := t.statusOfDevice(ctx, v.device, v.index); err != nil {
			return err
		}
		fmt.Fprintln(t.stdout)
		return nil
	}
	defer fmt.Fprintln(t.stdout)
	var devices []rtnl.Device
	err := dial(func(conn *rtnl.Conn) (err error) { devices, err = conn.Devices(); return err })
	if err != nil {
		t.warn("Couldn't get list of interfaces: %s", words(err))
		return err
	}
	for _, d := range devices {
		if err := t.statusOfDevice(ctx, d.Name, d.Index); err != nil {
			return err
		}
	}
	return nil
}

func (t *tool) statusOfDevice(ctx context.Context, name string, index int) error {
	o, err := t.readOccupant(ctx, index)
	if err != nil {
		t.warn("Error getting XDP status for interface %s: %s", name, words(err))
		t.detail(err)
		return err
	}
	defer o.close()
	if o.free() {
		fmt.Fprintf(t.stdout, "%-22s <No XDP program loaded!>\n", name)
		return nil
	}
	if o.offload != nil {
		t.row(name, describe(o.offload), modeOf(hook.ModeOffload))
	}
	if o.prog == nil {
		return nil
	}
	t.row(name, o.program, modeOf(o.mode))
	if o.chain != nil {
		for _, m := range o.chain.Members {
			m.Program.Name = m.Name
			t.memberRow(m.Program, m.Priority, m.ContinueOn)
		}
	}
	// The members of an owned chain run in the same way.
	if o.owned != nil {
		for _, m := range o.owned.Members {
			t.memberRow(m.Program, m.Priority, m.ContinueOn)
		}
	}
	return nil
}

func (t *tool) row(device string, p hook.Program, mode string) {
	fmt.Fprintf(t.stdout, "%-16s %-5s %-17s %-8s %-4d %-17s\n", device, "", p.Name, mode, p.ID, p.Tag)
}

func (t *tool) memberRow(p hook.Program, priority int, continueOn hook.VerdictSet) {
	if p.ID == 0 {
		return // nothing runs there
	}
	fmt.Fprintf(t.stdout, "%-16s %-5d  %-16s %-8s %-4d %-17s %s\n", " =>", int32(priority), p.Name, "", p.ID, p.Tag, actions(continueOn))
}
