package main

import (
	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher/declare"
	"github.com/libdispatcher/dispatcher/internal/apply"
	"github.com/libdispatcher/dispatcher/internal/document"
)

func (a *app) exportCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "export [HOOK|FAMILY [TARGET]]",
		Short: "Print the members that are attached as a document for apply",
		Long: `Print the members that are attached as a document for "apply": on the whole
machine, on one HOOK, or on one device or cgroup.

The kernel does not tell from which file a program was loaded. Where "apply" has
attached a builtin program, its name is known; elsewhere fill in the file. A
member keeps its owner: "apply" makes members of its own, so detach the exported
ones first, or give the new ones other names.`,
		Example: `  dispatcher export xdp eth0 > edge.yaml
  dispatcher export`,
		Args:              words(1, "[HOOK]", "[TARGET]"),
		ValidArgsFunction: completeArgs(1, offerListed, a.offerTargets),
		RunE: func(cmd *cobra.Command, args []string) error {
			chains, err := a.chains(cmd.Context(), withoutDev(args, 1), false)
			if err != nil {
				return err
			}
			if a.netns != "" { // the document is for this namespace, as apply -n is
				for i := range chains {
					chains[i].NetNS.Name = ""
				}
			}
			d, comments, err := apply.Export(cmd.Context(), chains)
			if err != nil {
				return err
			}
			if a.format == formatJSON {
				return a.printJSON(struct {
					Version  int               `json:"version"`
					Document *declare.Document `json:"document"`
				}{schema, d})
			}
			b, err := document.Format(d, comments)
			if err != nil {
				return err
			}
			return a.print(string(b))
		},
	}
}
