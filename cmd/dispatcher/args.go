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

// withoutDev drops the word "dev" before a device, which people who write "ip"
// and "tc" all day type without thinking. A device of that name is written
// "dev dev", as there. before is how many words come before the device.
func withoutDev(args []string, before int) []string {
	if len(args) > before+1 && args[before] == "dev" {
		return slices.Delete(slices.Clone(args), before, before+1)
	}
	return args
}

// words is the check of a verb's arguments: names are those of the usage line,
// optional ones in brackets.
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
			// "$FILTER" with a typo in it.
			if args[i] == "" {
				return usage(seeHelp(cmd), "%s is empty: %s", strings.Trim(name, "[]"), cmd.UseLine())
			}
		}
		if len(args) > len(names) {
			return usage(seeHelp(cmd), "%q is too much: %s", args[len(names)], cmd.UseLine())
		}
		return nil
	}
}

func parseHook(name string) (hook.Hook, error) {
	h, err := hook.Parse(name)
	if err != nil {
		return "", usage(`a hook comes before the device, as in "dispatcher list xdp eth0"`, "%v", err)
	}
	return h, nil
}

// settingsFlags are the flags that set how a member takes part in its chain.
type settingsFlags struct{ hook.Settings }

func (s *settingsFlags) add(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.Func("priority", fmt.Sprintf("where in the chain to run: `N` from %d (first) to %d (last); of equals, the one that came first is first", hook.MinPriority, hook.MaxPriority), s.setPriority)
	flags.Func("continue-on", "go on to the next member after these `VERDICTS`: pass,tx for example, none or any", func(text string) (err error) {
		s.ContinueOn, err = hook.ParseVerdictSet(text)
		return err
	})
	flags.Func("on-missing", "what happens while the member's slot is empty because its owner died: `POLICY` is continue, drop or aborted", func(text string) (err error) {
		s.OnMissing, err = hook.ParseOnMissing(text)
		return err
	})
	completeFlag(cmd, "continue-on", fixed("pass", "pass,tx", "pass,redirect", "any", "none"))
	completeFlag(cmd, "on-missing", fixed("continue", "drop", "aborted"))
}

// setPriority refuses 0, which the library takes for the default.
func (s *settingsFlags) setPriority(text string) error {
	n, err := strconv.Atoi(text)
	if err != nil || n < hook.MinPriority || n > hook.MaxPriority {
		return fmt.Errorf("must be a number from %d (runs first) to %d", hook.MinPriority, hook.MaxPriority)
	}
	s.Priority = n
	return nil
}

// memberFlags are the flags of a new member.
type memberFlags struct {
	settingsFlags
	name, owner string
	hold        bool
}

func (m *memberFlags) add(cmd *cobra.Command, nameDefault string) {
	flags := cmd.Flags()
	flags.StringVar(&m.name, "name", "", "`NAME` of the member in the chain (default: "+nameDefault+")")
	m.settingsFlags.add(cmd)
	flags.StringVar(&m.owner, "owner", "dispatcher", "`LABEL` that tells others whose it is")
	flags.BoolVar(&m.hold, "hold", false, "own the member in the foreground: it leaves when the command ends, however it ends")
}

// options are those for the library. A member that is not held is persistent.
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
		Settings:   m.Settings,
		Persistent: !m.hold,
		Owner:      m.owner,
		BPFFS:      a.bpffs,
	}, nil
}
