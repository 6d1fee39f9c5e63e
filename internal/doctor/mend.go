package doctor

import (
	"strings"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// at is a finding about a hook.
func at(c *hook.Chain, check string, level hook.Level) hook.Finding {
	return hook.Finding{Check: check, Level: level, Hook: c.Hook, Target: c.Target, NetNS: c.NetNS}
}

// on is a command about the hook of c: the verb, and what follows the target.
// Empty once there is no target.
func (e *exam) on(c *hook.Chain, verb string, args ...string) string {
	if c.Target == "" {
		return ""
	}
	return kernel.Command(c.NetNS.Name, e.bpffs, append([]string{verb, string(c.Hook), c.Target}, args...)...)
}

// recover is the command that clears up what dead processes left.
func (e *exam) recover() string { return kernel.Command("", e.bpffs, "recover") }

// oneLine makes an error fit a line.
func oneLine(err error) string { return strings.Join(strings.Fields(err.Error()), " ") }
