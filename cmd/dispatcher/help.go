package main

import (
	"io"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"
)

// A user who types --help looks for a verb: so the verbs come first, and what they have in common
// comes at the end.
const (
	helpTemplate = `{{if .HasParent}}{{or .Long .Short | trimTrailingWhitespaces}}{{else}}{{.Short}}.{{end}}

{{.UsageString}}{{if not .HasParent}}
{{.Long | trimTrailingWhitespaces}}
{{end}}`

	usageTemplate = `Usage:
  {{if .HasParent}}{{.UseLine}}{{else}}{{.CommandPath}} VERB ...{{end}}{{if .Aliases}}

Other names:
  {{.NameAndAliases}}{{end}}{{if .HasAvailableSubCommands}}

Verbs:{{range .Commands}}{{if .IsAvailableCommand}}
  {{rpad .Name .NamePadding}} {{.Short}}{{end}}{{end}}{{end}}{{if .HasExample}}

Examples:
{{.Example}}{{end}}{{if .HasAvailableLocalFlags}}

Flags:
{{flags .LocalFlags}}{{end}}{{if .HasAvailableInheritedFlags}}

Global flags:
{{flags .InheritedFlags}}{{end}}{{if .HasAvailableSubCommands}}

"{{.CommandPath}} VERB --help" tells more about a verb.{{end}}
`
)

// setHelp sets how the help of all verbs looks.
func (a *app) setHelp(root *cobra.Command) {
	cobra.AddTemplateFunc("flags", func(f *pflag.FlagSet) string {
		return strings.TrimRight(f.FlagUsagesWrapped(width(a.stdout)), "\n")
	})
	root.SetHelpTemplate(helpTemplate)
	root.SetUsageTemplate(usageTemplate)
}

// width returns how many columns text for w may have: those of the terminal, or as many as
// the texts in this program.
func width(w io.Writer) int {
	const usual = 80
	if f := terminal(w); f != nil {
		if columns, _, err := term.GetSize(int(f.Fd())); err == nil && columns > 40 {
			return columns
		}
	}
	return usual
}
