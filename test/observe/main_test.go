// Package observe tests what is said about a machine and changes nothing there: lists, doctor, watch,
// measure, explain, features and holders.
package observe

import (
	"testing"

	"github.com/libdispatcher/dispatcher/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }
