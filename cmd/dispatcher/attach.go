package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
)

const attachExample = `  # drops a list of sources, before anything else; stays until detach or a reboot
  dispatcher attach xdp eth0 builtin:droplist --priority 1

  # one of several programs of a file, with a constant set and a map shared
  dispatcher attach xdp eth0 filter.o:xdp_filter --global limit=1000 --map allowed=/sys/fs/bpf/allowed

  # the next member also runs after XDP_TX; no packet passes while this one is missing
  dispatcher attach xdp eth0 pin:/sys/fs/bpf/balancer --name lb --continue-on pass,tx --on-missing drop

  # counts packets that leave a device, before the programs of all other tools
  dispatcher attach tcx/egress eth0 builtin:count --first

  # behind the program of another tool, which "list" shows with link 12
  dispatcher attach tcx/ingress eth0 filter.o --after link:12

  # sends connections to port 80 to port 8080, for all services of a slice
  dispatcher attach cgroup/connect4 /sys/fs/cgroup/web.slice builtin:redirect --global from_port=80 --global to_port=8080

  # shares the device with xdp-loader and other programs that use libxdp
  dispatcher attach xdp eth0 filter.o --style libxdp

  # counts for as long as the command runs
  dispatcher attach xdp eth0 builtin:count --hold

  # prints the resulting chain as JSON, and changes nothing
  dispatcher attach xdp eth0 filter.o --dry-run -j`

func (a *app) attachCommand() *cobra.Command {
	var (
		member  memberFlags
		place   positionFlags
		program programFlags
		mode    hook.Mode
		style   styleFlags
		dryRun  bool
		over    bool
	)
	cmd := &cobra.Command{
		Use:   "attach HOOK TARGET PROGRAM",
		Short: "Attach a program to a hook, beside the programs that are there",
		Long: `Attach a program to a hook of a device or a cgroup, beside the programs that are
there.

Members run in the order of their priorities. Programs of other tools stay where
they are; --before, --after, --first and --last ask for a position among them.
The member stays until "detach" or a reboot, in a container only if the bpffs is
the machine's; with --hold it leaves when the command ends.

On xdp the program joins the chain on the device, or starts one. The next member
runs when the verdict is one of --continue-on. While a member's slot is empty,
because its owner died, packets skip it; with --on-missing drop or aborted the
empty slot is a closed door instead: it drops all packets that reach it, until
the member is attached again or detached.

A program joins a chain of libxdp (xdp-loader) in libxdp's way, and --style
libxdp starts such a chain on a free device, so that C programs can join it. It
is shared with all programs that use libxdp, has room for 10, and is not
protected.

On the other hooks the programs' return values decide whether the next one runs,
and each member has a link of its own. On tc/ingress and tc/egress it has a
filter instead, which no process can hold and other tools can remove.

` + programHelp + builtinHelp(),
		Example:           attachExample,
		Args:              words(1, "HOOK", "TARGET", "PROGRAM"),
		ValidArgsFunction: completeArgs(1, offerHooks, a.offerTargets, offerPrograms),
		RunE: a.withTarget(func(cmd *cobra.Command, t dispatcher.Target, args []string) error {
			o, err := member.options(a, cmd.Flags())
			if err != nil {
				return err
			}
			o.Position, o.Mode, o.Override = place.Position, mode, over
			o.Style, o.ConfigVersion = style.style, style.version
			from, err := program.source(a, t.Hook, args[0])
			if err != nil {
				return err
			}
			defer from.release()
			if o.Name == "" && !a.isLibxdp(cmd.Context(), t, o.Style) {
				o.Name = from.name
			}
			if err := a.needBPFFS((o.Persistent || program.pinsIn(a.bpffs)) && !dryRun); err != nil {
				return err
			}
			if dryRun {
				chain, err := dispatcher.Plan(cmd.Context(), t, from.Source, o)
				if err != nil {
					return err
				}
				a.warnHeader(chain, from)
				return a.printChains([]hook.Chain{*chain}, nil, true)
			}
			link, err := dispatcher.Attach(cmd.Context(), t, from.Source, o)
			if err != nil {
				return err
			}
			if chain, err := link.Chain(cmd.Context()); err == nil {
				a.warnHeader(chain, from)
			}
			return a.attached(cmd.Context(), t, link, o.Name, member.hold)
		}),
	}
	member.add(cmd, "the program's")
	place.add(a, cmd)
	flags := cmd.Flags()
	flags.Func("mode", "xdp: `MODE` of the device: auto, native (in the driver) or generic; all members of a chain have the same", func(text string) (err error) {
		if ours := ipModes[text]; ours != "" {
			return fmt.Errorf("here it is --mode %s", ours)
		}
		mode, err = hook.ParseMode(text)
		return err
	})
	completeFlag(cmd, "mode", fixed("auto", "native", "generic"))
	style.add(cmd, "xdp: `STYLE` of the chain: owned or libxdp (default: the style of an existing chain; owned on a free device)")
	program.add(cmd)
	flags.BoolVar(&over, "override", false, "cgroup: attach although the program of a cgroup above does not run here any more then")
	flags.BoolVar(&dryRun, "dry-run", false, "load and check everything, print the resulting chain, and change nothing")
	return cmd
}
