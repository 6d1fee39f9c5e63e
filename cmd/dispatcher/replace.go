package main

import (
	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
)

func (a *app) replaceCommand() *cobra.Command {
	var program programFlags
	cmd := &cobra.Command{
		Use:   "replace HOOK TARGET MEMBER PROGRAM",
		Short: "Replace the program of a member",
		Long: `Replace the program of a member. Each packet meets the old program or the new
one, and no other member notices. Name, priority and all settings stay.

A program from a file, or a built-in one, keeps the maps of the old program that
have the same names, so counters and lists stay. Constants come from the new
file. --new-maps starts with empty maps.

` + programHelp + builtinHelp(),
		Example: `  dispatcher replace xdp eth0 filter filter-v2.o

  # forget all counters
  dispatcher replace xdp eth0 filter filter-v2.o --new-maps

  dispatcher replace cgroup/connect4 /sys/fs/cgroup/web.slice proxy proxy-v2.o`,
		Args:              words(1, "HOOK", "TARGET", "MEMBER", "PROGRAM"),
		ValidArgsFunction: completeArgs(1, offerHooks, a.offerTargets, a.offerMembers, offerPrograms),
		RunE: a.withTarget(func(cmd *cobra.Command, t dispatcher.Target, args []string) error {
			from, err := program.source(a, t.Hook, args[1])
			if err != nil {
				return err
			}
			defer from.release()
			if err := a.needBPFFS(program.pinsIn(a.bpffs)); err != nil {
				return err
			}
			link, err := dispatcher.Open(cmd.Context(), t, hook.Ref(args[0]), a.readOptions())
			if err != nil {
				return err
			}
			defer link.Close()
			before, _ := link.Info(cmd.Context())
			if err := link.Update(cmd.Context(), from.Source); err != nil {
				return err
			}
			if info, err := link.Info(cmd.Context()); err == nil {
				if before != nil && before.Sealed && !info.Sealed {
					a.note("%q was sealed, and now runs from its slot; \"seal --dry-run\" tells why", info.Name)
				}
				if a.verbose {
					a.note("%q on %s %s now has program %s, id %d", info.Name, t.Hook, t.Name(), info.Program.Name, info.Program.ID)
				}
				a.warnTailCalls(t, info)
			}
			if chain, err := link.Chain(cmd.Context()); err == nil {
				a.warnHeader(chain, from)
			}
			return nil
		}),
	}
	program.add(cmd)
	cmd.Flags().BoolVar(&program.newMaps, "new-maps", false, "give the new program new maps")
	return cmd
}
