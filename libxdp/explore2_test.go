package libxdp

import (
	"fmt"
	"os"
)

var interrupt = os.Interrupt

func itoa(n uint32) string { return fmt.Sprint(n) }
