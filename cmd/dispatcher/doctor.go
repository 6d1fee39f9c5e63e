package main

import (
	"errors"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
)

func (a *app) doctorCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "doctor",
		Short: "Show what is not as it should be, and the command that mends it",
		Long: `Show what is not as it should be with the machine (capabilities, what the kernel
can do, the JIT, the bpffs, what hides or refuses things) and the state (pins that
were left, slots without an owner, members out of order, what others may throw
out or read). Below each finding is the command that mends it, if there is one.
Nothing is changed.

LEVEL is "note" for what is worth knowing, "drift" for what is not as it was
meant to be, and "broken" for what does not work. -v shows the checks that found
nothing as well, -q leaves out the notes.

The exit status is 6 when there is drift, or something is broken.`,
		Example: `  dispatcher doctor
  dispatcher doctor -j | jq -r '.findings[] | select(.level == "drift").mend'`,
		Args: words(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if a.netns != "" {
				return usage("leave -n out", "the doctor looks at the whole machine")
			}
			found, err := dispatcher.Doctor(cmd.Context(), a.readOptions())
			if err != nil {
				return err
			}
			if err := a.printFindings(a.worthwhile(found)); err != nil {
				return err
			}
			if slices.ContainsFunc(found, drifted) {
				return errDrift
			}
			return nil
		},
	}
}

// errDrift is what the command ends with when its findings were printed.
var errDrift = errors.New("there is something to mend")

func drifted(f hook.Finding) bool {
	return f.Level == hook.LevelDrift || f.Level == hook.LevelBroken
}

// worthwhile leaves out what was not asked for.
func (a *app) worthwhile(found []hook.Finding) []hook.Finding {
	return slices.DeleteFunc(slices.Clone(found), func(f hook.Finding) bool {
		return f.Level == hook.LevelOK && !a.verbose || f.Level == hook.LevelNote && a.quiet
	})
}

type jsonFinding struct {
	Check  string    `json:"check"`
	Level  string    `json:"level"`
	Hook   string    `json:"hook,omitempty"`
	Target string    `json:"target,omitempty"`
	NetNS  jsonNetNS `json:"netns"` // zero for what is in none
	Member string    `json:"member,omitempty"`
	Text   string    `json:"text"`
	Mend   string    `json:"mend,omitempty"`
}

func (a *app) printFindings(found []hook.Finding) error {
	if a.format == formatJSON {
		list := make([]jsonFinding, 0, len(found))
		for _, f := range found {
			list = append(list, jsonFinding{
				Check: f.Check, Level: string(f.Level), Hook: string(f.Hook), Target: f.Target,
				NetNS: jsonNetNS(f.NetNS), Member: f.Member, Text: f.Text, Mend: f.Mend,
			})
		}
		return a.printJSON(struct {
			Version  int           `json:"version"`
			Findings []jsonFinding `json:"findings"`
		}{schema, list})
	}
	if len(found) == 0 {
		return a.print("nothing to mend\n")
	}
	rows := [][]cell{heads("CHECK", "LEVEL", "WHERE", "FINDING")}
	for _, f := range found {
		rows = append(rows, []cell{{f.Check, ""}, {string(f.Level), levelColors[f.Level]}, {a.findingAt(f), ""}, {f.Text, ""}})
	}
	var b strings.Builder
	a.table(&b, "", rows)
	lines := strings.SplitAfter(b.String(), "\n")
	b.Reset()
	b.WriteString(lines[0])
	for i, f := range found {
		b.WriteString(lines[i+1])
		if f.Mend != "" {
			b.WriteString("    " + f.Mend + "\n")
		}
	}
	return a.print(b.String())
}

var levelColors = map[hook.Level]string{
	hook.LevelOK: green, hook.LevelNote: yellow, hook.LevelDrift: red, hook.LevelBroken: red,
}

// findingAt is the place of a finding as a verb takes it, and its namespace.
func (a *app) findingAt(f hook.Finding) string {
	parts := []string{string(f.Hook), f.Target, f.Member, netnsPart(&hook.Chain{NetNS: f.NetNS}, a.format == formatWide)}
	parts = slices.DeleteFunc(parts, func(s string) bool { return s == "" })
	return orDash(strings.Join(parts, " "))
}
