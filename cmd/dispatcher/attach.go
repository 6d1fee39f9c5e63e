package main

import (
	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
)

const attachExample = `  # drops a list of sources, before anything else; stays until detach or a reboot
  dispatcher attach xdp eth0 builtin:droplist --priority 1

  # one of several programs of a file, with a constant set and a map shared
  dispatcher attach xdp eth0 filter.o:xdp_filter --global limit=1000 --map allowed=/sys/fs/bpf/allowed

  # goes on to the next member also after XDP_TX; no packet passes while it is missing
  dispatcher attach xdp eth0 pin:/sys/fs/bpf/balancer --name lb --continue-on pass,tx --on-missing drop

  # counts what leaves a device, before what any other tool has attached there
  dispatcher attach tcx/egress eth0 builtin:count --first

  # behind the program of another tool, which "list" shows with link 12
  dispatcher attach tcx/ingress eth0 filter.o --after link:12

  # sends connections to port 80 to port 8080, for all services of a slice
  dispatcher attach cgroup/connect4 /sys/fs/cgroup/web.slice builtin:redirect --global from_port=80 --global to_port=8080

  # shares the device with xdp-loader and other programs that use libxdp
  dispatcher attach xdp eth0 filter.o --style libxdp

  # counts for as long as the command runs
  dispatcher attach xdp eth0 builtin:count --hold

  # what the chain would be, as JSON
  dispatcher attach xdp eth0 filter.o --dry-run -j`

func (a *app) attachCommand() *cobra.Command {
	var (
		member  memberFlags
		place   positionFlags
		program programFlags
		mode    hook.Mode
		style   styleFlags
		dryRun  bool
	)
	cmd := &cobra.Command{
		Use:   "attach HOOK TARGET PROGRAM",
		Short: "Put a program on a hook, beside those that are there",
		Long: `Put a program on a hook of a device or a cgroup, beside those that are there.

It runs where its priority puts it among the members. What other tools have
attached keeps its place; --before, --after, --first and --last ask for a place
whatever the priority. It stays until "detach" or a reboot; with --hold it
leaves with the command.

On xdp it joins the chain that is on the device, or starts one, and the next
member runs when its verdict is one of --continue-on. A chain of libxdp
(xdp-loader) is joined as libxdp does it; --style libxdp starts one on a free
device, which C programs can then join: it is shared with all that use libxdp,
has room for 10, and is not protected. Elsewhere the programs
themselves say with what they return whether the next one runs, and it gets a
link of its own. On tc/ingress and tc/egress it gets a filter, which no link
owns: it cannot be held, and others can remove it.

` + programHelp + builtinHelp(),
		Example:           attachExample,
		Args:              words(1, "HOOK", "TARGET", "PROGRAM"),
		ValidArgsFunction: completeArgs(1, offerHooks, a.offerTargets, offerPrograms),
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
			o.Position, o.Mode = place.Position, mode
			o.Style, o.ConfigVersion = style.style, style.version
			from, err := program.source(a, t.Hook, args[2])
			if err != nil {
				return err
			}
			defer from.release()
			if o.Name == "" && !a.isLibxdp(cmd.Context(), t, o.Style) {
				o.Name = from.name
			}
			if (o.Persistent || program.pinsIn(a.bpffs)) && !dryRun {
				if err := a.needBPFFS(); err != nil {
					return err
				}
			}
			if dryRun {
				chain, err := dispatcher.Plan(cmd.Context(), t, from.Source, o)
				if err != nil {
					return err
				}
				return a.printChains([]hook.Chain{*chain}, true)
			}
			link, err := dispatcher.Attach(cmd.Context(), t, from.Source, o)
			if err != nil {
				return err
			}
			return a.attached(cmd.Context(), t, link, member.hold)
		},
	}
	member.add(cmd, "the program's")
	place.add(a, cmd)
	flags := cmd.Flags()
	flags.Func("mode", "xdp: `MODE` of the device: auto, native (in the driver) or generic; a chain has one for all members", func(text string) (err error) {
		mode, err = hook.ParseMode(text)
		return err
	})
	completeFlag(cmd, "mode", fixed("auto", "native", "generic"))
	style.add(cmd, "xdp: `STYLE` of the chain: owned or libxdp (default: that of the chain that is there; owned on a free device)")
	program.add(cmd)
	flags.BoolVar(&dryRun, "dry-run", false, "load and check everything, print the chain as it would be, and change nothing")
	return cmd
}
