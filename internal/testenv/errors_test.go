package testenv_test

import (
	"errors"
	"fmt"
	"io/fs"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

func TestCheckError(t *testing.T) {
	good := hook.Wrap("attach", hook.XDP, "eth0", hook.Because(fs.ErrExist, "there is a member %q already", "a").Hint("choose another name; or replace it"))
	qt.Check(t, qt.IsNil(testenv.CheckError(good)))
	for name, err := range map[string]error{
		"plain":         fs.ErrExist,
		"wrapped":       fmt.Errorf("x: %w", good),
		"no operation":  hook.Wrap("", hook.XDP, "eth0", fs.ErrExist),
		"no cause":      &hook.Error{Op: "attach"},
		"nested":        hook.Wrap("attach", hook.XDP, "eth0", fmt.Errorf("x: %w", good)),
		"empty part":    hook.Wrap("attach", hook.XDP, "eth0", errors.New("x: : y")),
		"hint in cause": hook.Wrap("attach", hook.XDP, "eth0", hook.WithHint(errors.New("x; wait"), "wait")),
		"hint twice":    &hook.Error{Op: "attach", Err: fs.ErrExist, Hint: "wait; wait"},
		"format":        hook.Wrap("attach", hook.XDP, "eth0", errors.New("%!d(string=x)")),
	} {
		qt.Check(t, qt.IsNotNil(testenv.CheckError(err)), qt.Commentf("%s: %v", name, err))
	}
}
