package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"
)

// The units run commands that there are, systemd understands them, and the rule starts the unit.
func TestPackaging(t *testing.T) {
	dir := t.TempDir()
	command := filepath.Join(dir, "dispatcher")
	qt.Assert(t, qt.IsNil(os.WriteFile(command, []byte("#!/bin/sh\n"), 0o700)))
	units, err := filepath.Glob("../../packaging/*.service")
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.HasLen(units, 2))
	var files []string
	for _, path := range units {
		b, err := os.ReadFile(path)
		qt.Assert(t, qt.IsNil(err))
		found := regexp.MustCompile(`(?m)^ExecStart=@bindir@/dispatcher (.*)$`).FindSubmatch(b)
		qt.Assert(t, qt.HasLen(found, 2))
		args := strings.Fields(strings.ReplaceAll(string(found[1]), "%i", "eth0"))
		a := &app{stdout: os.Stdout, stderr: os.Stderr}
		verb, flags, err := a.rootCommand(args).Find(args)
		qt.Assert(t, qt.IsNil(err))
		qt.Check(t, qt.Equals(verb.Name(), "apply"))
		qt.Check(t, qt.IsNil(verb.ParseFlags(flags)))
		file := filepath.Join(dir, filepath.Base(path))
		qt.Assert(t, qt.IsNil(os.WriteFile(file, []byte(strings.ReplaceAll(string(b), "@bindir@", dir)), 0o600)))
		files = append(files, strings.Replace(file, "@.", "@eth0.", 1))
	}
	rule, err := os.ReadFile("../../packaging/90-dispatcher.rules")
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.StringContains(string(rule), `ENV{SYSTEMD_WANTS}+="dispatcher-apply@$name.service"`))
	for line := range strings.Lines(string(rule)) {
		part := `[A-Z]+(\{[A-Z_]+\})?(==|!=|\+=|=)"[^"]*"`
		qt.Check(t, qt.Matches(strings.TrimSpace(line), `#.*|`+part+`(, `+part+`)*`))
	}

	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		t.Skip("there is no systemd-analyze")
	}
	cmd := exec.Command("systemd-analyze", append([]string{"verify", "--man=no", "--recursive-errors=no"}, files...)...)
	cmd.Env = append(os.Environ(), "SYSTEMD_UNIT_PATH="+dir+":")
	out, err := cmd.CombinedOutput()
	var ours []string
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, "dispatcher-apply") {
			ours = append(ours, line)
		}
	}
	qt.Check(t, qt.HasLen(ours, 0))
	t.Logf("%v\n%s", err, out)
}
