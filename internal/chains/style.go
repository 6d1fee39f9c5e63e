package chains

import (
	"errors"
)

// errStyle: the chain on the device is one of the other style, or such a one is asked
// for: another family has to do it.
var ErrStyle = errors.New("a chain of another style is there")

// taken is the reason why an owned chain cannot be changed: there is none.
func (d Device) taken(snap *Snapshot) error {
	if snap.Libxdp {
		return ErrStyle
	}
	return d.Occupied(snap)
}
