package main

import (
	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
)

type jsonSealings struct {
	Version int            `json:"version"`
	DryRun  bool           `json:"dry_run,omitempty"`
	Members []hook.Sealing `json:"members"`
}

func (a *app) sealCommand() *cobra.Command {
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "seal xdp TARGET",
		Short: "Link the members of a chain into one program, which is faster",
		Long: `Link the members of the chain on a device into its dispatcher, so that packets
skip the members' slots. The members keep their maps. The dispatcher is replaced
in one step: each packet meets the old chain or the new one.

A member can be sealed when it is pinned and its object code is available: it
was attached or replaced from a file or as builtin:NAME. The other members stay
in their slots, and work as before; the reason is on stderr, and in the JSON.

Members of a sealed chain can join, leave, be replaced and set as in any other.
A new member has a slot, until "seal" is run again. "list" shows which members
are sealed.`,
		Example: `  dispatcher seal xdp eth0
  dispatcher seal xdp eth0 --dry-run
  dispatcher unseal xdp eth0`,
		Args:              words(1, "HOOK", "TARGET"),
		ValidArgsFunction: completeArgs(1, offerHooks, a.offerTargets),
		RunE: a.withTarget(func(cmd *cobra.Command, t dispatcher.Target, _ []string) error {
			report, err := dispatcher.Seal(cmd.Context(), t, dispatcher.SealOptions{DryRun: dryRun, BPFFS: a.bpffs})
			if err != nil {
				return err
			}
			return a.printSealings(t, report, dryRun)
		}),
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "only show which members would be sealed, and why the others would not")
	return cmd
}

// printSealings reports all members if that was asked for, and otherwise only
// members that are not sealed.
func (a *app) printSealings(t dispatcher.Target, report []hook.Sealing, dryRun bool) error {
	sealed := 0
	j := jsonSealings{Version: schema, DryRun: dryRun, Members: []hook.Sealing{}}
	rows := [][]cell{heads("MEMBER", "SEALED", "REASON")}
	for _, r := range report {
		if r.Sealed {
			sealed++
		} else if !dryRun {
			a.note("%q stays in its slot: %s", r.Member, r.Reason)
		}
		r.Reason = oneLine(r.Reason)
		j.Members = append(j.Members, r)
		rows = append(rows, []cell{{text: r.Member}, yes(r.Sealed), {text: orDash(r.Reason)}})
	}
	switch {
	case a.format == formatJSON:
		return a.printJSON(j)
	case dryRun:
		return a.printTable(rows)
	case a.verbose:
		a.note("%d of the %d members on %s %s are linked into the dispatcher", sealed, len(report), t.Hook, t.Name())
	}
	return nil
}

func (a *app) unsealCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "unseal xdp TARGET",
		Short: "Undo \"seal\": call each member through its slot again",
		Long: `Undo "seal": replace the dispatcher, in one step, by one that calls each member
through its slot. A chain that is not sealed stays as it is.`,
		Example:           `  dispatcher unseal xdp eth0`,
		Args:              words(1, "HOOK", "TARGET"),
		ValidArgsFunction: completeArgs(1, offerHooks, a.offerTargets),
		RunE: a.withTarget(func(cmd *cobra.Command, t dispatcher.Target, _ []string) error {
			return dispatcher.Unseal(cmd.Context(), t, dispatcher.ReadOptions{BPFFS: a.bpffs})
		}),
	}
}
