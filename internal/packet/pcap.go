package packet

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// A Captured is a packet from a capture file.
type Captured struct {
	Data []byte
	// Length is the packet's length on the wire. It is greater than len(Data) when the
	// capture cut the packet.
	Length int
}

// Truncated tells whether a part of the packet is missing.
func (c *Captured) Truncated() bool { return c.Length > len(c.Data) }

// A Capture reads a capture file of tcpdump or Wireshark: pcap, in either byte order and
// time resolution, or pcapng.
type Capture struct {
	in    *bufio.Reader
	order binary.ByteOrder
	ng    bool
	// links are the link types of the interfaces; pcap has one.
	links []iface
	at    int64 // bytes read so far, for errors
}

type iface struct {
	linkType uint16
	snapLen  uint32
}

const (
	ethernet = 1 // LINKTYPE_ETHERNET
	// maxPacket is libpcap's limit (MAXIMUM_SNAPLEN). A greater length means a broken
	// file.
	maxPacket = 262144
	maxBlock  = 16 << 20 // libpcap's limit for pcapng

	magicMicro = 0xa1b2c3d4
	magicNano  = 0xa1b23c4d
	blockStart = 0x0a0d0d0a // begins a section of pcapng
	magicNG    = 0x1a2b3c4d
)

// linkTypes names common link types (tcpdump.org/linktypes.html).
var linkTypes = map[uint16]string{
	0: "BSD loopback", 101: "raw IP", 105: "802.11", 113: "Linux cooked, as of \"tcpdump -i any\"", 127: "802.11 with radiotap",
	228: "raw IPv4", 229: "raw IPv6", 276: "Linux cooked v2, as of \"tcpdump -i any\"",
}

// NewCapture begins to read a capture file. It reads only the bytes that it
// needs, so r may be a pipe.
func NewCapture(r io.Reader) (*Capture, error) {
	c := &Capture{in: bufio.NewReader(r)}
	var magic [4]byte
	if err := c.fill(magic[:]); err != nil {
		if errors.Is(err, io.EOF) {
			return nil, errors.New("it is empty, so it is not a capture file")
		}
		return nil, err
	}
	for _, c.order = range []binary.ByteOrder{binary.LittleEndian, binary.BigEndian} {
		switch c.order.Uint32(magic[:]) {
		case magicMicro, magicNano:
			return c, c.header()
		case blockStart:
			c.ng = true
			return c, c.section()
		}
	}
	return nil, fmt.Errorf("it begins with %x: neither pcap nor pcapng; \"tcpdump -w FILE\" writes pcap", magic)
}

// fill reads exactly len(b) bytes. io.EOF means that the file ends here.
func (c *Capture) fill(b []byte) error {
	n, err := io.ReadFull(c.in, b)
	c.at += int64(n)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("it ends in the middle of a packet, at byte %d: %w", c.at, err)
	}
	return err
}

// rest is fill for bytes that must be there.
func (c *Capture) rest(b []byte) error {
	err := c.fill(b)
	if errors.Is(err, io.EOF) && len(b) > 0 {
		return fmt.Errorf("it ends in the middle of a packet, at byte %d: %w", c.at, io.ErrUnexpectedEOF)
	}
	return err
}

func (c *Capture) broken(format string, args ...any) error {
	return fmt.Errorf("it is broken at byte %d: %s", c.at, fmt.Sprintf(format, args...))
}

// header reads the rest of a pcap file header.
func (c *Capture) header() error {
	var h [20]byte
	if err := c.rest(h[:]); err != nil {
		return err
	}
	// The bits above the type concern frame check sequences.
	c.links = []iface{{linkType: uint16(c.order.Uint32(h[16:])), snapLen: c.order.Uint32(h[12:])}}
	return c.links[0].check()
}

// check refuses every link type but Ethernet.
func (i iface) check() error {
	if i.linkType == ethernet {
		return nil
	}
	name := linkTypes[i.linkType]
	if name != "" {
		name = " (" + name + ")"
	}
	return fmt.Errorf("its link type is %d%s: packets with an Ethernet header are needed, as \"tcpdump -i DEVICE -w FILE\" captures them on an Ethernet device", i.linkType, name)
}

// Next returns the next packet, and io.EOF after the last one.
func (c *Capture) Next() (*Captured, error) {
	if c.ng {
		return c.nextBlock()
	}
	var h [16]byte
	if err := c.fill(h[:]); err != nil {
		return nil, err
	}
	return c.packet(c.order.Uint32(h[8:]), c.order.Uint32(h[12:]))
}

// packet reads a pcap packet of which included bytes are in the file.
func (c *Capture) packet(included, length uint32) (*Captured, error) {
	if included > maxPacket {
		return nil, c.broken("a packet of %d bytes", included)
	}
	p := &Captured{Data: make([]byte, included), Length: int(length)}
	return p, c.rest(p.Data)
}

// section reads the rest of a pcapng section header block. The caller has read the
// block's type.
func (c *Capture) section() error {
	var h [8]byte // the block's length and the magic number
	if err := c.rest(h[:]); err != nil {
		return err
	}
	switch uint32(magicNG) {
	case binary.LittleEndian.Uint32(h[4:]):
		c.order = binary.LittleEndian
	case binary.BigEndian.Uint32(h[4:]):
		c.order = binary.BigEndian
	default:
		return c.broken("a section without a byte order")
	}
	c.links = nil
	size := c.order.Uint32(h[:])
	if size < 28 || size%4 != 0 || size > maxBlock {
		return c.broken("a section header of %d bytes", size)
	}
	return c.skip(int(size) - 12)
}

func (c *Capture) skip(n int) error {
	skipped, err := c.in.Discard(n)
	c.at += int64(skipped)
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("it ends in the middle of a block, at byte %d: %w", c.at, io.ErrUnexpectedEOF)
	}
	return err
}

// Block types of pcapng.
const (
	blockInterface = 1
	blockObsolete  = 2 // packet block
	blockSimple    = 3
	blockEnhanced  = 6
)

// nextBlock reads pcapng blocks up to and including the next packet.
func (c *Capture) nextBlock() (*Captured, error) {
	for {
		var h [8]byte
		if err := c.fill(h[:4]); err != nil {
			return nil, err
		}
		kind := c.order.Uint32(h[:])
		if kind == blockStart { // this type is the same in both byte orders
			if err := c.section(); err != nil {
				return nil, err
			}
			continue
		}
		if err := c.rest(h[4:]); err != nil {
			return nil, err
		}
		size := c.order.Uint32(h[4:])
		if size < 12 || size%4 != 0 || size > maxBlock {
			return nil, c.broken("a block of %d bytes", size)
		}
		if kind != blockInterface && kind != blockObsolete && kind != blockSimple && kind != blockEnhanced {
			if err := c.skip(int(size) - 8); err != nil {
				return nil, err
			}
			continue
		}
		body := make([]byte, size-8) // the block ends with its length once more
		if err := c.rest(body); err != nil {
			return nil, err
		}
		p, err := c.block(kind, body[:len(body)-4])
		if p != nil || err != nil {
			return p, err
		}
	}
}

// block reads one block. It returns nil for a block that holds no packet.
func (c *Capture) block(kind uint32, b []byte) (*Captured, error) {
	fixed := map[uint32]int{blockInterface: 8, blockObsolete: 20, blockSimple: 4, blockEnhanced: 20}[kind]
	if len(b) < fixed {
		return nil, c.broken("a block of type %d and %d bytes", kind, len(b))
	}
	switch kind {
	case blockInterface:
		c.links = append(c.links, iface{c.order.Uint16(b), c.order.Uint32(b[4:])})
		return nil, nil
	case blockSimple:
		if len(c.links) == 0 {
			return nil, c.broken("a packet before the block of its interface")
		}
		length, data := c.order.Uint32(b), b[4:]
		included := min(uint32(len(data)), length)
		if s := c.links[0].snapLen; s != 0 {
			included = min(included, s)
		}
		return &Captured{data[:included], int(length)}, c.links[0].check()
	}
	id := c.order.Uint32(b)
	if kind == blockObsolete {
		id = uint32(c.order.Uint16(b))
	}
	if id >= uint32(len(c.links)) {
		return nil, c.broken("a packet of interface %d in a file with %d interfaces", id, len(c.links))
	}
	included, length := c.order.Uint32(b[12:]), c.order.Uint32(b[16:])
	if included > maxPacket || int(included) > len(b)-20 {
		return nil, c.broken("a packet of %d bytes", included)
	}
	return &Captured{b[20:][:included], int(length)}, c.links[id].check()
}
