package rtnl

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// Driver returns the driver of a device in the calling thread's namespace, as "ethtool -i" does; empty for a
// device that tells none.
func Driver(name string) (string, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", kernel.Errno("socket", err)
	}
	defer unix.Close(fd)
	info, err := unix.IoctlGetEthtoolDrvinfo(fd, name)
	switch err {
	case nil:
		return unix.ByteSliceToString(info.Driver[:]), nil
	case unix.EOPNOTSUPP:
		return "", nil
	}
	return "", fmt.Errorf("driver of %s: %w", name, kernel.Explain(err))
}

// Events tells that devices have come, gone or changed.
type Events struct{ conn *Conn }

// Listen begins to listen for events in the calling thread's namespace. The caller closes the result.
func Listen() (*Events, error) {
	conn, err := Dial()
	if err != nil {
		return nil, err
	}
	if err := conn.nl.JoinGroup(unix.RTNLGRP_LINK); err != nil {
		conn.Close()
		return nil, fmt.Errorf("rtnetlink: %w", kernel.Explain(err))
	}
	return &Events{conn}, nil
}

// Wait waits for the next event; it fails after Close. Lost events count as one.
func (e *Events) Wait() error {
	_, err := e.conn.nl.Receive()
	if errors.Is(err, unix.ENOBUFS) {
		return nil
	}
	return err
}

// Close ends Wait.
func (e *Events) Close() error { return e.conn.Close() }
