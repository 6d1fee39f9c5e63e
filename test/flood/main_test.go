// Package flood tests what packets meet that flood in while members change: not one gets past a member that drops, and
// none meets a member twice or not at all, also when the process that makes the change is killed.
package flood

import (
	"testing"

	"github.com/libdispatcher/dispatcher/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }
