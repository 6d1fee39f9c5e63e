package demo

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
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

// tally reads the numbers of UDP packets that count and droplist on a hook have
// in their maps.
func (s *stage) tally(ctx context.Context, h hook.Hook) []uint64 {
	c := s.chain(ctx, h)
	var dropped uint64
	name, key := badPrefix()
	readMap(programID(c, droplist), name, func(m *ebpf.Map) error { return m.Lookup(key, &dropped) })
	return []uint64{protocolCount(programID(c, count), unix.IPPROTO_UDP), dropped}
}

// protocolCount reads how many packets of a protocol a program count saw.
func protocolCount(program uint32, protocol uint8) (packets uint64) {
	readMap(program, "protocols", func(m *ebpf.Map) error {
		var perCPU []programs.Traffic
		err := m.Lookup(programs.Protocol{EtherType: unix.ETH_P_IP, Protocol: protocol}, &perCPU)
		for _, cpu := range perCPU {
			packets += cpu.Packets
		}
		return err
	})
	return packets
}

// badPrefix is droplist's entry for the bad address.
func badPrefix() (mapName string, key any) {
	return programs.DropKey(netip.PrefixFrom(badAddr, badAddr.BitLen()))
}

// readMap reads the map of that name of a program, as any other process could.
func readMap(program uint32, name string, read func(*ebpf.Map) error) {
	prog := value(ebpf.NewProgramFromID(ebpf.ProgramID(program)))
	defer prog.Close()
	ids, _ := value(prog.Info()).MapIDs()
	for _, id := range ids {
		m := value(ebpf.NewMapFromID(id))
		defer m.Close()
		if info, err := m.Info(); err != nil || info.Name != name {
			continue
		}
		// A map without the entry has counted nothing yet.
		if err := read(m); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			must(fmt.Errorf("map %s: %w", name, err))
		}
		return
	}
	must(fmt.Errorf("program %d has no map %s", program, name))
}

// samples takes all samples out of the map of sample, and counts the UDP ones by
// their source.
func (s *stage) samples(ctx context.Context) map[netip.Addr]uint64 {
	bySource := map[netip.Addr]uint64{}
	readMap(programID(s.chain(ctx, hook.XDP), sample), "samples", func(m *ebpf.Map) error {
		r := value(ringbuf.NewReader(m))
		defer r.Close()
		r.SetDeadline(time.Now()) // read what is there, without waiting for more
		for {
			record, err := r.Read()
			if errors.Is(err, os.ErrDeadlineExceeded) {
				return nil
			}
			must(err)
			if source, ok := sourceOfUDP(value(programs.ParseSample(record.RawSample)).Bytes); ok {
				bySource[source]++
			}
		}
	})
	return bySource
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
