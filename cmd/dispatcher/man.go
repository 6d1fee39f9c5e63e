package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

const manExample = `  dispatcher man > /usr/local/share/man/man8/dispatcher.8`

func (a *app) manCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "man",
		Short:   "Print the manual page, dispatcher(8), as roff",
		Example: manExample + "\n  dispatcher man | man -l -",
		Args:    words(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.print(manPage(cmd.Root()))
		},
	}
}

// A roff is a manual page under construction, in the man(7) macros.
type roff struct{ strings.Builder }

// manPage makes the page from the texts of --help, so that both agree.
func manPage(root *cobra.Command) string {
	var r roff
	v, _ := buildVersion()
	r.macro("TH", "DISPATCHER", "8", buildDate(), "libdispatcher "+v)
	r.macro("SH", "NAME")
	r.text("dispatcher - " + strings.ToLower(root.Short[:1]) + root.Short[1:])
	r.macro("SH", "SYNOPSIS")
	for _, c := range verbs(root) {
		r.macro("B", strings.TrimSuffix(c.UseLine(), " [flags]"))
		r.macro("br")
	}
	r.macro("SH", "DESCRIPTION")
	description, _, _ := strings.Cut(root.Long, "\n\nExit status:")
	r.text(description)

	r.macro("SH", "VERBS")
	for _, c := range verbs(root) {
		r.macro("SS", strings.TrimPrefix(strings.TrimSuffix(c.UseLine(), " [flags]"), root.Name()+" "))
		r.verb(c)
	}
	r.macro("SH", "GLOBAL OPTIONS")
	r.flags(root.PersistentFlags())

	r.macro("SH", "EXIT STATUS")
	for _, s := range statuses {
		r.item(fmt.Sprint(s.status), s.meaning)
	}
	r.macro("SH", "ENVIRONMENT")
	r.item("NO_COLOR", "When it is set, the output has colour only with --color always.")
	r.macro("SH", "FILES")
	r.item(defaultBPFFS+"/libdispatcher/",
		"The pins of chains and members. Removing a pin removes the member, unless a process holds it.")
	r.macro("SH", "EXAMPLES")
	r.literal(root.Example)
	r.macro("SH", "SEE ALSO")
	r.text("bpftool(8), ip-link(8), tc(8), xdp-loader(8)")
	return r.String()
}

func verbs(root *cobra.Command) []*cobra.Command {
	var list []*cobra.Command
	for _, c := range root.Commands() {
		if c.IsAvailableCommand() {
			list = append(list, c)
		}
	}
	return list
}

func (r *roff) verb(c *cobra.Command) {
	if c.Long != "" {
		r.text(c.Long)
	} else {
		r.text(c.Short + ".")
	}
	if len(c.Aliases) > 0 {
		r.macro("PP")
		r.text("Other names: " + strings.Join(c.Aliases, ", ") + ".")
	}
	r.flags(c.LocalNonPersistentFlags())
	if c.Example != "" {
		r.macro("PP")
		r.text("Examples:")
		r.literal(c.Example)
	}
}

func (r *roff) flags(flags *pflag.FlagSet) {
	flags.VisitAll(func(f *pflag.Flag) {
		if f.Hidden || f.Name == "help" {
			return
		}
		name := "--" + f.Name
		if f.Shorthand != "" {
			name = "-" + f.Shorthand + ", " + name
		}
		value, text := pflag.UnquoteUsage(f)
		if f.DefValue != "" && f.DefValue != "false" && f.DefValue != "0" && f.DefValue != "[]" {
			text += fmt.Sprintf(" (default %s)", f.DefValue)
		}
		r.item(strings.TrimSpace(name+" "+value), text)
	})
}

// item writes an entry of a list.
func (r *roff) item(name, text string) {
	r.macro("TP")
	r.macro("B", name)
	r.text(text)
}

// macro writes a request with its arguments.
func (r *roff) macro(name string, args ...string) {
	r.WriteString("." + name)
	for _, arg := range args {
		r.WriteString(` "` + strings.ReplaceAll(escapeRoff(arg), `"`, `\(dq`) + `"`)
	}
	r.WriteByte('\n')
}

// text writes paragraphs that are filled; indented lines stay as they are.
func (r *roff) text(s string) {
	for i, paragraph := range strings.Split(s, "\n\n") {
		if i > 0 {
			r.macro("PP")
		}
		filled, literal, _ := strings.Cut(paragraph, "\n  ")
		r.lines(filled)
		if literal != "" {
			r.literal("  " + literal)
		}
	}
}

// literal writes lines that stay as they are.
func (r *roff) literal(s string) {
	r.macro("PP")
	r.macro("nf")
	r.lines(s)
	r.macro("fi")
}

func (r *roff) lines(s string) {
	for line := range strings.SplitSeq(s, "\n") {
		// A line that starts like a request would be taken for one.
		if strings.HasPrefix(line, ".") || strings.HasPrefix(line, "'") {
			r.WriteString(`\&`)
		}
		r.WriteString(escapeRoff(line) + "\n")
	}
}

func escapeRoff(s string) string {
	return strings.NewReplacer(`\`, `\e`, "-", `\-`).Replace(s)
}
