package xdploader

// ReplacesFunctions tells why the kernel has no dispatcher of libxdp's, if so.
var ReplacesFunctions = replacesFunctions

// Programs tells whether the programs of an object file can be listed.
func Programs(b []byte) error {
	_, _, err := programs(b)
	return err
}
