package main

import (
	"context"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/programs"
)

const attachExample = `  # drops a list of sources, before anything else; stays until detach or a reboot
  dispatcher attach xdp eth0 builtin:droplist --priority 1

  # one of several programs of a file, with a constant set and a map shared
  dispatcher attach xdp eth0 filter.o:xdp_filter --global limit=1000 --map allowed=/sys/fs/bpf/allowed

  # goes on to the next member also after XDP_TX; no packet passes while it is missing
  dispatcher attach xdp eth0 pin:/sys/fs/bpf/balancer --name lb --continue-on pass,tx --on-missing drop

  # counts for as long as the command runs
  dispatcher attach xdp eth0 builtin:count --hold

  # what the chain would be, as JSON
  dispatcher attach xdp eth0 filter.o --dry-run -j`

func (a *app) attachCommand() *cobra.Command {
	var (
		member  memberFlags
		program programFlags
		mode    hook.Mode
		dryRun  bool
	)
	cmd := &cobra.Command{
		Use:   "attach HOOK DEVICE PROGRAM",
		Short: "Put a program on a device, beside those that are there",
		Long: `Put a program on a device, beside those that are there.

It joins the chain that is on the device, or starts one. The new member runs
where its priority puts it, and the next one runs when its verdict is one of
--continue-on. It stays until "detach" or a reboot; with --hold it leaves with
the command.

` + programHelp + strings.Join(programs.Names(), ", "),
		Example:           attachExample,
		Args:              words(1, "HOOK", "DEVICE", "PROGRAM"),
		ValidArgsFunction: completeArgs(1, offerHooks, a.offerDevices, offerPrograms),
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
			o.Mode = mode
			from, release, err := program.source(a, args[2])
			if err != nil {
				return err
			}
			defer release()
			if (o.Persistent || program.pinsIn(a.bpffs)) && !dryRun {
				if err := a.needBPFFS(); err != nil {
					return err
				}
			}
			if dryRun {
				chain, err := dispatcher.Plan(cmd.Context(), t, from, o)
				if err != nil {
					return err
				}
				return a.printChains([]hook.Chain{*chain}, true)
			}
			link, err := dispatcher.Attach(cmd.Context(), t, from, o)
			if err != nil {
				return err
			}
			return a.attached(cmd.Context(), t, link, member.hold)
		},
	}
	member.add(cmd, "the program's")
	flags := cmd.Flags()
	flags.Func("mode", "`MODE` of the device: auto, native (in the driver) or generic; a chain has one for all members", func(text string) (err error) {
		mode, err = hook.ParseMode(text)
		return err
	})
	completeFlag(cmd, "mode", fixed("auto", "native", "generic"))
	program.add(cmd)
	flags.BoolVar(&dryRun, "dry-run", false, "load and check everything, print the chain as it would be, and change nothing")
	return cmd
}

// attached ends a verb that has put a member on a device: it tells what the
// user should know about it, and owns the member until ctx ends if it is held.
func (a *app) attached(ctx context.Context, t dispatcher.Target, link *dispatcher.Link, hold bool) error {
	defer link.Close()
	chain, err := link.Chain(ctx)
	var member *hook.Member
	if err == nil {
		member, err = link.Info(ctx)
	}
	switch {
	case err == nil:
	case hold && ctx.Err() != nil:
		return nil // Ctrl-C came early
	case hold:
		return err
	default:
		a.warn("attached, but it cannot be read back: %v", err)
		return nil
	}
	if a.verbose {
		a.note("attached %q to %s %s: priority %d, number %d of %d, %v mode", member.Name, t.Hook, t.Device,
			member.Priority, 1+position(chain, member), len(chain.Members), chain.Mode)
	}
	a.warnTailCalls(member)
	if !chain.Protected() {
		a.warn("the chain on %s %s is not protected: anyone may replace it; \"%s\" protects it", t.Hook, t.Device, adoptLine(t))
	}
	if hold {
		return a.hold(ctx, t, link, member)
	}
	return nil
}

func (a *app) warnTailCalls(member *hook.Member) {
	if !member.TailCalls {
		return
	}
	a.warn("the program of %q makes tail calls of its own, which count towards the kernel's limit of 33 for a packet", member.Name)
	if a.verbose {
		a.note("a chain takes one tail call for each member; when the limit is reached, the kernel skips the call and the caller runs on")
	}
}

// position returns where in the run order a member is.
func position(chain *hook.Chain, member *hook.Member) int {
	return slices.IndexFunc(chain.Members, func(m hook.Member) bool { return m.SlotID == member.SlotID })
}
