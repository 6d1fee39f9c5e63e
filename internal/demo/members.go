package demo

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/programs"
)

// Names of the built-in programs, and of the members that run them.
const (
	count    = "count"
	droplist = "droplist"
	sample   = "sample"
	redirect = "redirect"
)

// seen is what the members' maps say about packets.
type seen struct {
	counted uint64
	dropped uint64
	sampled map[netip.Addr]uint64 // by source, since the last reading
}

// readMaps reads the maps of the members on XDP.
func (s *stage) readMaps(ctx context.Context) (now seen, err error) {
	if now.counted, now.dropped, err = s.tally(ctx, hook.XDP); err != nil {
		return now, err
	}
	now.sampled = map[netip.Addr]uint64{}
	return now, s.readMap(ctx, hook.XDP, sample, "samples", func(m *ebpf.Map) error { return drain(m, now.sampled) })
}

// tally reads the numbers of UDP packets that count and droplist on a hook have
// in their maps.
func (s *stage) tally(ctx context.Context, h hook.Hook) (counted, dropped uint64, err error) {
	if counted, err = s.counted(ctx, h, unix.IPPROTO_UDP); err != nil {
		return 0, 0, err
	}
	name, key := badPrefix()
	err = s.readMap(ctx, h, droplist, name, func(m *ebpf.Map) error { return m.Lookup(key, &dropped) })
	return counted, dropped, err
}

// counted reads how many packets of a protocol count saw on a hook.
func (s *stage) counted(ctx context.Context, h hook.Hook, protocol uint8) (packets uint64, err error) {
	err = s.readMap(ctx, h, count, "protocols", func(m *ebpf.Map) error {
		packets, err = sum(m, protocol)
		return err
	})
	return packets, err
}

// sum adds up a protocol's packets in the map of count.
func sum(protocols *ebpf.Map, protocol uint8) (packets uint64, err error) {
	var perCPU []programs.Traffic
	err = protocols.Lookup(programs.Protocol{EtherType: unix.ETH_P_IP, Protocol: protocol}, &perCPU)
	for _, cpu := range perCPU {
		packets += cpu.Packets
	}
	return packets, err
}

// badPrefix is droplist's entry for the bad address.
func badPrefix() (mapName string, key any) {
	return programs.DropKey(netip.PrefixFrom(badAddr, badAddr.BitLen()))
}

// readMap reads a map of a member. It finds the map as any other process could:
// by the hook, the member, its program, and the program's maps.
func (s *stage) readMap(ctx context.Context, h hook.Hook, member, name string, read func(*ebpf.Map) error) error {
	chain, err := s.chain(ctx, h)
	if err != nil {
		return err
	}
	if err := readMapOf(programID(chain, member), name, read); err != nil {
		return fmt.Errorf("map %s of %s: %w", name, member, err)
	}
	return nil
}

func readMapOf(program uint32, name string, read func(*ebpf.Map) error) error {
	m, err := mapOf(ebpf.ProgramID(program), name)
	if err != nil {
		return err
	}
	defer m.Close()
	// A map without the entry has counted nothing yet.
	if err := read(m); !errors.Is(err, ebpf.ErrKeyNotExist) {
		return err
	}
	return nil
}

// mapOf opens a program's map of that name.
func mapOf(id ebpf.ProgramID, name string) (*ebpf.Map, error) {
	prog, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return nil, err
	}
	defer prog.Close()
	info, err := prog.Info()
	if err != nil {
		return nil, err
	}
	ids, _ := info.MapIDs()
	for _, id := range ids {
		m, err := ebpf.NewMapFromID(id)
		if err != nil {
			return nil, err
		}
		if info, err := m.Info(); err == nil && info.Name == name {
			return m, nil
		}
		m.Close()
	}
	return nil, fs.ErrNotExist
}

// drain removes all samples and counts the UDP ones by their source.
func drain(samples *ebpf.Map, bySource map[netip.Addr]uint64) error {
	r, err := ringbuf.NewReader(samples)
	if err != nil {
		return err
	}
	defer r.Close()
	r.SetDeadline(time.Now()) // read what is there, without waiting for more
	for {
		record, err := r.Read()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		}
		if err != nil {
			return err
		}
		packet, err := programs.ParseSample(record.RawSample)
		if err != nil {
			return err
		}
		if source, ok := sourceOfUDP(packet.Bytes); ok {
			bySource[source]++
		}
	}
}

// sourceOfUDP returns the source of a frame that is IPv4 with UDP.
func sourceOfUDP(frame []byte) (netip.Addr, bool) {
	const etherType, header, protocol, source = 12, 14, 14 + 9, 14 + 12
	if len(frame) < header+20 ||
		binary.BigEndian.Uint16(frame[etherType:]) != unix.ETH_P_IP || frame[protocol] != unix.IPPROTO_UDP {
		return netip.Addr{}, false
	}
	return netip.AddrFrom4([4]byte(frame[source : source+4])), true
}
