package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher"
)

func (a *app) adoptCommand() *cobra.Command {
	var (
		member memberFlags
		noGap  bool
	)
	cmd := &cobra.Command{
		Use:   "adopt HOOK DEVICE",
		Short: "Make the program that others attached without a link a member",
		Long: `Make the program that is attached without a link ("ip link set xdp", older
programs) the first member of a chain. It is the same program with the same
maps, and others can then join it.

The kernel wants the device to be empty before a link takes it: the packets of
that moment pass unfiltered. With --no-gap none does, but the chain is then not
protected: it has no link, and anyone may replace it. A second "adopt", without
--no-gap, protects it later.`,
		Example: `  dispatcher adopt xdp eth0 --name filter
  dispatcher adopt xdp eth0 --no-gap`,
		Args:              words(1, "HOOK", "DEVICE"),
		ValidArgsFunction: completeArgs(1, offerHooks, a.offerDevices),
		RunE: func(cmd *cobra.Command, args []string) error {
			args = withoutDev(args, 1)
			t, err := a.target(args[0], args[1])
			if err != nil {
				return err
			}
			o, err := member.options(a, cmd.Flags())
			if err != nil {
				return err
			}
			if o.Persistent {
				if err := a.needBPFFS(); err != nil {
					return err
				}
			}
			if !noGap {
				a.warnOfGap(cmd.Context(), t)
			}
			link, err := dispatcher.Adopt(cmd.Context(), t, dispatcher.AdoptOptions{Options: o, NoGap: noGap})
			if err != nil {
				return err
			}
			return a.attached(cmd.Context(), t, link, member.hold)
		},
	}
	member.add(cmd, "the program's")
	cmd.Flags().BoolVar(&noGap, "no-gap", false, "let no packet pass unfiltered; the chain is then not protected")
	return cmd
}

// adoptLine is the command to adopt what is on the target.
func adoptLine(t dispatcher.Target) string {
	line := fmt.Sprintf("adopt %s %s", t.Hook, t.Device)
	if t.NetNS != "" {
		line = fmt.Sprintf("-n %s %s", t.NetNS, line)
	}
	return "dispatcher " + line
}

// warnOfGap says what the adoption costs before it is done. When there is
// nothing to adopt, the error to come says so.
func (a *app) warnOfGap(ctx context.Context, t dispatcher.Target) {
	chain, err := dispatcher.Read(ctx, t, a.readOptions())
	if err != nil || chain.Protected() || len(chain.Members) == 0 {
		return
	}
	a.warn("packets on %s pass unfiltered for the short moment in which a link takes the device; --no-gap avoids that, and does not protect the chain", t.Device)
}
