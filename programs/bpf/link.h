/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What packets have in front of their IP header: an Ethernet header and VLAN tags, or nothing.
 */
#pragma once

#include "xdp.h"

/*
 * The length of the link header of the device: 14 for Ethernet; 0 where packets begin with the IP
 * header (tun, WireGuard, IP tunnels, PPP). Whoever attaches the program to a device sets it.
 */
volatile const __u8 ld_link_header = sizeof(struct ethernet);

/* The type of a packet that begins with its IP header; 0 for what is not IP. */
static __always_inline __u16 ip_type(const struct cursor *c)
{
	const __u8 *version = c->pos;

	if (c->pos + 1 > c->end)
		return 0;
	switch (*version >> 4) {
	case 4:
		return ETH_IPV4;
	case 6:
		return ETH_IPV6;
	default:
		return 0;
	}
}

/* Like take_ethernet, but takes nothing where packets have no Ethernet header. */
static __always_inline __u16 take_link(struct cursor *c)
{
	return ld_link_header ? take_ethernet(c) : ip_type(c);
}
