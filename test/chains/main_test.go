// Package chains tests chains of XDP programs on a device: which programs run, in which order and with
// which verdict, what else is on the device, adopting it, sealing, and converting from and to libxdp. A random model of
// a chain is compared with a real one.
package chains

import (
	"testing"

	"github.com/libdispatcher/dispatcher/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }
