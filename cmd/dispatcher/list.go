package main

import (
	"context"
	"errors"
	"slices"

	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
)

func (a *app) listCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "list [HOOK [DEVICE]]",
		Aliases: []string{"ls", "show", "status"},
		Short:   "Show what is attached, in the order in which it runs",
		Long: `Show what is attached, in the order in which it runs: on all devices of the
network namespace, or on one.

Programs that others attached are shown too: "legacy" ones without a link, that
anyone may replace and "adopt" makes members, and "foreign" ones, held by a link
of another tool. A member is "empty" when its owner is gone; what happens to
packets then is in the column MISSING.`,
		Example: `  dispatcher list
  dispatcher list xdp eth0 -o wide
  dispatcher -n blue list -j`,
		Args:              words(1, "[HOOK]", "[DEVICE]"),
		ValidArgsFunction: completeArgs(1, offerHooks, a.offerDevices),
		RunE: func(cmd *cobra.Command, args []string) error {
			chains, err := a.chains(cmd.Context(), withoutDev(args, 1))
			if err != nil && len(chains) == 0 {
				return err
			}
			// What could be read is shown, whatever is wrong with the rest.
			return errors.Join(a.printChains(chains, false), err)
		},
	}
}

// chains reads what is on the hooks that args name.
func (a *app) chains(ctx context.Context, args []string) ([]hook.Chain, error) {
	if len(args) == 2 {
		t, err := a.target(args[0], args[1])
		if err != nil {
			return nil, err
		}
		c, err := dispatcher.Read(ctx, t, a.readOptions())
		if err != nil {
			return nil, err
		}
		return []hook.Chain{*c}, nil
	}
	var wanted hook.Hook
	if len(args) == 1 {
		var err error
		if wanted, err = parseHook(args[0]); err != nil {
			return nil, err
		}
	}
	all, err := dispatcher.List(ctx, dispatcher.ListOptions{NetNS: a.netns, BPFFS: a.bpffs})
	if wanted == "" {
		return all, err
	}
	return slices.DeleteFunc(all, func(c hook.Chain) bool { return c.Hook != wanted }), err
}
