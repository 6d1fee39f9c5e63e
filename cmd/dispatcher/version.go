package main

import (
	"cmp"
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// version and date are set by the linker to replace those of the module: -ldflags "-X
// main.version=v1.2.3 -X main.date=2026-01-31".
var version, date string

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  words(0),
		RunE:  func(*cobra.Command, []string) error { return a.printVersion() },
	}
}

func (a *app) printVersion() error {
	v, commit := buildVersion()
	platform := runtime.GOOS + "/" + runtime.GOARCH
	if a.format == formatJSON {
		return a.printJSON(struct {
			Version    int         `json:"version"`
			Dispatcher jsonVersion `json:"dispatcher"`
		}{schema, jsonVersion{v, commit, runtime.Version(), platform}})
	}
	if commit != "" {
		commit += ", "
	}
	return a.print(fmt.Sprintf("dispatcher %s (%s%s, %s)\n", v, commit, runtime.Version(), platform))
}

// buildDate returns the day of the commit, if the build knows it: the same source has the same
// manual page, whenever it is built.
func buildDate() string {
	day := date
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.time" {
				day = cmp.Or(day, s.Value)
			}
		}
	}
	return day[:min(len(day), len("2026-01-31"))]
}

// buildVersion returns the version and, if the build knows it, the commit.
func buildVersion() (v, commit string) {
	v = version
	if info, ok := debug.ReadBuildInfo(); ok {
		v = cmp.Or(v, info.Main.Version)
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				commit = s.Value[:min(len(s.Value), 12)]
			}
		}
	}
	return cmp.Or(v, "(devel)"), commit
}

type jsonVersion struct {
	Version  string `json:"version"`
	Commit   string `json:"commit,omitempty"`
	Go       string `json:"go"`
	Platform string `json:"platform"`
}
