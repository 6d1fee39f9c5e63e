package main

import (
	"bytes"

	"github.com/spf13/cobra"
)

func (a *app) completionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "completion SHELL",
		Short: "Print the completion script for bash, zsh or fish",
		Long: `Print the completion script for bash, zsh or fish. Hooks, devices, cgroups,
members, maps, built-in programs and network namespaces complete.`,
		Example: `  dispatcher completion bash > /etc/bash_completion.d/dispatcher
  dispatcher completion zsh > "${fpath[1]}/_dispatcher"
  dispatcher completion fish > ~/.config/fish/completions/dispatcher.fish`,
		Args:              words(0, "SHELL"),
		ValidArgsFunction: completeArgs(0, offerWords("bash", "zsh", "fish")),
		RunE: func(cmd *cobra.Command, args []string) error {
			var b bytes.Buffer
			var err error
			switch root := cmd.Root(); args[0] {
			case "bash":
				err = root.GenBashCompletionV2(&b, true)
			case "zsh":
				err = root.GenZshCompletion(&b)
			case "fish":
				err = root.GenFishCompletion(&b, true)
			default:
				return usage("", "there is no completion for the shell %q, only for bash, zsh and fish", args[0])
			}
			if err != nil {
				return err
			}
			return a.print(b.String())
		},
	}
}
