package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
)

// withoutDev drops the word "dev" before a device, which users of "ip" and "tc"
// type out of habit, and "cgroup" before a cgroup. As with ip, a device named
// dev is written "dev dev". before is the number of words before the target.
func withoutDev(args []string, before int) []string {
	if len(args) > before+1 && announces(args, before) {
		return slices.Delete(slices.Clone(args), before, before+1)
	}
	return args
}

// announces tells whether the word at i only announces the next word: a target
// of the hook before it.
func announces(args []string, i int) bool {
	if i > 0 && hook.Hook(args[i-1]).OnCgroup() {
		return args[i] == "cgroup"
	}
	return args[i] == "dev"
}

// words returns a check of a verb's arguments. names are the words of the usage
// line; optional ones are in brackets.
func words(before int, names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		args = withoutDev(args, before)
		for i, name := range names {
			if i >= len(args) {
				if strings.HasPrefix(name, "[") {
					return nil
				}
				return usage(seeHelp(cmd), "%s is missing: %s", name, cmd.UseLine())
			}
			// This may be "$FILTER" with a typo in it.
			if args[i] == "" {
				return usage(seeHelp(cmd), "%s is empty: %s", strings.Trim(name, "[]"), cmd.UseLine())
			}
		}
		if len(args) > len(names) {
			return usage(seeHelp(cmd), "%q is one word too many: %s", args[len(names)], cmd.UseLine())
		}
		return nil
	}
}

// ipModes has what ip(8) calls XDP, and the mode that it means.
var ipModes = map[string]string{"xdpgeneric": "generic", "xdpdrv": "native"}

func parseHook(name string) (hook.Hook, error) {
	h, err := hook.Parse(name)
	switch mode := ipModes[name]; {
	case err == nil:
		return h, nil
	case mode != "":
		return "", usage("here it is the hook xdp, with --mode "+mode, "unknown hook %q", name)
	}
	// The list of all hooks would be longer than a screen.
	if _, unknown := parseHooks(name); unknown != nil {
		return "", usage(didYouMean(name, wordsOf(hook.Hooks()), "", hookFirst+"; \"dispatcher --help\" lists the hooks"), "unknown hook %q", name)
	}
	return "", usage(hookFirst, "%v", err)
}

const hookFirst = `a hook comes before its target, as in "dispatcher list xdp eth0"`

func wordsOf(hooks []hook.Hook) []string {
	list := make([]string, len(hooks))
	for i, h := range hooks {
		list[i] = string(h)
	}
	return list
}

// settingsFlags are the flags for a member's settings.
type settingsFlags struct{ hook.Settings }

func (s *settingsFlags) add(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.Func("priority", fmt.Sprintf("run order among the members: `N` from %d (first) to %d (last); of equals the one that came first runs first", hook.MinPriority, hook.MaxPriority), s.setPriority)
	flags.Func("continue-on", "xdp: run the next member after these `VERDICTS`: pass,tx for example, none or any", func(text string) (err error) {
		s.ContinueOn, err = hook.ParseVerdictSet(text)
		return err
	})
	flags.Func("on-missing", "xdp: what an empty slot does to packets when the member's owner died: `POLICY` is continue (as if the member were not there), drop or aborted (a closed door)", func(text string) (err error) {
		s.OnMissing, err = hook.ParseOnMissing(text)
		return err
	})
	completeFlag(cmd, "continue-on", fixed("pass", "pass,tx", "pass,redirect", "any", "none"))
	completeFlag(cmd, "on-missing", fixed("continue", "drop", "aborted"))
}

// setPriority refuses 0, which means the default to the library.
func (s *settingsFlags) setPriority(text string) error {
	n, err := strconv.Atoi(text)
	if err != nil || n < hook.MinPriority || n > hook.MaxPriority {
		return fmt.Errorf("must be a number from %d (runs first) to %d", hook.MinPriority, hook.MaxPriority)
	}
	s.Priority = n
	return nil
}

// positionFlags are the flags that ask for a position.
type positionFlags struct{ hook.Position }

func (p *positionFlags) add(a *app, cmd *cobra.Command) {
	flags := cmd.Flags()
	ref := func(to *hook.Ref) func(string) error {
		return func(text string) error {
			*to = hook.Ref(text)
			return to.Check()
		}
	}
	flags.Func("before", "run just before `REF`: a member, link:ID or id:PROG; the priority follows from the position", ref(&p.Before))
	flags.Func("after", "run just after `REF`", ref(&p.After))
	flags.BoolVar(&p.First, "first", false, "run before all others, also before programs of other tools")
	flags.BoolVar(&p.Last, "last", false, "run after all others")
	completeFlag(cmd, "before", a.completeRef)
	completeFlag(cmd, "after", a.completeRef)
}

// memberFlags are the flags for a new member.
type memberFlags struct {
	settingsFlags
	name, owner string
	hold        bool
}

func (m *memberFlags) add(cmd *cobra.Command, nameDefault string) {
	flags := cmd.Flags()
	flags.StringVar(&m.name, "name", "", "`NAME` of the member (default: "+nameDefault+")")
	m.settingsFlags.add(cmd)
	flags.StringVar(&m.owner, "owner", "dispatcher", "`LABEL` that names the member's owner")
	flags.BoolVar(&m.hold, "hold", false, "own the member in the foreground: it leaves when the command ends, however it ends")
}

// options returns the library's options. A member that is not held is
// persistent.
func (m *memberFlags) options(a *app, flags *pflag.FlagSet) (dispatcher.Options, error) {
	for _, f := range []string{"name", "owner"} {
		if flags.Changed(f) {
			if err := hook.CheckName(flags.Lookup(f).Value.String()); err != nil {
				return dispatcher.Options{}, usage("", "--%s: %v", f, err)
			}
		}
	}
	return dispatcher.Options{
		Name:       m.name,
		Priority:   m.Priority,
		ContinueOn: m.ContinueOn,
		OnMissing:  m.OnMissing,
		Persistent: !m.hold,
		Owner:      m.owner,
		BPFFS:      a.bpffs,
	}, nil
}
