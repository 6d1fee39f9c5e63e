package dispatch_test

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
)

var update = flag.Bool("update", false, "write the golden files anew")

// plain are the default settings.
var plain = hook.Settings{}.WithDefaults()

func settings(continueOn hook.VerdictSet, missing hook.OnMissing) hook.Settings {
	return hook.Settings{Priority: hook.DefaultPriority, ContinueOn: continueOn, OnMissing: missing}
}

func anyVerdict() hook.VerdictSet {
	return hook.SetOf(hook.Aborted, hook.Drop, hook.Pass, hook.TX, hook.Redirect)
}

// plans are the chains with code in testdata.
var plans = map[string][]hook.Settings{
	"none":          {},
	"plain-1":       {plain},
	"plain-2":       {plain, plain},
	"plain-3":       {plain, plain, plain},
	"plain-drop":    {plain, settings(hook.SetOf(hook.Pass), hook.MissingDrop), plain},
	"plain-aborted": {plain, settings(hook.SetOf(hook.Pass), hook.MissingAborted), plain},
	"mixed": {
		plain,
		settings(hook.SetOf(hook.Pass, hook.TX), hook.MissingContinue),
		settings(hook.SetOf(hook.Aborted, hook.Redirect), hook.MissingContinue),
		plain,
	},
	"never":         {settings(hook.Never, hook.MissingContinue), plain},
	"never-drop":    {settings(hook.Never, hook.MissingDrop), plain},
	"never-aborted": {settings(hook.Never, hook.MissingAborted), plain},
	"any":           {settings(anyVerdict(), hook.MissingContinue), plain},
	// The verdict of an empty slot is final, even where the chain continues on
	// the same verdict of a member.
	"drop-in-set":      {settings(hook.SetOf(hook.Drop), hook.MissingDrop), plain},
	"drop-not-in-set":  {settings(hook.SetOf(hook.TX), hook.MissingDrop), plain},
	"aborted-in-set":   {settings(anyVerdict(), hook.MissingAborted), settings(anyVerdict(), hook.MissingDrop)},
	"aborted-not-in":   {settings(hook.SetOf(hook.Drop), hook.MissingAborted), plain},
	"last-not-plain":   {plain, settings(hook.Never, hook.MissingContinue)},
	"one-not-plain":    {settings(anyVerdict(), hook.MissingContinue)},
	"one-closed-door":  {settings(anyVerdict(), hook.MissingDrop)},
	"one-never-closed": {settings(hook.Never, hook.MissingAborted)},
}

// Golden files show a reviewer each change of the generated code, and the
// kernel must accept every form of it. TestSemantics checks what the code does.
func TestGenerate(t *testing.T) {
	for name, slots := range plans {
		t.Run(name, func(t *testing.T) {
			got := fmt.Sprintf("%v", dispatch.Link(slots, nil, false))
			qt.Assert(t, qt.Equals(fmt.Sprintf("%v", dispatch.Link(slots, nil, false)), got), qt.Commentf("not always the same"))

			golden := filepath.Join("testdata", name+".golden")
			if *update {
				qt.Assert(t, qt.IsNil(os.WriteFile(golden, []byte(got), 0o644)))
			}
			want, err := os.ReadFile(golden)
			qt.Assert(t, qt.IsNil(err), qt.Commentf("make it with -update"))
			qt.Assert(t, qt.Equals(got, string(want)))
		})
	}
	// Every golden file has a plan.
	files, err := filepath.Glob("testdata/*.golden")
	qt.Assert(t, qt.IsNil(err))
	for _, f := range files {
		name := strings.TrimSuffix(filepath.Base(f), ".golden")
		qt.Check(t, qt.IsNotNil(plans[name]), qt.Commentf("%s", f))
	}
}
