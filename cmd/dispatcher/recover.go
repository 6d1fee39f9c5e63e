package main

import (
	"strings"

	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
)

func (a *app) recoverCommand() *cobra.Command {
	o := dispatcher.RecoverOptions{}
	cmd := &cobra.Command{
		Use:   "recover",
		Short: "Clean up after devices and processes that are gone",
		Long: `Clean up in the bpffs: members whose device or cgroup is gone, unfinished work
of killed processes. Nothing that
runs is touched.

With --reattach, persistent members are attached again, with their names, order
and options, if a device of the same name is back in the same network namespace,
or a cgroup at the same path. Members without such a target stay as they are.`,
		Example: `  dispatcher recover --dry-run
  dispatcher recover --reattach`,
		Args: words(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.BPFFS = a.bpffs
			found, err := dispatcher.Recover(cmd.Context(), o)
			if err != nil {
				return err
			}
			return a.printRecovered(found, o.DryRun)
		},
	}
	cmd.Flags().BoolVar(&o.DryRun, "dry-run", false, "only show what would be done")
	cmd.Flags().BoolVar(&o.Reattach, "reattach", false, "attach persistent members again where their target is back")
	cmd.Flags().BoolVar(&o.Override, "override", false, "with --reattach, also where the program of a cgroup above would not run any more")
	return cmd
}

type jsonRecovered struct {
	hook.Leftover
	Error string `json:"error,omitempty"`
}

// printRecovered prints what was found. The error says what could not be cleaned
// up.
func (a *app) printRecovered(found []hook.Leftover, dryRun bool) error {
	var left []error
	for _, f := range found {
		left = append(left, f.Err)
	}
	err := join(left...)
	if a.format == formatJSON {
		list := []jsonRecovered{}
		for _, f := range found {
			f.Members = append([]string{}, f.Members...)
			j := jsonRecovered{Leftover: f}
			if f.Err != nil {
				j.Error = oneLine(f.Err.Error())
			}
			list = append(list, j)
		}
		return join(a.printJSON(struct {
			Version   int             `json:"version"`
			DryRun    bool            `json:"dry_run"`
			Recovered []jsonRecovered `json:"recovered"`
		}{schema, dryRun, list}), err)
	}
	if len(found) == 0 {
		a.note("nothing to recover")
		return nil
	}
	rows := [][]cell{heads("HOOK", "TARGET", "MEMBERS", "DONE", "WHAT")}
	for _, f := range found {
		rows = append(rows, []cell{{text: orDash(string(f.Hook))}, {text: orDash(f.Target)}, {text: orDash(strings.Join(f.Members, ","))}, done(f, dryRun), {text: f.What + ": " + f.Path}})
	}
	return join(a.printTable(rows), err)
}

func done(f hook.Leftover, dryRun bool) cell {
	switch {
	case f.Err != nil:
		return cell{"no", red}
	case dryRun && f.Reattached:
		return cell{"would be attached", yellow}
	case dryRun:
		return cell{"would be removed", yellow}
	case f.Reattached:
		return cell{"attached", green}
	}
	return cell{"removed", green}
}
