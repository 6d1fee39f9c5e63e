package chains

import (
	"errors"
)

// ErrStyle says that the chain on the device has the other style, or that the request
// asks for the other style: the caller must ask the other family.
var ErrStyle = errors.New("a chain of another style is there")

// taken returns the error for a device without an owned chain: ErrStyle for a chain
// of libxdp, else ErrBusy.
func (d Device) taken(snap *Snapshot) error {
	if snap.Libxdp {
		return ErrStyle
	}
	return d.Occupied(snap)
}
