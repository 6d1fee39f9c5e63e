// Package links tests what is particular to TCX, clsact and cgroups, where each member is a link or a
// filter of its own: moves, adopting, and names.
package links

import (
	"testing"

	"github.com/libdispatcher/dispatcher/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }
