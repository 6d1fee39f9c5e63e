package rtnl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// Values from linux/pkt_sched.h.
const (
	rootQdisc    uint32 = 0xffffffff // TC_H_ROOT
	ingressQdisc uint32 = 0xfffffff1 // TC_H_INGRESS and TC_H_CLSACT are the same
	ingressMajor uint32 = 0xffff0000 // the handle of the ingress or clsact qdisc
	majorMask    uint32 = 0xffff0000 // TC_H_MAJ_MASK
)

// Kinds of qdiscs.
const (
	clsact  = "clsact"
	ingress = "ingress"
)

// tcmsg is struct tcmsg (linux/rtnetlink.h), the header of all tc messages.
type tcmsg struct {
	index                int
	handle, parent, info uint32
}

const (
	sizeofTcmsg = 20
	blockIndex  = -1 // TCM_IFINDEX_MAGIC_BLOCK, for the filters of a shared block
)

// tc sends one tc message and returns the answer.
func (c *Conn) tc(kind netlink.HeaderType, flags netlink.HeaderFlags, m tcmsg, ae *netlink.AttributeEncoder) ([]netlink.Message, error) {
	data := make([]byte, sizeofTcmsg)
	binary.NativeEndian.PutUint32(data[4:], uint32(m.index))
	binary.NativeEndian.PutUint32(data[8:], m.handle)
	binary.NativeEndian.PutUint32(data[12:], m.parent)
	binary.NativeEndian.PutUint32(data[16:], m.info)
	return Request(c.nl, kind, flags, data, ae)
}

// tries bounds how often an operation is repeated because another process was
// faster.
const tries = 10

// dump requests all objects of a kind.
func (c *Conn) dump(kind netlink.HeaderType, m tcmsg) ([]netlink.Message, error) {
	for range tries {
		msgs, err := c.tc(kind, netlink.Dump, m, netlink.NewAttributeEncoder())
		if err != nil {
			return nil, err
		}
		if !slices.ContainsFunc(msgs, func(m netlink.Message) bool { return m.Header.Flags&netlink.DumpInterrupted != 0 }) {
			return msgs, nil
		}
	}
	return nil, hook.ErrChanged
}

// widen makes the kernel send dumps in pieces of 32 KiB instead of 4. The size of
// a piece follows the largest buffer that was ever read into (netlink_dump,
// net/netlink/af_netlink.c).
//
// A piece is consistent. Between two pieces other processes may add or remove
// objects; the kernel continues at a count, so it then skips or repeats objects
// that existed all the time, and tc does not set NLM_F_DUMP_INTR (seen on Linux
// 6.18). One piece has room for more than 100 filters, unless their names are very
// long.
func (c *Conn) widen() error {
	if c.wide {
		return nil
	}
	raw, err := c.nl.SyscallConn()
	if err != nil {
		return err
	}
	// No device has the index 0, so the answer is empty.
	none := netlink.Message{
		Header: netlink.Header{Type: unix.RTM_GETTFILTER, Flags: netlink.Request | netlink.Dump},
		Data:   make([]byte, sizeofTcmsg),
	}
	if _, err := c.nl.Send(none); err != nil {
		return err
	}
	var peek error
	err = raw.Read(func(fd uintptr) bool {
		_, _, peek = unix.Recvfrom(int(fd), make([]byte, 32<<10), unix.MSG_PEEK)
		return peek != unix.EAGAIN
	})
	if err := kernel.Join(err, peek); err != nil {
		return err
	}
	_, err = c.nl.Receive()
	c.wide = err == nil
	return err
}

func parseTC(b []byte) (tcmsg, *netlink.AttributeDecoder, error) {
	if len(b) < sizeofTcmsg {
		return tcmsg{}, nil, errors.New("rtnetlink: short message")
	}
	ad, err := netlink.NewAttributeDecoder(b[sizeofTcmsg:])
	if err != nil {
		return tcmsg{}, nil, fmt.Errorf("rtnetlink: %w", err)
	}
	return tcmsg{
		index:  int(int32(binary.NativeEndian.Uint32(b[4:]))),
		handle: binary.NativeEndian.Uint32(b[8:]),
		parent: binary.NativeEndian.Uint32(b[12:]),
		info:   binary.NativeEndian.Uint32(b[16:]),
	}, ad, nil
}
