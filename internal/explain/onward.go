package explain

import (
	"context"
	"fmt"
	"strings"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/attach"
)

// look looks for the filters of tc where packets go on behind TCX. They are not run: what
// is no BPF program, and what actions do, no test run tells.
func (e *Explainer) look() {
	t := e.opened.Target
	t.Hook = hook.Hook(strings.Replace(string(t.Hook), "tcx/", "tc/", 1))
	c, err := attach.Read(context.Background(), t)
	if err != nil {
		e.onward = t.Hook
		e.Limits = append(e.Limits, fmt.Sprintf("packets that pass here may go on to filters of %s, which could not be read: %v", t.Hook, err))
		return
	}
	var list []string
	if n := len(c.Members); n > 0 {
		list = append(list, fmt.Sprintf("BPF programs (%d)", n))
	}
	for _, m := range c.Members {
		if len(m.Actions) > 0 {
			list = append(list, fmt.Sprintf("%s has %s", m.Ref(), hook.DescribeActions(m.Actions)))
		}
	}
	for _, f := range c.Others {
		list = append(list, f.String())
	}
	if len(list) > 0 {
		e.onward = t.Hook
		e.Limits = append(e.Limits, fmt.Sprintf("packets that pass here go on to the filters of %s, which are not run and may drop them: %s", t.Hook, strings.Join(list, "; ")))
	}
}
