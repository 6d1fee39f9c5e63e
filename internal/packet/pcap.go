package packet

import (
	"bufio"
	"errors"
	"fmt"
	"io"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"

	"github.com/libdispatcher/dispatcher/hook"
)

// A Captured is a packet from a capture file.
type Captured struct {
	Data []byte
	// Length is the packet's length on the wire. It is greater than len(Data) when the
	// capture cut the packet.
	Length int
	// Begins says what the packet begins with.
	Begins hook.Begins
}

// Truncated tells whether a part of the packet is missing.
func (c *Captured) Truncated() bool { return c.Length > len(c.Data) }

// A Capture reads a capture file of tcpdump or Wireshark: pcap, in either byte order and
// time resolution, or pcapng.
type Capture struct {
	read   func() ([]byte, gopacket.CaptureInfo, error)
	begins hook.Begins // of the packets of a pcap file; of pcapng each interface has its own
	whole  int         // packets read so far, for errors
}

// linkTypes names common link types (tcpdump.org/linktypes.html).
var linkTypes = map[layers.LinkType]string{
	0: "BSD loopback", 105: "802.11", 113: "Linux cooked, as of \"tcpdump -i any\"", 127: "802.11 with radiotap", 276: "Linux cooked v2, as of \"tcpdump -i any\"",
}

// NewCapture begins to read a capture file. It reads only the bytes that it
// needs, so r may be a pipe.
func NewCapture(r io.Reader) (*Capture, error) {
	in := bufio.NewReader(r)
	c := &Capture{}
	switch magic, err := in.Peek(4); string(magic) {
	case "\n\r\r\n":
		ng, err := pcapgo.NewNgReader(in, pcapgo.NgReaderOptions{WantMixedLinkType: true})
		if err != nil {
			return nil, c.broken(err)
		}
		c.read = ng.ReadPacketData
		return c, nil
	case "\xa1\xb2\xc3\xd4", "\xd4\xc3\xb2\xa1", "\xa1\xb2\x3c\x4d", "\x4d\x3c\xb2\xa1": // with micro- and nanoseconds
		old, err := pcapgo.NewReader(in)
		if err != nil {
			return nil, c.broken(err)
		}
		c.read = old.ReadPacketData
		c.begins, err = beginsOf(old.LinkType())
		return c, err
	case "":
		if errors.Is(err, io.EOF) {
			return nil, errors.New("it is empty, so it is not a capture file")
		}
		return nil, err
	default:
		return nil, fmt.Errorf("it begins with %x: neither pcap nor pcapng; \"tcpdump -w FILE\" writes pcap", magic)
	}
}

// beginsOf returns what packets of a link type begin with. It refuses what is neither
// Ethernet nor raw IP.
func beginsOf(t layers.LinkType) (hook.Begins, error) {
	switch t {
	case layers.LinkTypeEthernet:
		return "", nil
	case layers.LinkTypeRaw, layers.LinkTypeIPv4, layers.LinkTypeIPv6:
		return hook.BeginsIP, nil
	}
	name := linkTypes[t]
	if name != "" {
		name = " (" + name + ")"
	}
	return "", fmt.Errorf("its link type is %d%s: packets with an Ethernet header are needed, or raw IP packets, as \"tcpdump -i DEVICE -w FILE\" captures them", t, name)
}

// Next returns the next packet, and io.EOF after the last one.
func (c *Capture) Next() (*Captured, error) {
	data, info, err := c.read()
	switch {
	case err == io.EOF && info.CaptureLength == 0:
		return nil, io.EOF
	case err == io.EOF: // behind the packet's header
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, c.broken(err)
	}
	if len(info.AncillaryData) > 0 { // pcapng has a link type for each interface
		if c.begins, err = beginsOf(info.AncillaryData[0].(layers.LinkType)); err != nil {
			return nil, err
		}
	}
	c.whole++
	return &Captured{data, info.Length, c.begins}, nil
}

// broken says where a file is broken.
func (c *Capture) broken(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("it ends in the middle of packet %d: %w", c.whole+1, err)
	}
	return fmt.Errorf("it is broken at packet %d: %w", c.whole+1, err)
}
