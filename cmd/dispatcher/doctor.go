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
		Short: "Show what is wrong, and the command that repairs it",
		Long: `Show what is wrong with the machine (capabilities, kernel features, the JIT, the
bpffs, what hides or refuses things) and with the state (pins that were left,
slots without an owner, members out of order, what other tools could remove or
read). Below each finding is the command that repairs it, if there is one.
doctor itself changes nothing.

LEVEL is "note" for what is worth knowing, "drift" for what is not as intended,
and "broken" for what does not work. -v also shows the checks that found
nothing, -q leaves out the notes.

The exit status is 6 after a finding of level drift or broken.`,
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

// errDrift is the command's error after it has printed findings.
var errDrift = errors.New("there is something to mend")

func drifted(f hook.Finding) bool {
	return f.Level == hook.LevelDrift || f.Level == hook.LevelBroken
}

// worthwhile leaves out findings that the user did not ask for.
func (a *app) worthwhile(found []hook.Finding) []hook.Finding {
	return slices.DeleteFunc(slices.Clone(found), func(f hook.Finding) bool {
		return f.Level == hook.LevelOK && !a.verbose || f.Level == hook.LevelNote && a.quiet
	})
}

func (a *app) printFindings(found []hook.Finding) error {
	if a.format == formatJSON {
		return a.printJSON(struct {
			Version  int            `json:"version"`
			Findings []hook.Finding `json:"findings"`
		}{schema, append([]hook.Finding{}, found...)})
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

// findingAt returns the target of a finding, as a verb accepts it, and the
// namespace.
func (a *app) findingAt(f hook.Finding) string {
	parts := []string{string(f.Hook), f.Target, f.Member, netnsPart(&hook.Chain{NetNS: f.NetNS}, a.format == formatWide)}
	parts = slices.DeleteFunc(parts, func(s string) bool { return s == "" })
	return orDash(strings.Join(parts, " "))
}
