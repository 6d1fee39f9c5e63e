package xdploader

// Programs returns an error if the programs of an object file cannot be listed.
func Programs(b []byte) error {
	_, _, err := programs(b)
	return err
}
