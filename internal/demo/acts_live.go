package demo

import (
	"context"
	"fmt"
	"strings"
)

const (
	explainFrom = cli + "%sexplain xdp veth1 --udp %s %s %d"
	top         = cli + "top xdp veth1 --count 1 --interval 500ms"
)

func (s *stage) explain(ctx context.Context) error {
	s.say("explain builds packets and runs them through the members without sending them. Which member drops them?")
	out, err := s.try(ctx, fmt.Sprintf(explainFrom, "", badAddr, serverAddr, port))
	if err != nil {
		return err
	}
	if err := s.check(strings.Contains(out, "=> drop by droplist"), "droplist drops a packet from %s", badAddr); err != nil {
		return err
	}
	if out, err = s.try(ctx, fmt.Sprintf(explainFrom, "-q ", goodAddr, serverAddr, port)); err != nil {
		return err
	}
	if err := s.check(strings.Contains(out, "1 packet: 1 passed"), "a packet from %s passes all members", goodAddr); err != nil {
		return err
	}

	s.say("And live: %s sends as fast as it can, and top counts for half a second.", badAddr)
	bad, good, err := s.net.underFlood(func() (err error) {
		out, err = s.try(ctx, top)
		return err
	})
	if err != nil {
		return err
	}
	dropped := false
	for line := range strings.Lines(out) {
		words := strings.Fields(line)
		dropped = dropped || len(words) > 1 && words[1] == droplist && strings.Contains(line, "drop ")
	}
	if err := s.check(dropped, "top shows that droplist drops"); err != nil {
		return err
	}
	return s.check(bad.sent > 0 && bad.arrived == 0 && good.arrived > 0,
		"meanwhile, of %s packets from %s, %s arrived; of %s from %s, %s", grouped(bad.sent), badAddr, grouped(bad.arrived),
		grouped(good.sent), goodAddr, grouped(good.arrived))
}
