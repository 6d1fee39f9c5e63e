// Package loading tests what can become a member: object files and their maps and globals, programs
// from elsewhere, and which of them are refused.
package loading

import (
	"testing"

	"github.com/libdispatcher/dispatcher/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }
