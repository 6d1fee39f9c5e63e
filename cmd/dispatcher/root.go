package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/libdispatcher/dispatcher/hook"
)

const rootLong = `Attach BPF programs to network hooks that several programs share: XDP and TC on
devices, packets and sockets of cgroups. Show what is attached, whichever tool
attached it.

XDP has room for one program on a device. dispatcher attaches a chain there that
runs many, its members, in the order of their priorities. The chain holds the
device by a bpf_link, so that "ip link set xdp" can neither remove nor replace it.

On tcx and cgroups the kernel itself runs many programs. There each member has a
bpf_link of its own, at the position for its priority. Kernels without tcx have
tc: filters in the same order, which other tools can remove.

Everything needs root. Programs attached with "attach" and "adopt" stay until
"detach" or a reboot, because they are pinned in a bpffs; in a container they go
with it, unless it has the machine's bpffs. With --hold the command owns the
member instead, and the member leaves when the command ends.

HOOK and TARGET are
  xdp                      a device
  tcx/ingress tcx/egress   a device (Linux 6.6)
  tc/ingress tc/egress     a device; filters of the clsact qdisc
and, with the path of a cgroup (/sys/fs/cgroup/system.slice, or /system.slice),
`

const rootExample = `  dispatcher list
  dispatcher attach xdp eth0 filter.o --name filter --priority 10
  dispatcher attach xdp eth0 builtin:count
  dispatcher set xdp eth0 filter --continue-on pass,tx
  dispatcher replace xdp eth0 filter filter-v2.o
  dispatcher detach xdp eth0 filter

  dispatcher attach tcx/egress eth0 builtin:count --first
  dispatcher attach cgroup_skb/egress /sys/fs/cgroup/system.slice builtin:count
  dispatcher list cgroup /sys/fs/cgroup/system.slice --effective`

// cgroupHelp lists the many hooks of cgroups.
func cgroupHelp() string {
	var b strings.Builder
	width := 0
	for _, h := range hook.CgroupHooks() {
		if width += 1 + len(h); width > 78 {
			b.WriteString("\n ")
			width = 1 + len(h)
		} else if b.Len() == 0 {
			b.WriteByte(' ')
		}
		b.WriteString(" " + string(h))
	}
	return b.String()
}

// rootCommand defines the verbs and the global flags. args are the arguments of
// this run.
func (a *app) rootCommand(args []string) *cobra.Command {
	showVersion := false
	root := &cobra.Command{
		Use:               "dispatcher",
		Short:             "Attach BPF programs to network hooks that several programs share",
		Long:              rootLong + cgroupHelp() + "\n\nExit status:\n" + describeStatuses("  "),
		Example:           rootExample,
		SilenceErrors:     true, // fail prints them
		SilenceUsage:      true,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true}, // see completion.go
		Args:              cobra.ArbitraryArgs,                              // RunE has a better message for an unknown verb
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			go a.noteLock(cmd.Context())
			return a.checkBPFFS(cmd)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case showVersion:
				return a.printVersion()
			case len(args) > 0:
				return unknownVerb(cmd, args[0])
			}
			cmd.SetOut(a.stderr)
			_ = cmd.Help()
			return usage("", "a verb is missing; the verbs are listed above")
		},
	}
	root.SetArgs(args)
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)
	root.SetFlagErrorFunc(flagErrors(args))
	a.setHelp(root)
	root.Flags().BoolVarP(&showVersion, "version", "V", false, "print the version")
	a.addGlobalFlags(root)

	// The help has this order: common verbs come first.
	cobra.EnableCommandSorting = false
	verbs := []*cobra.Command{
		a.attachCommand(),
		a.replaceCommand(),
		a.setCommand(),
		a.mapCommand(),
		a.detachCommand(),
		a.listCommand(),
		a.holdersCommand(),
		a.watchCommand(),
		a.explainCommand(),
		a.topCommand(),
		a.adoptCommand(),
		a.convertCommand(),
		a.applyCommand(),
		a.diffCommand(),
		a.exportCommand(),
		a.sealCommand(),
		a.unsealCommand(),
		a.pinCommand(),
		a.unpinCommand(),
		a.doctorCommand(),
		a.recoverCommand(),
		a.featuresCommand(),
		a.xdpLoaderCommand(args),
		a.demoCommand(),
		a.versionCommand(),
		a.completionCommand(),
		a.manCommand(),
	}
	for _, verb := range verbs {
		verb.Flags().SortFlags = false
		root.AddCommand(verb)
	}
	return root
}

func (a *app) addGlobalFlags(root *cobra.Command) {
	flags := root.PersistentFlags()
	flags.SortFlags = false
	a.format, a.color = formatTable, "auto"
	oneOf(root, "output", "o", "print as `FORMAT`: table, wide or json", &a.format, formatTable, formatWide, formatJSON)
	flags.BoolFuncP("json", "j", "the same as -o json", func(string) error { a.format = formatJSON; return nil })
	flags.StringVarP(&a.netns, "netns", "n", "", "work in the network namespace `NS`: a name as in \"ip netns\", a path, or a process id")
	flags.StringVar(&a.bpffs, "bpffs", defaultBPFFS, "pin in the bpffs at `PATH`")
	flags.BoolVarP(&a.verbose, "verbose", "v", false, "say what was done; for a refused program, print the verifier's whole log")
	flags.BoolVarP(&a.quiet, "quiet", "q", false, "print no notes and no warnings")
	oneOf(root, "color", "", "colour the output: `WHEN` is auto (on a terminal, unless NO_COLOR is set), always or never", &a.color, "auto", "always", "never")
	completeFlag(root, "netns", netnsNames)
}

// oneOf adds a global flag with a few possible values.
func oneOf(root *cobra.Command, name, shorthand, text string, value *string, words ...string) {
	root.PersistentFlags().FuncP(name, shorthand, text, func(s string) error {
		if !slices.Contains(words, s) {
			return fmt.Errorf("must be one of %s", strings.Join(words, ", "))
		}
		*value = s
		return nil
	})
	completeFlag(root, name, fixed(words...))
}

// otherTools has the verbs of ip, tc, bpftool and xdp-loader that have another name here.
var otherTools = map[string]string{
	"load": "attach", "add": "attach", "unload": "detach", "del": "detach", "delete": "detach", "rm": "detach", "remove": "detach",
	"update": "replace", "change": "replace", "move": "set", "monitor": "watch", "show": "list", "ls": "list", "status": "list",
}

// unknownVerb returns the error for a verb that does not exist.
func unknownVerb(root *cobra.Command, verb string) error {
	var verbs []string
	for _, c := range root.Commands() {
		if c.IsAvailableCommand() {
			verbs = append(append(verbs, c.Name()), c.Aliases...)
		}
	}
	hint := didYouMean(verb, verbs, "", `"dispatcher --help" lists the verbs`)
	if ours := otherTools[verb]; ours != "" {
		hint = fmt.Sprintf("here it is %q", ours)
	}
	return usage(hint, "there is no verb %q", verb)
}

// flagErrors returns a function that makes an error for an unknown flag or a
// wrong value. args are the arguments of this run.
func flagErrors(args []string) func(*cobra.Command, error) error {
	return func(cmd *cobra.Command, err error) error {
		var unknown *pflag.NotExistError
		if !errors.As(err, &unknown) {
			return usage(seeHelp(cmd), "%v", err)
		}
		if !cmd.HasParent() {
			// Without a verb the flag is not the mistake.
			isVerb := func(word string) bool { c, _, err := cmd.Find([]string{word}); return err == nil && c != cmd }
			if slices.ContainsFunc(args, isVerb) {
				return usage("the flags of a verb come after it", "%v", unknown)
			}
			cmd.FParseErrWhitelist.UnknownFlags = true
			if cmd.ParseFlags(args) == nil && cmd.Flags().NArg() > 0 {
				return unknownVerb(cmd, cmd.Flags().Arg(0))
			}
		}
		var names []string
		cmd.Flags().VisitAll(func(f *pflag.Flag) { names = append(names, f.Name) })
		return usage(didYouMean(unknown.GetSpecifiedName(), names, "--", seeHelp(cmd)), "%v", unknown)
	}
}

func seeHelp(cmd *cobra.Command) string { return fmt.Sprintf("see \"%s --help\"", cmd.CommandPath()) }
