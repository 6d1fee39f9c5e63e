package guest

import (
	"bytes"
	"testing"
	"time"

	"github.com/go-quicktest/qt"
)

func TestRunCommand(t *testing.T) {
	tests := map[string]struct {
		step           Step
		status         int
		stdout, stderr string
		err            string
	}{
		"output and status":     {step: Step{Args: []string{"sh", "-c", "echo a; echo b >&2; exit 3"}}, status: 3, stdout: "a\n", stderr: "b\n"},
		"environment, folder":   {step: Step{Args: []string{"sh", "-c", "echo $X; pwd"}, Env: []string{"X=y"}, Dir: "/proc"}, stdout: "y\n/proc\n"},
		"killed":                {step: Step{Args: []string{"sh", "-c", "kill -9 $$"}}, status: 137},
		"there is none":         {step: Step{Args: []string{"/no/such"}}, status: 127, err: ".*no such file.*"},
		"nothing to run":        {step: Step{}, status: 127, err: "no command"},
		"does not end":          {step: Step{Args: []string{"sleep", "60"}, Timeout: 50 * time.Millisecond}, status: 131, err: "did not end within 50ms"},
		"no input to wait for":  {step: Step{Args: []string{"cat"}}},
		"ended before the time": {step: Step{Args: []string{"true"}, Timeout: time.Minute}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			result := runCommand(test.step, &stdout, &stderr)
			qt.Check(t, qt.Equals(result.Status, test.status))
			qt.Check(t, qt.Equals(stdout.String(), test.stdout))
			qt.Check(t, qt.Equals(stderr.String(), test.stderr))
			qt.Check(t, qt.Matches(result.Error, test.err))
		})
	}
}
