// Package crash tests what a process leaves that is killed while it changes a target, at any step: the old chain or the
// new one, both whole, and nothing that the next change does not clean up.
package crash

import (
	"testing"

	"github.com/libdispatcher/dispatcher/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }
